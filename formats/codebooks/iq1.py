"""IQ1_S and IQ1_M: 32 groups of 8 weights; a group is a scale times a point of a ternary grid, shifted by an eighth.

The grid has 2048 points with coordinates -1, 0 and 1 (gguf.quants). A weight is
d * (2 scale + 1) * (coordinate +- 0.125). Both have 256 weights a block.

IQ1_S, ggml's block_iq1_s: 50 bytes, 1.5625 bits per weight; a 3-bit scale and a shift for 32 weights
    d        2     float16
    qs      32     lower 8 bits of each group's point index
    qh      16     16 bits for 32 weights, little endian: 4 x upper 3 bits of the indices, the scale in bits 12 .. 14,
                   bit 15 set where the shift is negative

IQ1_M, ggml's block_iq1_m: 56 bytes, 1.75 bits per weight; a 3-bit scale for 16 weights, a shift for 8
    qs      32     lower 8 bits of each group's point index
    qh      16     a nibble a group, the first in the low one: upper 3 bits of the index, bit 3 set for a negative shift
    scales   8     16 bits for 64 weights, little endian: 4 x 3 bits, scales; bits 12 .. 15, a quarter of float16 d, its
                   lowest bits in the first
"""

import numpy as np
from gguf import GGMLQuantizationType as Type

from bitwright.formats.codebooks.kernels import SIGNED
from bitwright.formats.codebooks.search import point_format, search_efforts
from bitwright.formats.packing import pack_bits, pack_half, unpack_bits, unpack_half
from bitwright.formats.parts import Layout, PointBlocks, PointParts

FIELD_SHIFTS = 3 * np.arange(4, dtype=np.uint16)
D_SHIFTS = 4 * np.arange(4, dtype=np.uint16)


def _pack_iq1_s(parts: PointParts) -> np.ndarray:
    d, scales, indices, negative = parts
    high = np.bitwise_or.reduce((indices >> 8).reshape(-1, 8, 4) << FIELD_SHIFTS, axis=2)
    qh = high | scales.astype(np.uint16) << 12 | negative[:, ::4].astype(np.uint16) << 15
    return np.concatenate([pack_half(d), indices.astype(np.uint8), qh.astype("<u2").view(np.uint8)], axis=1)


def _unpack_iq1_s(blocks: np.ndarray) -> PointParts:
    qh = np.ascontiguousarray(blocks[:, 34:]).view("<u2")
    high = (qh[:, :, None] >> FIELD_SHIFTS & 7).reshape(-1, 32)
    negative = np.repeat((qh >> 15).astype(np.uint8), 4, axis=1)
    scales = (qh >> 12 & 7).astype(np.uint8)
    return PointParts(unpack_half(blocks[:, :2])[:, 0], scales, blocks[:, 2:34] | high << 8, negative)


def _pack_iq1_m(parts: PointParts) -> np.ndarray:
    d, scales, indices, _ = parts
    qh = pack_bits((indices >> 8).astype(np.uint8), 4)  # bit 11 of IQ1_M's index is the shift's sign
    fields = np.bitwise_or.reduce(scales.reshape(-1, 4, 4).astype(np.uint16) << FIELD_SHIFTS, axis=2)
    quarters = pack_half(d).view("<u2") >> D_SHIFTS & 15
    header = (fields | quarters << 12).astype("<u2").view(np.uint8)
    return np.concatenate([indices.astype(np.uint8), qh, header], axis=1)


def _unpack_iq1_m(blocks: np.ndarray) -> PointParts:
    qh, fields = unpack_bits(blocks[:, 32:48], 4), np.ascontiguousarray(blocks[:, 48:]).view("<u2")
    d = np.bitwise_or.reduce(fields >> 12 << D_SHIFTS, axis=1).view(np.float16).astype(np.float32)
    scales = (fields[:, :, None] >> FIELD_SHIFTS & 7).reshape(-1, 16).astype(np.uint8)
    indices = blocks[:, :32] | qh.astype(np.uint16) << 8
    return PointParts(d, scales, indices, np.zeros(indices.shape, np.uint8))


_TOP_CODE, _UNIT = np.float32(7), np.float32(1 / 8)
IQ1_S_LAYOUT = Layout(SIGNED, 2, 4, 8, _TOP_CODE, _UNIT)
IQ1_M_LAYOUT = Layout(SIGNED, 1, 1, 16, _TOP_CODE, _UNIT)
_IQ1_S_BLOCKS = PointBlocks(256, 50, _unpack_iq1_s, _pack_iq1_s, "IQ1_S", IQ1_S_LAYOUT)
_IQ1_M_BLOCKS = PointBlocks(256, 56, _unpack_iq1_m, _pack_iq1_m, "IQ1_M", IQ1_M_LAYOUT)
_IQ1_S_EFFORTS = search_efforts(IQ1_S_LAYOUT, 8, 6, n_candidates=(48, 16), n_rounds=1)
_IQ1_M_EFFORTS = search_efforts(IQ1_M_LAYOUT, 8, 6, n_candidates=(64, 8), n_rounds=1)
IQ1_S = point_format(Type.IQ1_S, _IQ1_S_BLOCKS, _IQ1_S_EFFORTS)
IQ1_M = point_format(Type.IQ1_M, _IQ1_M_BLOCKS, _IQ1_M_EFFORTS)
