"""INT8 and INT4 weights: `int-quantized` and `pack-quantized` of compressed-tensors.

int-quantized, a scale a row: 8 + 16 / columns bits per weight
    weight             I8    [n, k]                 codes -128 .. 127
    weight_scale       BF16  [n, 1]

pack-quantized, a scale a row or a group of g columns: bits + 16 / g, and bits / g more where there are zero points
    weight_packed      I32   [n, ceil(k bits / 32)] codes, packed along the row (formats/schemes/packed_int.py)
    weight_scale       BF16  [n, k / g]
    weight_zero_point  I32   [ceil(n bits / 32), k / g]  packed along the column; asymmetric only
    weight_shape       I64   [2]                    n, k

A weight is scale * code, or scale * (code - zero_point). Of symmetric INT4 the scale may be negative.
"""

from dataclasses import dataclass

import numpy as np

from bitwright.formats.bfloat16 import bfloat16, bfloat16_bits, nearest_bfloat16
from bitwright.formats.choices import Effort
from bitwright.formats.encoding import to_blocks
from bitwright.formats.kernels.int_scales import search_asymmetric, search_symmetric
from bitwright.formats.parts import ONE_VALUE, BlockRows, ScalarBlocks, ScalarParts, integers
from bitwright.formats.schemes.packed_int import pack, packed_width, unpack
from bitwright.formats.schemes.row_chunks import for_row_chunks
from bitwright.formats.schemes.scheme import Tensors, TensorShapes, TunableRows, WeightScheme

# Pairs of scale and zero point that the asymmetric search refines.
_REFINED = {"best": 4, "fast": 1}


# Of a block as error feedback and tuning see it: a group's scale and minimum as float32, before its codes.
_UNITS_BYTES = 8


def _block_rows(size: int, levels: np.ndarray) -> BlockRows:
    """Blocks whose codes are chosen under scales and minima as they are: a weight is scale * level - minimum."""

    def unpack_parts(blocks: np.ndarray) -> ScalarParts:
        units = np.ascontiguousarray(blocks[:, :_UNITS_BYTES]).view(np.float32)
        return ScalarParts(units, np.zeros((len(blocks), 2, 1), np.int16), blocks[:, _UNITS_BYTES:].view(np.int8))

    def pack_parts(parts: ScalarParts) -> np.ndarray:
        return np.concatenate([np.ascontiguousarray(parts.units).view(np.uint8), parts.levels.view(np.uint8)], axis=1)

    type_size = _UNITS_BYTES + size
    blocks = ScalarBlocks(size, type_size, unpack_parts, pack_parts, levels, minimum_table=ONE_VALUE, fixed_unit=True)
    return BlockRows("integers", blocks)


