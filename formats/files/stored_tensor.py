"""A tensor of a model as it is read, a few rows at a time; and one that lies in a file as it is, whatever kind of file
that is. What is decoded on the way is in formats/quantized/."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Self

import numpy as np

from bitwright.formats.bfloat16 import bfloat16
from bitwright.formats.errors import ConvertError

NUMPY_DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
}
"""What holds a tensor of safetensors' dtype here; of dtypes that numpy lacks, the bits."""

DTYPE_BITS = {name: 8 * dtype.itemsize for name, dtype in NUMPY_DTYPES.items()} | {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
    **{"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "U16": 16, "U32": 32, "U64": 64, "C64": 64},
}
"""Of a value of every dtype that a file can state."""

DTYPE_BYTES = {name: NUMPY_DTYPES[name].itemsize for name in ("F64", "F32", "F16", "BF16")}
"""Of the dtypes that weights are read in."""


@dataclass(frozen=True)
class SourceTensor(ABC):
    """A tensor of a model, whose values stay on disk until rows of them are asked for.

    dtype: one of DTYPE_BITS, that which the values stand for where they are decoded; shape: slowest dimension first;
    file: where its values, or their codes, lie. Rows are counted over all matrices of the tensor; a vector is one row.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    @abstractmethod
    def stored(self) -> "tuple[StoredTensor, ...]":
        """What lies in files of it, its values or codes first."""

    @property
    def n_columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def n_rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def inputs_first(self) -> bool:
        """Whether the rows of its matrices are known to be the inputs of the product, [.., n_inputs, n_outputs]."""
        return False

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start to stop, float32 [stop - start, n_columns]. name: of the tensor, for errors. Raises ConvertError
        for a file that has become shorter, and for what cannot be decoded."""

    @abstractmethod
    def part(self, first_row: int, shape: tuple[int, ...]) -> Self:
        """The tensor of this shape that begins with that row, in which rows are as long."""

    def columns(self, name: str, matrix: int, start: int, stop: int) -> np.ndarray:
        """Columns start to stop of one of its matrices, each as a row: float32 [stop - start, rows of a matrix],
        C-contiguous."""
        n_rows = self.shape[-2] if len(self.shape) > 1 else 1
        rows = self.rows(name, matrix * n_rows, (matrix + 1) * n_rows)
        return np.ascontiguousarray(rows[:, start:stop].T)

    def gather(self, name: str, rows: np.ndarray) -> np.ndarray:
        """The rows of these indices, in their order: float32 [len(rows), n_columns]."""
        wanted, places = np.unique(rows, return_inverse=True)
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1) if len(wanted) else []
        parts = [self.rows(name, int(run[0]), int(run[-1]) + 1) for run in runs]
        found: np.ndarray = np.concatenate(parts)[places] if parts else np.empty((0, self.n_columns), np.float32)
        return found


@dataclass(frozen=True)
class StoredTensor(SourceTensor):
    """A tensor that lies in a file as it is. offset: of its first byte in the file."""

    offset: int

    @property
    def stored(self) -> "tuple[StoredTensor, ...]":
        return (self,)

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    def read(self, name: str, first: int = 0, n_values: int | None = None) -> np.ndarray:
        """Some values in their order, all of them by default, in the dtype of NUMPY_DTYPES: [n_values].

        name: of the tensor, for errors. A plain file read, from any thread: a mapping would count every page it has
        touched as resident memory, and end the process when the file is cut short under it. Raises ConvertError for a
        dtype that numpy has no place for, and for a file that has become shorter.
        """
        kind = self._numpy_dtype(name)
        n_values = prod(self.shape) - first if n_values is None else n_values
        values = np.fromfile(self.file, kind, n_values, offset=self.offset + first * kind.itemsize)
        if values.size != n_values:
            raise self._cut_short(name)
        return values

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """As `read`, rows start to stop: [stop - start, n_columns]."""
        return self.read(name, start * self.n_columns, (stop - start) * self.n_columns).reshape(-1, self.n_columns)

    def read_columns(self, name: str, matrix: int, start: int, stop: int) -> np.ndarray:
        """Columns start to stop of one of its matrices, in the dtype of NUMPY_DTYPES: [rows of a matrix, stop - start].

        Only these are read, through a mapping that is gone with this call.
        """
        kind, n_rows = self._numpy_dtype(name), self.shape[-2] if len(self.shape) > 1 else 1
        offset = self.offset + matrix * n_rows * self.n_columns * kind.itemsize
        if 0 in (n_rows, self.n_columns):
            return np.empty((n_rows, stop - start), kind)
        try:
            mapped = np.memmap(self.file, kind, "r", offset, (n_rows, self.n_columns))
        except ValueError:
            raise self._cut_short(name) from None
        return np.array(mapped[:, start:stop])

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return to_float32(self.read_rows(name, start, stop), self.dtype)

    def columns(self, name: str, matrix: int, start: int, stop: int) -> np.ndarray:
        return np.ascontiguousarray(to_float32(self.read_columns(name, matrix, start, stop).T, self.dtype))

    def gather(self, name: str, rows: np.ndarray) -> np.ndarray:
        mapped = np.memmap(self.file, self._numpy_dtype(name), "r", self.offset, (self.n_rows, self.n_columns))
        return to_float32(mapped[rows], self.dtype)

    def part(self, first_row: int, shape: tuple[int, ...]) -> Self:
        return replace(self, shape=shape, offset=self.offset + first_row * (self.n_bytes // self.n_rows))

    def _numpy_dtype(self, name: str) -> np.dtype:
        kind = NUMPY_DTYPES.get(self.dtype)
        if kind is None:
            raise ConvertError(
                f"{name!r} is stored as {self.dtype}, which nothing here reads", str(self.file), "do not use it"
            )
        return kind

    def _cut_short(self, name: str) -> ConvertError:
        return ConvertError(
            f"the file ends inside the tensor {name!r}", str(self.file), "fetch, copy or write this file again"
        )


def to_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values that were read of a tensor of one of DTYPE_BYTES, of BF16 the bits, as float32 of the same shape."""
    if dtype == "BF16":
        return bfloat16(values)
    with np.errstate(over="ignore"):  # of F64; a weight beyond float32 is refused as the infinity that it becomes
        return values.astype(np.float32)
