"""IQ2_XXS, IQ2_XS and IQ2_S: 32 groups of 8 weights; a group is a scale times a point of a grid, with signs.

The grids have 256, 512 and 1024 points with coordinates 8, 25 and 43 (gguf.quants). A weight is
d * (scale + 0.5) * 0.25 * coordinate, with a sign. In IQ2_XXS and IQ2_XS the number of minus signs of a group is even,
and the eighth sign is not stored. All blocks have 256 weights.

IQ2_XXS, ggml's block_iq2_xxs: 66 bytes, 2.0625 bits per weight; a 4-bit scale for 32 weights
    d        2     float16
    qs      64     8 bytes for 32 weights: 4 point indices; 32 bits, little endian, 4 x 7 signs and the scale

IQ2_XS, ggml's block_iq2_xs: 74 bytes, 2.3125 bits per weight; a 4-bit scale for 16 weights
    d        2     float16
    qs      64     16 bits a group, little endian: point index in the lower 9, 7 signs above
    scales   8     byte i: scale of sub-block 2 i in the low nibble, of 2 i + 1 in the high one

IQ2_S, ggml's block_iq2_s: 82 bytes, 2.5625 bits per weight; a 4-bit scale for 16 weights
    d        2     float16
    qs      32     lower 8 bits of each group's point index
    signs   32     a byte a group, bit j set where weight j is negative
    qh       8     upper two bits of the point indices, the first group's lowest
    scales   8     as IQ2_XS
"""

import numpy as np
from gguf import GGMLQuantizationType as Type

from bitwright.formats.codebooks.kernels import FREE, PARITY
from bitwright.formats.codebooks.packing import EVEN_BYTES, pack_signs_and_scales, unpack_signs_and_scales
from bitwright.formats.codebooks.search import point_format, search_efforts
from bitwright.formats.packing import pack_bits, pack_half, unpack_bits, unpack_half
from bitwright.formats.parts import Layout, PointBlocks, PointParts


def _pack_iq2_xxs(parts: PointParts) -> np.ndarray:
    d, scales, indices, signs = parts
    words = pack_signs_and_scales(signs, scales)[:, :, None]
    qs = np.concatenate([indices.astype(np.uint8).reshape(-1, 8, 4), words.view(np.uint8)], axis=2)
    return np.concatenate([pack_half(d), qs.reshape(-1, 64)], axis=1)


def _unpack_iq2_xxs(blocks: np.ndarray) -> PointParts:
    qs = np.ascontiguousarray(blocks[:, 2:]).reshape(-1, 8, 8)
    signs, scales = unpack_signs_and_scales(np.ascontiguousarray(qs[:, :, 4:]).view("<u4")[:, :, 0])
    return _parts(blocks, scales, qs[:, :, :4].reshape(-1, 32), signs)


def _pack_iq2_xs(parts: PointParts) -> np.ndarray:
    d, scales, indices, signs = parts
    qs = (indices | (signs & 127).astype(np.uint16) << 9).astype("<u2").view(np.uint8)
    return np.concatenate([pack_half(d), qs, pack_bits(scales, 4)], axis=1)


def _unpack_iq2_xs(blocks: np.ndarray) -> PointParts:
    qs = np.ascontiguousarray(blocks[:, 2:66]).view("<u2")
    return _parts(blocks, unpack_bits(blocks[:, 66:], 4), qs & 511, EVEN_BYTES[qs >> 9])


def _pack_iq2_s(parts: PointParts) -> np.ndarray:
    d, scales, indices, signs = parts
    qs, qh = indices.astype(np.uint8), pack_bits((indices >> 8).astype(np.uint8), 2)
    return np.concatenate([pack_half(d), qs, signs, qh, pack_bits(scales, 4)], axis=1)


def _unpack_iq2_s(blocks: np.ndarray) -> PointParts:
    indices = blocks[:, 2:34] | unpack_bits(blocks[:, 66:74], 2).astype(np.uint16) << 8
    signs = np.ascontiguousarray(blocks[:, 34:66])
    return _parts(blocks, unpack_bits(blocks[:, 74:], 4), indices, signs)


def _parts(blocks: np.ndarray, scales: np.ndarray, indices: np.ndarray, signs: np.ndarray) -> PointParts:
    return PointParts(unpack_half(blocks[:, :2])[:, 0], scales, indices.astype(np.uint16), signs)


_TOP_CODE, _UNIT = np.float32(15), np.float32(1 / 8)
IQ2_XXS_LAYOUT = Layout(PARITY, 1, 1, 8, _TOP_CODE, _UNIT)
IQ2_XS_LAYOUT = Layout(PARITY, 1, 1, 16, _TOP_CODE, _UNIT)
IQ2_S_LAYOUT = Layout(FREE, 1, 1, 16, _TOP_CODE, _UNIT)
_IQ2_XXS_BLOCKS = PointBlocks(256, 66, _unpack_iq2_xxs, _pack_iq2_xxs, "IQ2_XXS", IQ2_XXS_LAYOUT)
_IQ2_XS_BLOCKS = PointBlocks(256, 74, _unpack_iq2_xs, _pack_iq2_xs, "IQ2_XS", IQ2_XS_LAYOUT)
_IQ2_S_BLOCKS = PointBlocks(256, 82, _unpack_iq2_s, _pack_iq2_s, "IQ2_S", IQ2_S_LAYOUT)
_IQ2_XXS_EFFORTS = search_efforts(IQ2_XXS_LAYOUT, 43, 6, n_candidates=(64, 16), n_rounds=2)
_IQ2_XS_EFFORTS = search_efforts(IQ2_XS_LAYOUT, 43, 6, n_candidates=(64, 16), n_rounds=2)
_IQ2_S_EFFORTS = search_efforts(IQ2_S_LAYOUT, 43, 6, n_candidates=(64, 8), n_rounds=1)
IQ2_XXS = point_format(Type.IQ2_XXS, _IQ2_XXS_BLOCKS, _IQ2_XXS_EFFORTS)
IQ2_XS = point_format(Type.IQ2_XS, _IQ2_XS_BLOCKS, _IQ2_XS_EFFORTS)
IQ2_S = point_format(Type.IQ2_S, _IQ2_S_BLOCKS, _IQ2_S_EFFORTS)
