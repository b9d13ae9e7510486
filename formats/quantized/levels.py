"""The codes of quantized matrices as they are stored, read by rows, as the levels that they stand for.

Plain         F8_E4M3, F8_E5M2 or I8  [.., n, k]    a code a weight
Nibbles       U8  [.., n, k / 2]    FP4 (E2M1): columns 2 l and 2 l + 1 in the low and the high nibble of byte l
Packed        I32 [n, ceil(k bits / 32)]    codes along the row, lowest bits first, as packed_int.py has them
ColumnPacked  I32 [k bits / 32, n]    GPTQ: the matrix lies on its side, codes follow each other down a column
Interleaved   I32 [k, n / 8]    AWQ: on its side, too; eight rows of the matrix in a word, in the order of AWQ_ORDER
Ternary       U8  [n / 4, k]    bitnet: bits 2 i and 2 i + 1 of byte (r, c) hold row i n / 4 + r, code - 1
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np

from bitwright.formats.files.stored_tensor import StoredTensor
from bitwright.formats.packing import unpack_bits
from bitwright.formats.schemes.packed_int import unpack

AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""Of eight rows that AWQ packs into a word, the nibble that each is in, the lowest is 0."""


class Levels(Protocol):
    """The levels of a tensor. tensor: its codes; shape: decoded."""

    @property
    def tensor(self) -> StoredTensor: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start, n_columns], an array of the caller's own."""
        ...


@dataclass(frozen=True)
class Plain:
    tensor: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return values_of(self.tensor.read_rows(name, start, stop), self.tensor.dtype)


@dataclass(frozen=True)
class Nibbles:
    tensor: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.tensor.shape[:-1], 2 * self.tensor.shape[-1])

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return fp4_values(self.tensor.read_rows(name, start, stop))


@dataclass(frozen=True)
class Packed:
    """n_columns: of the matrix; what is beyond them in the last word is none of it."""

    tensor: StoredTensor
    bits: int
    n_columns: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.tensor.shape[:-1], self.n_columns)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return unpack(self.tensor.read_rows(name, start, stop), self.bits, self.n_columns).astype(np.float32)


@dataclass(frozen=True)
class ColumnPacked:
    tensor: StoredTensor
    bits: int

    @property
    def shape(self) -> tuple[int, ...]:
        n_words, n_rows = self.tensor.shape
        return n_rows, n_words * 32 // self.bits

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        words = self.tensor.read_columns(name, 0, start, stop).T
        return unpack(words, self.bits, self.shape[1]).astype(np.float32)


@dataclass(frozen=True)
class Interleaved:
    tensor: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        n_columns, n_words = self.tensor.shape
        return n_words * 8, n_columns

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return np.ascontiguousarray(awq_columns(self.tensor, name, start, stop).T)


@dataclass(frozen=True)
class Ternary:
    tensor: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return 4 * self.tensor.shape[0], self.tensor.shape[1]

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        quarter = self.tensor.shape[0]
        levels = np.empty((stop - start, self.tensor.shape[1]), np.float32)
        for field in range(4):
            first, last = max(start, field * quarter), min(stop, (field + 1) * quarter)
            if first < last:
                packed = self.tensor.read_rows(name, first - field * quarter, last - field * quarter)
                levels[first - start : last - start] = (packed >> 2 * field & 3).astype(np.float32) - 1
        return levels


def awq_columns(tensor: StoredTensor, name: str, start: int, stop: int) -> np.ndarray:
    """Of a tensor that AWQ has packed along its rows, codes 0 .. 15 of the unpacked columns start to stop: float32
    [n_rows, stop - start]."""
    first = start // 8
    words = tensor.read_columns(name, 0, first, -(-stop // 8))
    nibbles = unpack_bits(np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1), 4)
    codes = nibbles.reshape(len(words), -1, 8)[..., AWQ_ORDER].reshape(len(words), -1)
    return codes[:, start - 8 * first : stop - 8 * first].astype(np.float32)


def fp4_values(packed: np.ndarray) -> np.ndarray:
    """Bytes of two E2M1 codes, the first in the low nibble: uint8 [n, m] to float32 [n, 2 m]."""
    values: np.ndarray = _fp4_table()[unpack_bits(packed, 4)]
    return values


def values_of(codes: np.ndarray, dtype: str) -> np.ndarray:
    """What codes of a dtype of eight bits stand for, float32 of the same shape."""
    if dtype == "I8":
        return codes.astype(np.float32)
    values: np.ndarray = _TABLES[dtype]()[codes]
    return values


# Looked up when they are needed: they come with the compiler, which reading a header can do without.
@cache
def _fp4_table() -> np.ndarray:
    from bitwright.formats.blocks.fp4 import SIGNED_LEVELS

    return SIGNED_LEVELS / 2


@cache
def _e4m3_table() -> np.ndarray:
    from bitwright.formats.schemes.fp8_codec import E4M3

    return E4M3


@cache
def _e5m2_table() -> np.ndarray:
    """float32 [256]: the upper half of a float16."""
    return (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)


@cache
def e8m0_table() -> np.ndarray:
    """float32 [256]: 2**(code - 127); code 255 stands for no number."""
    return np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.nan).astype(np.float32)


_TABLES: dict[str, Callable[[], np.ndarray]] = {
    "F8_E4M3": _e4m3_table,
    "F8_E5M2": _e5m2_table,
    "F8_E8M0": e8m0_table,
}
