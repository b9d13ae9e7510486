"""Q4_1 and Q5_1: 32 weights with a scale and a minimum. A weight is d * code + m.

Q4_1, ggml's block_q4_1: 20 bytes, 5 bits per weight
    d     2     float16
    m     2     float16
    qs   16     byte l: code of weight l in the low nibble, of weight 16 + l in the high one

Q5_1, ggml's block_q5_1: 24 bytes, 6 bits per weight
    d     2     float16
    m     2     float16
    qh    4     bit j, little endian: the code's fifth bit of weight j
    qs   16     the codes' lower four bits, as Q4_1
"""

from functools import partial

import numpy as np
from gguf import GGMLQuantizationType as Type

from bitwright.formats.block_format import scalar_format
from bitwright.formats.choices import Effort
from bitwright.formats.encoding import to_blocks
from bitwright.formats.kernels.scale_min_search import BlockEffort, clip_grid, neighbour_grid, search_blocks
from bitwright.formats.packing import pack_bits, pack_half, unpack_bits, unpack_half
from bitwright.formats.parts import ONE_VALUE, ScalarBlocks, ScalarParts, integers, single_scale

BLOCK_SIZE = 32

_Q4_1_EFFORTS: dict[Effort, BlockEffort] = {
    "best": BlockEffort(clip_grid(8, 8, widest=-2), neighbour_grid(4, 4), 2),
    "fast": BlockEffort(clip_grid(8, 8, widest=-1), neighbour_grid(4, 4), 1),
}
# The more codes, the more of them may be left unused where a scale happens to fit.
_Q5_1_EFFORTS: dict[Effort, BlockEffort] = {
    "best": BlockEffort(clip_grid(8, 8, widest=-3, narrowest=1.5), neighbour_grid(4, 4), 2),
    "fast": BlockEffort(clip_grid(8, 8, widest=-2), neighbour_grid(4, 4), 1),
}


def _search(
    rows: np.ndarray,
    importance: np.ndarray | None,
    effort: Effort,
    of: ScalarBlocks,
    efforts: dict[Effort, BlockEffort],
) -> ScalarParts:
    blocks, weights = to_blocks(rows, importance, BLOCK_SIZE)
    steps, codes = np.empty((len(blocks), 2), np.float32), np.empty(blocks.shape, np.uint8)
    search_blocks(blocks, weights, np.float32(of.levels[-1]), efforts[effort], (steps, codes))
    return single_scale(steps[:, :1], codes.view(np.int8), steps[:, 1:])


def _unpack_q4_1(blocks: np.ndarray) -> ScalarParts:
    return _parts(blocks, unpack_bits(blocks[:, 4:], 4, 16))


def _pack_q4_1(parts: ScalarParts) -> np.ndarray:
    return np.concatenate([_pack_steps(parts), pack_bits(parts.levels.view(np.uint8), 4, 16)], axis=1)


def _unpack_q5_1(blocks: np.ndarray) -> ScalarParts:
    high = np.unpackbits(blocks[:, 4:8], axis=1, bitorder="little")
    return _parts(blocks, unpack_bits(blocks[:, 8:], 4, 16) | high << 4)


def _pack_q5_1(parts: ScalarParts) -> np.ndarray:
    codes = parts.levels.view(np.uint8)
    qh = np.packbits(codes >> 4, axis=1, bitorder="little")
    return np.concatenate([_pack_steps(parts), qh, pack_bits(codes & 15, 4, 16)], axis=1)


def _parts(blocks: np.ndarray, codes: np.ndarray) -> ScalarParts:
    return single_scale(unpack_half(blocks[:, :2]), codes.view(np.int8), unpack_half(blocks[:, 2:4]))


def _pack_steps(parts: ScalarParts) -> np.ndarray:
    """d and m, uint8 [n_blocks, 4]."""
    return pack_half(parts.units * np.array([1, -1], np.float32))


_Q4_1_BLOCKS = ScalarBlocks(BLOCK_SIZE, 20, _unpack_q4_1, _pack_q4_1, integers(0, 15), minimum_table=ONE_VALUE)
_Q5_1_BLOCKS = ScalarBlocks(BLOCK_SIZE, 24, _unpack_q5_1, _pack_q5_1, integers(0, 31), minimum_table=ONE_VALUE)
Q4_1 = scalar_format(Type.Q4_1, _Q4_1_BLOCKS, partial(_search, efforts=_Q4_1_EFFORTS))
Q5_1 = scalar_format(Type.Q5_1, _Q5_1_BLOCKS, partial(_search, efforts=_Q5_1_EFFORTS))
