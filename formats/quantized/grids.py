"""Scales and zero points of quantized matrices: one for a block of rows and columns, read for the rows that are asked
for."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bitwright.formats.files.stored_tensor import DTYPE_BYTES, StoredTensor, to_float32
from bitwright.formats.quantized.decoded_tensor import unusable
from bitwright.formats.quantized.levels import awq_columns, values_of
from bitwright.formats.schemes.packed_int import unpack


class Grid(Protocol):
    @property
    def tensor(self) -> StoredTensor: ...

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """What belongs to these rows, counted over all matrices: float32 [stop - start, blocks of a row]."""
        ...


@dataclass(frozen=True)
class BlockGrid:
    """Values of blocks of `height` rows; a matrix has n_rows of them, and the last block may be cut off.

    tensor: [.., blocks down, blocks across], of one of DTYPE_BYTES, F8_E4M3, or U8 for E8M0.
    """

    tensor: StoredTensor
    height: int
    n_rows: int
    across: int

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        down = -(-self.n_rows // self.height)
        matrix, row = np.divmod(np.arange(start, stop), self.n_rows)
        places = matrix * down + row // self.height
        first, last = int(places[0]), int(places[-1]) + 1
        stored = self.tensor.read(name, first * self.across, (last - first) * self.across)
        dtype = "F8_E8M0" if self.tensor.dtype == "U8" else self.tensor.dtype
        values = to_float32(stored, dtype) if dtype in DTYPE_BYTES else values_of(stored, dtype)
        values = values.reshape(-1, self.across)
        if not np.isfinite(values).all():
            block = int(np.argwhere(~np.isfinite(values))[0, 0])
            raise unusable(f"a scale of {name!r} is not a finite number, in its row {first + block}", name, self.tensor)
        found: np.ndarray = values[places - first]
        return found


@dataclass(frozen=True)
class SidewaysGrid:
    """GPTQ's and AWQ's scales: F16, BF16 or F32 [blocks of a row, n_rows]."""

    tensor: StoredTensor

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        scales = self.tensor.columns(name, 0, start, stop)
        if not np.isfinite(scales).all():
            raise unusable(f"a scale of {name!r} is not a finite number", name, self.tensor)
        return scales


@dataclass(frozen=True)
class PackedDown:
    """compressed-tensors' zero points: I32 [ceil(n_rows bits / 32), blocks of a row], codes follow each other down."""

    tensor: StoredTensor
    bits: int

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        # 32 codes take whole words.
        first = start // 32 * 32
        last_word = min(-(-stop // 32) * self.bits, self.tensor.shape[0])
        words = self.tensor.read_rows(name, first // 32 * self.bits, last_word)
        codes = unpack(np.ascontiguousarray(words.T), self.bits, stop - first)
        return codes.T[start - first :].astype(np.float32)


@dataclass(frozen=True)
class PackedAcross:
    """GPTQ's zero points: I32 [blocks of a row, n_rows bits / 32]; offset: what is added to the stored ones."""

    tensor: StoredTensor
    bits: int
    offset: int

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        first = start // 32 * 32
        last_word = min(-(-stop // 32) * self.bits, self.tensor.shape[1])
        words = self.tensor.read_columns(name, 0, first // 32 * self.bits, last_word)
        codes = unpack(words, self.bits, stop - first)
        return codes.T[start - first :].astype(np.float32) + np.float32(self.offset)


@dataclass(frozen=True)
class InterleavedZeros:
    """AWQ's zero points: I32 [blocks of a row, n_rows / 8]."""

    tensor: StoredTensor

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return np.ascontiguousarray(awq_columns(self.tensor, name, start, stop).T)
