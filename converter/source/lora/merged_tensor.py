"""A tensor of a base model with what an adapter adds to it, a few rows at a time."""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from bitwright.formats.errors import ConvertError
from bitwright.formats.files.stored_tensor import SourceTensor, StoredTensor


@dataclass(frozen=True)
class LowRank:
    """scale * B A.

    a: [r, n_inputs]; b: [n_outputs, r]; sideways: the tensor's rows are the inputs (embeddings, and matrices that are
    stored so). magnitude: [n_outputs], the lengths of the rows after the sum (DoRA); None for none.
    """

    a: StoredTensor
    b: StoredTensor
    scale: float
    sideways: bool = False
    magnitude: StoredTensor | None = None

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return (self.a, self.b, *([self.magnitude] if self.magnitude is not None else []))

    def added(self, name: str, rows: np.ndarray, start: int) -> np.ndarray:
        """The rows from `start` on, float32 [n, n_columns], as they are with the adapter."""
        stop, scale = start + len(rows), np.float32(self.scale)
        if self.sideways:
            a = self.a.columns(name, 0, start, stop)
            product: np.ndarray = a @ self.b.rows(name, 0, self.b.n_rows).T
        else:
            product = self.b.rows(name, start, stop) @ self.a.rows(name, 0, self.a.n_rows)
        added: np.ndarray = rows + scale * product
        if self.magnitude is None:
            return added
        lengths = np.linalg.norm(added, axis=1)
        if not lengths.all():
            row = start + int(np.flatnonzero(lengths == 0)[0])
            raise ConvertError(
                f"row {row} of {name!r} is zero, and DoRA would divide by its length",
                f"{self.magnitude.file}: {name}",
                "train the adapter without DoRA, or ask its author for a merged model",
            )
        magnitudes = replace(self.magnitude, shape=(self.b.n_rows, 1)).rows(name, start, stop)
        scaled: np.ndarray = added * (magnitudes / lengths[:, None])
        return scaled


@dataclass(frozen=True)
class MergedTensor(SourceTensor):
    """base, with what low_rank adds, from its row first_row on."""

    base: SourceTensor
    low_rank: LowRank
    first_row: int = 0

    @classmethod
    def of(cls, base: SourceTensor, low_rank: LowRank) -> Self:
        return cls(base.dtype, base.shape, base.file, base, low_rank)

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return (*self.base.stored, *self.low_rank.stored)

    @property
    def inputs_first(self) -> bool:
        return self.base.inputs_first

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        first = self.first_row + start
        return self.low_rank.added(name, self.base.rows(name, first, self.first_row + stop), first)

    def part(self, first_row: int, shape: tuple[int, ...]) -> Self:
        return replace(self, shape=shape, first_row=self.first_row + first_row)
