"""Q4_0 and Q5_0: 32 weights with one scale. A weight is d * (code - offset).

Q4_0, ggml's block_q4_0: 18 bytes, 4.5 bits per weight, offset 8
    d     2     float16, of either sign
    qs   16     byte l: code of weight l in the low nibble, of weight 16 + l in the high one

Q5_0, ggml's block_q5_0: 22 bytes, 5.5 bits per weight, offset 16
    d     2     float16, of either sign
    qh    4     bit j, little endian: the code's fifth bit of weight j
    qs   16     the codes' lower four bits, as Q4_0
"""

import numpy as np
from gguf import GGMLQuantizationType as Type

from bitwright.formats.block_format import scalar_format
from bitwright.formats.choices import Effort
from bitwright.formats.encoding import to_blocks
from bitwright.formats.kernels.scale_search import search_blocks
from bitwright.formats.packing import pack_bits, pack_half, unpack_bits, unpack_half
from bitwright.formats.parts import ScalarBlocks, ScalarParts, integers, single_scale

BLOCK_SIZE = 32


def _peak_codes(offset: int, n: int, widest: float, narrowest: float) -> np.ndarray:
    """Trial codes of a block's largest weight: n about the negative end, n about the positive one, as shares of it.

    The end itself, ggml's choice, is among them, so that no block comes out worse than there."""
    shares = np.geomspace(widest, narrowest, n, dtype=np.float32)
    shares[np.abs(shares - 1).argmin()] = 1
    return offset * np.concatenate([-shares, shares])


# Effort: trial codes of the largest weight, refits of the best. Where other weights matter more than the largest one,
# it may be cut down to less than half; and a scale that leaves codes unused may happen to fit.
def _effort(offset: int, effort: Effort) -> tuple[np.ndarray, int]:
    if effort == "fast":
        return _peak_codes(offset, 24, 0.7, 1.6), 1
    return _peak_codes(offset, 48, 0.6, 2.2), 2


def _search(rows: np.ndarray, importance: np.ndarray | None, effort: Effort, of: ScalarBlocks) -> ScalarParts:
    blocks, weights = to_blocks(rows, importance, BLOCK_SIZE)
    scales, codes = np.empty(len(blocks), np.float32), np.empty(blocks.shape, np.int8)
    bottom, top = np.float32(of.levels[0]), np.float32(of.levels[-1])
    search_blocks(blocks, weights, bottom, top, *_effort(-int(bottom), effort), (scales, codes))
    return single_scale(scales[:, None], codes)


def _unpack_q4_0(blocks: np.ndarray) -> ScalarParts:
    codes = unpack_bits(blocks[:, 2:], 4, 16)
    return single_scale(unpack_half(blocks[:, :2]), codes.view(np.int8) - np.int8(8))


def _pack_q4_0(parts: ScalarParts) -> np.ndarray:
    codes = (parts.levels + np.int8(8)).view(np.uint8)
    return np.concatenate([pack_half(parts.units[:, 0]), pack_bits(codes, 4, 16)], axis=1)


def _unpack_q5_0(blocks: np.ndarray) -> ScalarParts:
    codes = unpack_bits(blocks[:, 6:], 4, 16) | np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little") << 4
    return single_scale(unpack_half(blocks[:, :2]), codes.view(np.int8) - np.int8(16))


def _pack_q5_0(parts: ScalarParts) -> np.ndarray:
    codes = (parts.levels + np.int8(16)).view(np.uint8)
    qh = np.packbits(codes >> 4, axis=1, bitorder="little")
    return np.concatenate([pack_half(parts.units[:, 0]), qh, pack_bits(codes & 15, 4, 16)], axis=1)


_Q4_0_BLOCKS = ScalarBlocks(BLOCK_SIZE, 18, _unpack_q4_0, _pack_q4_0, integers(-8, 7))
_Q5_0_BLOCKS = ScalarBlocks(BLOCK_SIZE, 22, _unpack_q5_0, _pack_q5_0, integers(-16, 15))
Q4_0, Q5_0 = scalar_format(Type.Q4_0, _Q4_0_BLOCKS, _search), scalar_format(Type.Q5_0, _Q5_0_BLOCKS, _search)
