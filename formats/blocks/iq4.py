"""IQ4_NL and IQ4_XS: four-bit codes of 16 levels from -127 to 113 that lie closer about zero.

IQ4_NL, ggml's block_iq4_nl: 32 weights in 18 bytes, 4.5 bits per weight. A weight is d * level.
    d     2     float16, of either sign
    qs   16     byte l: code of weight l in the low nibble, of weight 16 + l in the high one

IQ4_XS, ggml's block_iq4_xs: 256 weights in 136 bytes, 4.25 bits per weight; 8 sub-blocks of 32 weights with a 6-bit
scale each. A weight is d * (scale - 32) * level.
    d           2     float16, of either sign
    scales_h    2     bits 2 i and 2 i + 1, little endian: the upper two bits of scale i
    scales_l    4     byte i: the lower four bits of scale 2 i in the low nibble, of scale 2 i + 1 in the high one
    qs        128     16 bytes a sub-block, as IQ4_NL
"""

import numpy as np
from gguf import GGMLQuantizationType as Type

from bitwright.formats.block_format import scalar_format
from bitwright.formats.choices import Effort
from bitwright.formats.encoding import to_blocks
from bitwright.formats.kernels.level_search import LEVELS, search_blocks, search_super_blocks
from bitwright.formats.packing import pack_bits, pack_half, unpack_bits, unpack_half
from bitwright.formats.parts import ScalarBlocks, ScalarParts, scaled_sub_blocks, single_scale

SCALE_OFFSET = 32
_LEVELS = LEVELS.astype(np.int8)
# By the bits of a level.
_CODES = np.zeros(256, np.uint8)
_CODES[_LEVELS.view(np.uint8)] = np.arange(len(_LEVELS))


def _inwards(end: float, n: int, narrowest: float = 0.5) -> np.ndarray:
    """n numbers from a little beyond `end` to that share of it."""
    return np.float32(end) * np.geomspace(1.03, narrowest, n, dtype=np.float32)


def _either_side(low: float, high: float, n: int, narrowest: float = 0.5) -> np.ndarray:
    return np.concatenate([_inwards(low, n, narrowest), _inwards(high, n, narrowest)])


_BOTTOM, _TOP = LEVELS[0], LEVELS[-1]
# Effort: trial levels of a block's largest weight, refits of each.
_IQ4_NL_EFFORTS = {"best": (_either_side(_BOTTOM, _TOP, 8), 5), "fast": (_either_side(_BOTTOM, _TOP, 8, 0.6), 1)}
# Effort: trial levels of a sub-block's largest weight, trial codes of the largest scale, refits of the best d.
_IQ4_XS_EFFORTS = {
    "best": (_either_side(_BOTTOM, _TOP, 16), _either_side(-32, 31, 128), 2),
    "fast": (_either_side(_BOTTOM, _TOP, 8, 0.6), _inwards(-32, 16), 0),
}


def _search_iq4_nl(rows: np.ndarray, importance: np.ndarray | None, effort: Effort, of: ScalarBlocks) -> ScalarParts:
    blocks, weights = to_blocks(rows, importance, of.block_size)
    scales, levels = np.empty(len(blocks), np.float32), np.empty(blocks.shape, np.int8)
    search_blocks(blocks, weights, *_IQ4_NL_EFFORTS[effort], (scales, levels))
    return single_scale(scales[:, None], levels)


def _search_iq4_xs(rows: np.ndarray, importance: np.ndarray | None, effort: Effort, of: ScalarBlocks) -> ScalarParts:
    blocks, weights = to_blocks(rows, importance, of.block_size)
    d, levels = np.empty(len(blocks), np.float32), np.empty(blocks.shape, np.int8)
    scales = np.empty((len(blocks), of.n_sub), np.int8)
    search_super_blocks(blocks, weights, *_IQ4_XS_EFFORTS[effort], (d, scales, levels))
    return scaled_sub_blocks(d, scales + np.int8(SCALE_OFFSET), levels)


def _unpack_iq4_nl(blocks: np.ndarray) -> ScalarParts:
    return single_scale(unpack_half(blocks[:, :2]), _LEVELS[unpack_bits(blocks[:, 2:], 4, 16)])


def _pack_iq4_nl(parts: ScalarParts) -> np.ndarray:
    return np.concatenate([pack_half(parts.units[:, 0]), pack_bits(_CODES[parts.levels.view(np.uint8)], 4, 16)], axis=1)


def _unpack_iq4_xs(blocks: np.ndarray) -> ScalarParts:
    scales = unpack_bits(blocks[:, 4:8], 4) | unpack_bits(blocks[:, 2:4], 2) << 4
    return scaled_sub_blocks(unpack_half(blocks[:, :2])[:, 0], scales, _LEVELS[unpack_bits(blocks[:, 8:], 4, 16)])


def _pack_iq4_xs(parts: ScalarParts) -> np.ndarray:
    scales = parts.scales[:, 0].astype(np.uint8)
    scales_h, scales_l = pack_bits(scales >> 4, 2), pack_bits(scales & 15, 4)
    qs = pack_bits(_CODES[parts.levels.view(np.uint8)], 4, 16)
    return np.concatenate([pack_half(parts.units[:, 0]), scales_h, scales_l, qs], axis=1)


_TABLE = np.arange(-SCALE_OFFSET, SCALE_OFFSET, dtype=np.float32)
_IQ4_NL_BLOCKS = ScalarBlocks(32, 18, _unpack_iq4_nl, _pack_iq4_nl, _LEVELS)
_IQ4_XS_BLOCKS = ScalarBlocks(256, 136, _unpack_iq4_xs, _pack_iq4_xs, _LEVELS, 8, _TABLE)
IQ4_NL = scalar_format(Type.IQ4_NL, _IQ4_NL_BLOCKS, _search_iq4_nl)
IQ4_XS = scalar_format(Type.IQ4_XS, _IQ4_XS_BLOCKS, _search_iq4_xs)