@dataclass(frozen=True)
class IntegerCodec:
    weights: WeightScheme
    packed: bool

    def tensors(self, n_rows: int, n_columns: int) -> TensorShapes:
        n_groups = n_columns // self._group(n_columns)
        shapes: TensorShapes = {"weight_scale": ("BF16", (n_rows, n_groups))}
        if not self.packed:
            return {"weight": ("I8", (n_rows, n_columns))} | shapes
        bits = self.weights.num_bits
        shapes = {"weight_packed": ("I32", (n_rows, packed_width(n_columns, bits)))} | shapes
        if not self.weights.symmetric:
            shapes["weight_zero_point"] = ("I32", (packed_width(n_rows, bits), n_groups))
        return shapes | {"weight_shape": ("I64", (2,))}

    def encode(
        self,
        rows: np.ndarray,
        importance: np.ndarray | None,
        effort: Effort,
        global_scale: float | None,
        n_threads: int,
    ) -> Tensors:
        n_rows, n_columns = rows.shape
        group = self._group(n_columns)
        scales = np.empty((n_rows, n_columns // group), np.uint16)
        zero_points = np.empty(scales.shape, np.int8)
        codes = np.empty(rows.shape, np.int8)
        # Codes reach one further below zero than above: of four bits it is worth 10 % of the error to have it on the
        # better side, of eight bits next to nothing.
        signs = 2 if self.weights.num_bits == 4 else 1
        # One window of trials then spans the scales that usually are the best; of eight bits those cut hardly anything.
        stride = np.int32(6 if effort == "fast" and self.weights.num_bits == 4 else 1)
        bottom, top = np.float32(-(1 << self.weights.num_bits - 1)), np.float32((1 << self.weights.num_bits - 1) - 1)

        def work(chunk: slice) -> None:
            blocks, weights = to_blocks(rows[chunk], importance, group)
            chunk_codes = codes[chunk].reshape(-1, group)
            if self.weights.symmetric:
                out = (scales[chunk].reshape(-1), chunk_codes)
                search_symmetric(blocks, weights, bottom, top, stride, effort == "best", signs, out)
            else:
                both = (scales[chunk].reshape(-1), zero_points[chunk].reshape(-1), chunk_codes)
                search_asymmetric(blocks, weights, bottom, top, _REFINED[effort], both)

        for_row_chunks(n_rows, n_columns, n_threads, work)
        if not self.packed:
            return {"weight": codes, "weight_scale": scales}
        bits = self.weights.num_bits
        tensors = {"weight_packed": pack(codes, bits), "weight_scale": scales}
        if not self.weights.symmetric:
            tensors["weight_zero_point"] = np.ascontiguousarray(pack(np.ascontiguousarray(zero_points.T), bits).T)
        return tensors | {"weight_shape": np.array(rows.shape, np.int64)}

    def decode(self, tensors: Tensors, shape: tuple[int, int]) -> np.ndarray:
        n_rows, n_columns = shape
        groups = self._codes(tensors, n_columns).reshape(n_rows, -1, self._group(n_columns)).astype(np.float32)
        if not self.weights.symmetric:
            groups -= self._zero_points(tensors, n_rows)[..., None]
        groups *= bfloat16(tensors["weight_scale"])[..., None]
        return groups.reshape(shape)

    def block_rows(self, n_columns: int) -> BlockRows:
        half = 1 << self.weights.num_bits - 1
        return _block_rows(self._group(n_columns), integers(-half, half - 1))

    def to_blocks(self, tensors: Tensors, shape: tuple[int, int]) -> np.ndarray:
        n_rows, n_columns = shape
        units = np.zeros((n_rows, n_columns // self._group(n_columns), 2), np.float32)
        units[..., 0] = bfloat16(tensors["weight_scale"])
        if not self.weights.symmetric:
            units[..., 1] = units[..., 0] * self._zero_points(tensors, n_rows)
        blocks = self._codes(tensors, n_columns).reshape(*units.shape[:2], -1).view(np.uint8)
        return np.concatenate([units.view(np.uint8), blocks], axis=2).reshape(n_rows, -1)

    def from_blocks(self, data: np.ndarray, tensors: Tensors) -> Tensors:
        n_rows, n_groups = tensors["weight_scale"].shape
        codes = np.ascontiguousarray(data.reshape(n_rows, n_groups, -1)[..., _UNITS_BYTES:]).view(np.int8)
        return tensors | self._stored_codes(codes)

    def block_factor(self, tensors: Tensors) -> np.float32:
        return np.float32(1)

    def tunable(self, tensors: Tensors, shape: tuple[int, int]) -> TunableRows:
        """Levels are counted from the zero point, which stays. A group of zeros has no scale, and so stays one."""
        n_rows, n_columns = shape
        half, group = 1 << self.weights.num_bits - 1, self._group(n_columns)
        levels, table = self._codes(tensors, n_columns).reshape(n_rows, -1, group), integers(-half, half - 1)
        places = None
        if not self.weights.symmetric:
            zeros = self._zero_points(tensors, n_rows)
            levels, table = levels - zeros[..., None], integers(1 - 2 * half, 2 * half - 1)
            places = half - 1 - zeros[..., None].astype(np.int16) + np.array([0, 2 * half - 1], np.int16)
        units = np.zeros((*levels.shape[:2], 2), np.float32)
        units[..., 0] = np.where(levels.any(-1), bfloat16(tensors["weight_scale"]), 0)
        data = np.concatenate([units.view(np.uint8), levels.view(np.uint8)], axis=2).reshape(n_rows, -1)
        return TunableRows(_block_rows(group, table).blocks, data, np.float32(1), nearest_bfloat16, places)

    def tuned(self, data: np.ndarray, tensors: Tensors) -> Tensors:
        n_rows, n_groups = tensors["weight_scale"].shape
        blocks = data.reshape(n_rows, n_groups, -1)
        scales = np.ascontiguousarray(blocks[..., :_UNITS_BYTES]).view(np.float32)[..., 0]
        codes = np.ascontiguousarray(blocks[..., _UNITS_BYTES:]).view(np.int8)
        codes[scales == 0] = 0
        if not self.weights.symmetric:
            codes = codes + self._zero_points(tensors, n_rows)[..., None]
        bits = np.where(scales == 0, tensors["weight_scale"], bfloat16_bits(scales.copy()))
        return tensors | {"weight_scale": bits} | self._stored_codes(codes)

    def _stored_codes(self, codes: np.ndarray) -> Tensors:
        """codes: int8 [n_rows, n_groups, group_size]."""
        rows = codes.reshape(len(codes), -1)
        return {"weight_packed": pack(rows, self.weights.num_bits)} if self.packed else {"weight": rows}

    def _codes(self, tensors: Tensors, n_columns: int) -> np.ndarray:
        """int8 [n_rows, n_columns]."""
        return unpack(tensors["weight_packed"], self.weights.num_bits, n_columns) if self.packed else tensors["weight"]

    def _zero_points(self, tensors: Tensors, n_rows: int) -> np.ndarray:
        """int8 [n_rows, n_groups]."""
        packed = np.ascontiguousarray(tensors["weight_zero_point"].T)
        return unpack(packed, self.weights.num_bits, n_rows).T

    def _group(self, n_columns: int) -> int:
        return self.weights.group_size or n_columns
