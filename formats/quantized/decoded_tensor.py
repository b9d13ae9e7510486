"""A tensor that is stored in codes and scales, and decoded a few rows at a time as it is read."""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np

from bitwright.formats.errors import ConvertError
from bitwright.formats.files.stored_tensor import SourceTensor, StoredTensor


class Decoder(Protocol):
    """From what is stored to the values of a tensor.

    kind: how it is stored, as a user is told it ("FP8 in blocks of 128x128").
    """

    @property
    def kind(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the decoded tensor, slowest dimension first."""
        ...

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """All that it reads, the codes first."""
        ...

    @property
    def inputs_first(self) -> bool:
        """As of SourceTensor."""
        ...

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start to stop, at least one, counted over all matrices: float32 [stop - start, n_columns]."""
        ...

    def columns(self, name: str, matrix: int, start: int, stop: int) -> np.ndarray | None:
        """As of SourceTensor; None where whole rows have to be decoded for it."""
        ...


class ByRows:
    """What most decoders have in common: their codes lie in rows of outputs, and columns take whole rows."""

    @property
    def inputs_first(self) -> bool:
        return False

    def columns(self, name: str, matrix: int, start: int, stop: int) -> np.ndarray | None:
        return None


@dataclass(frozen=True)
class DecodedTensor(SourceTensor):
    """The values of a decoder, or a part of them that begins with row first_row."""

    decoder: Decoder
    first_row: int = 0

    @classmethod
    def of(cls, decoder: Decoder, dtype: str) -> Self:
        return cls(dtype, decoder.shape, decoder.stored[0].file, decoder)

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return self.decoder.stored

    @property
    def inputs_first(self) -> bool:
        return self.decoder.inputs_first

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        if start == stop:
            return np.empty((0, self.n_columns), np.float32)
        rows = self.decoder.rows(name, self.first_row + start, self.first_row + stop)
        return rows.reshape(stop - start, self.n_columns)

    def columns(self, name: str, matrix: int, start: int, stop: int) -> np.ndarray:
        if self.shape == self.decoder.shape:
            found = self.decoder.columns(name, matrix, start, stop)
            if found is not None:
                return found
        return super().columns(name, matrix, start, stop)

    def part(self, first_row: int, shape: tuple[int, ...]) -> Self:
        return replace(self, shape=shape, first_row=self.first_row + first_row)


def unusable(what: str, name: str, tensor: StoredTensor) -> ConvertError:
    """What is wrong with something that is stored beside the codes of a tensor of this name."""
    return ConvertError(
        what, f"{tensor.file}: {name}", "fetch this file again, or ask the checkpoint's author for a sound one"
    )
