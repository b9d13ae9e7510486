"""bitsandbytes: codes of four bits that are looked up in a table (NF4, FP4), and integers of eight bits.

weight            U8   [n k / 2, 1]     weights 2 l and 2 l + 1 in the high and the low nibble of byte l
absmax            F32  [n k / blocksize], or U8 codes of nested_quant_map, scaled by nested_absmax F32 in blocks of
                       nested_blocksize, and moved by nested_offset
quant_map         F32  [16]
a weight is quant_map[code] * absmax

weight I8 [n, k] with SCB F32 [n]: a weight is code * SCB / 127
"""

from dataclasses import dataclass

import numpy as np

from bitwright.formats.files.stored_tensor import StoredTensor
from bitwright.formats.packing import unpack_bits
from bitwright.formats.quantized.decoded_tensor import ByRows, unusable


@dataclass(frozen=True)
class NestedScales:
    """Scales that are quantized themselves. table F32 [256], absmax F32: of blocks of block_size scales."""

    table: StoredTensor
    absmax: StoredTensor
    block_size: int
    offset: float


@dataclass(frozen=True)
class TableCodes(ByRows):
    """shape: of the matrix; block_size: weights with a scale, counted along the rows; nested: None for absmax F32."""

    kind: str
    codes: StoredTensor
    table: StoredTensor
    absmax: StoredTensor
    shape: tuple[int, ...]
    block_size: int
    nested: NestedScales | None = None

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        nested = (self.nested.table, self.nested.absmax) if self.nested is not None else ()
        return (self.codes, self.table, self.absmax, *nested)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        n_columns = self.shape[-1]
        first, last = start * n_columns, stop * n_columns
        packed = self.codes.read(name, first // 2, -(-last // 2) - first // 2)
        # The first of two is in the high nibble.
        codes = unpack_bits(packed[None], 4).reshape(-1, 2)[:, ::-1].reshape(-1)
        codes = codes[first % 2 : first % 2 + last - first]
        blocks = np.arange(first, last) // self.block_size
        values: np.ndarray = self.table.read(name)[codes]
        values *= self._scales(name, int(blocks[0]), int(blocks[-1]) + 1)[blocks - blocks[0]]
        return values.reshape(stop - start, n_columns)

    def _scales(self, name: str, first: int, last: int) -> np.ndarray:
        """float32 [last - first]."""
        scales = self.absmax.read(name, first, last - first)
        if self.nested is not None:
            blocks = np.arange(first, last) // self.nested.block_size
            coarse = self.nested.absmax.read(name)[blocks]
            scales = self.nested.table.read(name)[scales] * coarse + np.float32(self.nested.offset)
        if not np.isfinite(scales).all():
            raise unusable(f"a scale of {name!r} is not a finite number", name, self.absmax)
        return scales


@dataclass(frozen=True)
class RowIntegers(ByRows):
    """codes I8 [n, k]; largest F32 [n], what 127 stands for in a row."""

    codes: StoredTensor
    largest: StoredTensor

    @property
    def kind(self) -> str:
        return "INT8 of bitsandbytes"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return self.codes, self.largest

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        largest = self.largest.read(name, start, stop - start)
        if not np.isfinite(largest).all():
            raise unusable(f"a scale of {name!r} is not a finite number", name, self.largest)
        values: np.ndarray = self.codes.read_rows(name, start, stop) * (largest[:, None] / np.float32(127))
        return values
