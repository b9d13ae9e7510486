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

from formats.block_format import Effort
from formats.encoding import to_blocks
from formats.iq4_search import LEVELS, search_blocks, search_super_blocks
from formats.iq_packing import pack_half, unpack_half
from formats.parts import NO_MINIMUM, ONE_VALUE, ScalarBlocks, ScalarParts, single_scale

IQ4_NL_BLOCK_SIZE, IQ4_NL_TYPE_SIZE = 32, 18
IQ4_XS_BLOCK_SIZE, IQ4_XS_TYPE_SIZE = 256, 136
N_SUB_BLOCKS, SCALE_OFFSET = 8, 32
SCALE_SHIFTS = 2 * np.arange(N_SUB_BLOCKS, dtype=np.uint16)
_LEVELS = LEVELS.astype(np.int8)


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


def encode_iq4_nl(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    blocks, weights = to_blocks(rows, importance, IQ4_NL_BLOCK_SIZE)
    scales, codes = np.empty(len(blocks), np.float32), np.empty(blocks.shape, np.uint8)
    search_blocks(blocks, weights, *_IQ4_NL_EFFORTS[effort], (scales, codes))
    return _pack_iq4_nl(scales, codes).reshape(len(rows), -1)


def encode_iq4_xs(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    blocks, weights = to_blocks(rows, importance, IQ4_XS_BLOCK_SIZE)
    d, codes = np.empty(len(blocks), np.float32), np.empty(blocks.shape, np.uint8)
    scales = np.empty((len(blocks), N_SUB_BLOCKS), np.int8)
    search_super_blocks(blocks, weights, *_IQ4_XS_EFFORTS[effort], (d, scales, codes))
    return _pack_iq4_xs(d, (scales + np.int8(SCALE_OFFSET)).astype(np.uint16), codes).reshape(len(rows), -1)


def decode_iq4_nl(data: np.ndarray) -> np.ndarray:
    parts = _open_iq4_nl(data)
    return (parts.units[:, :1] * parts.levels).reshape(len(data), -1)


def decode_iq4_xs(data: np.ndarray) -> np.ndarray:
    parts = _open_iq4_xs(data)
    scales = parts.units[:, :1] * (parts.scales[:, 0] - np.int16(SCALE_OFFSET))
    return (scales[:, :, None] * parts.levels.reshape(-1, N_SUB_BLOCKS, 32)).reshape(len(data), -1)


def _open_iq4_nl(data: np.ndarray) -> ScalarParts:
    blocks = data.reshape(-1, IQ4_NL_TYPE_SIZE)
    return single_scale(unpack_half(blocks[:, :2]), _LEVELS[_unpack_nibbles(blocks[:, 2:])])


def _close_iq4_nl(parts: ScalarParts) -> np.ndarray:
    return _pack_iq4_nl(parts.units[:, 0], _codes_of(parts.levels))


def _pack_iq4_nl(d: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return np.concatenate([pack_half(d), _pack_nibbles(codes)], axis=1)


def _open_iq4_xs(data: np.ndarray) -> ScalarParts:
    blocks = data.reshape(-1, IQ4_XS_TYPE_SIZE)
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, N_SUB_BLOCKS)
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> SCALE_SHIFTS & 3
    units, scales = np.zeros((len(blocks), 2), np.float32), np.zeros((len(blocks), 2, N_SUB_BLOCKS), np.int16)
    units[:, :1], scales[:, 0] = unpack_half(blocks[:, :2]), low | high << 4
    levels = _LEVELS[_unpack_nibbles(blocks[:, 8:].reshape(-1, 16))]
    return ScalarParts(units, scales, levels.reshape(-1, IQ4_XS_BLOCK_SIZE))


def _close_iq4_xs(parts: ScalarParts) -> np.ndarray:
    return _pack_iq4_xs(parts.units[:, 0], parts.scales[:, 0].astype(np.uint16), _codes_of(parts.levels))


def _pack_iq4_xs(d: np.ndarray, stored: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """stored: scale + SCALE_OFFSET, uint16 [n_blocks, 8]; codes: uint8 [n_blocks, 256]."""
    scales_h = np.bitwise_or.reduce(stored >> 4 << SCALE_SHIFTS, axis=1, keepdims=True).astype("<u2").view(np.uint8)
    scales_l = (stored[:, 0::2] & 15 | (stored[:, 1::2] & 15) << 4).astype(np.uint8)
    qs = _pack_nibbles(codes.reshape(-1, 32)).reshape(len(codes), -1)
    return np.concatenate([pack_half(d), scales_h, scales_l, qs], axis=1)


def _codes_of(levels: np.ndarray) -> np.ndarray:
    return np.searchsorted(_LEVELS, levels).astype(np.uint8)


def _pack_nibbles(codes: np.ndarray) -> np.ndarray:
    return codes[:, :16] | codes[:, 16:] << 4


def _unpack_nibbles(qs: np.ndarray) -> np.ndarray:
    return np.concatenate([qs & 15, qs >> 4], axis=1)


_TABLE = np.arange(-SCALE_OFFSET, SCALE_OFFSET, dtype=np.float32)
IQ4_NL_BLOCKS = ScalarBlocks(_LEVELS, 1, ONE_VALUE, NO_MINIMUM, _open_iq4_nl, _close_iq4_nl)
IQ4_XS_BLOCKS = ScalarBlocks(_LEVELS, N_SUB_BLOCKS, _TABLE, NO_MINIMUM, _open_iq4_xs, _close_iq4_xs)
