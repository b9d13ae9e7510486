"""IQ3_XXS and IQ3_S: 64 groups of 4 weights; a group is a scale times a point of a grid, with signs.

Both have 256 weights a block and a 4-bit scale for 32 of them.

IQ3_XXS, ggml's block_iq3_xxs: 98 bytes, 3.0625 bits per weight. 256 points with coordinates 4, 12, .. 52, 62
(gguf.quants). A weight is d * (scale + 0.5) * 0.5 * coordinate, with a sign; the number of minus signs of 8 weights is
even, and the eighth sign is not stored.
    d        2     float16
    qs      64     point indices
    scales  32     32 bits for 32 weights, little endian: 4 x 7 signs and the scale

IQ3_S, ggml's block_iq3_s: 110 bytes, 3.4375 bits per weight. 512 points with coordinates 1, 3, .. 15 (gguf.quants).
A weight is d * (2 scale + 1) * coordinate, with a sign.
    d        2     float16
    qs      64     lower 8 bits of the point indices
    qh       8     bit g of byte i: the ninth bit of the index of group 8 i + g
    signs   32     bit j of byte k set where weight 8 k + j is negative
    scales   4     byte i: scale of sub-block 2 i in the low nibble, of 2 i + 1 in the high one
"""

import numpy as np
from gguf import GGMLQuantizationType as Type

from bitwright.formats.codebooks.kernels import FREE, PARITY
from bitwright.formats.codebooks.packing import pack_signs_and_scales, unpack_signs_and_scales
from bitwright.formats.codebooks.search import point_format, search_efforts
from bitwright.formats.packing import pack_bits, pack_half, unpack_bits, unpack_half
from bitwright.formats.parts import Layout, PointBlocks, PointParts


def _pack_iq3_xxs(parts: PointParts) -> np.ndarray:
    words = pack_signs_and_scales(pack_bits(parts.signs, 4), parts.scales).view(np.uint8)
    return np.concatenate([pack_half(parts.d), parts.indices.astype(np.uint8), words], axis=1)


def _unpack_iq3_xxs(blocks: np.ndarray) -> PointParts:
    signs, scales = unpack_signs_and_scales(np.ascontiguousarray(blocks[:, 66:]).view("<u4"))
    d, indices = unpack_half(blocks[:, :2])[:, 0], blocks[:, 2:66].astype(np.uint16)
    return PointParts(d, scales, indices, unpack_bits(signs, 4))


def _pack_iq3_s(parts: PointParts) -> np.ndarray:
    d, scales, indices, signs = parts
    qs, qh = indices.astype(np.uint8), np.packbits(indices >> 8, axis=1, bitorder="little")
    return np.concatenate([pack_half(d), qs, qh, pack_bits(signs, 4), pack_bits(scales, 4)], axis=1)


def _unpack_iq3_s(blocks: np.ndarray) -> PointParts:
    high = np.unpackbits(blocks[:, 66:74], axis=1, bitorder="little").astype(np.uint16)
    d, scales = unpack_half(blocks[:, :2])[:, 0], unpack_bits(blocks[:, 106:], 4)
    return PointParts(d, scales, blocks[:, 2:66] | high << 8, unpack_bits(blocks[:, 74:106], 4))


_TOP_CODE = np.float32(15)
# Two groups of 4 share the parity of their signs: both even or both odd.
IQ3_XXS_LAYOUT = Layout(PARITY, 2, 2, 8, _TOP_CODE, np.float32(1 / 4))
IQ3_S_LAYOUT = Layout(FREE, 1, 1, 8, _TOP_CODE, np.float32(1))
_IQ3_XXS_BLOCKS = PointBlocks(256, 98, _unpack_iq3_xxs, _pack_iq3_xxs, "IQ3_XXS", IQ3_XXS_LAYOUT)
_IQ3_S_BLOCKS = PointBlocks(256, 110, _unpack_iq3_s, _pack_iq3_s, "IQ3_S", IQ3_S_LAYOUT)
_IQ3_XXS_EFFORTS = search_efforts(IQ3_XXS_LAYOUT, 62, 3, n_candidates=(32, 16), n_rounds=2)
_IQ3_S_EFFORTS = search_efforts(IQ3_S_LAYOUT, 15, 3, n_candidates=(32, 16), n_rounds=2)
IQ3_XXS = point_format(Type.IQ3_XXS, _IQ3_XXS_BLOCKS, _IQ3_XXS_EFFORTS)
IQ3_S = point_format(Type.IQ3_S, _IQ3_S_BLOCKS, _IQ3_S_EFFORTS, needs_importance=False)
