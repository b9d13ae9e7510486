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

import numpy as np

from formats.block_format import Effort
from formats.encoding import to_blocks
from formats.iq_packing import pack_half, unpack_half
from formats.parts import ONE_VALUE, ScalarBlocks, ScalarParts, integers, single_scale
from formats.scale_min_search import clip_grid, neighbour_grid, search_blocks

BLOCK_SIZE = 32
Q4_1_TYPE_SIZE, Q5_1_TYPE_SIZE = 20, 24

# Trial ranges of a block, float16 neighbours tried around the optimum, fits of each trial.
_Effort = tuple[np.ndarray, np.ndarray, int]
_Q4_1_EFFORTS: dict[Effort, _Effort] = {
    "best": (clip_grid(8, 8, widest=-2), neighbour_grid(4, 4), 2),
    "fast": (clip_grid(8, 8, widest=-1), neighbour_grid(4, 4), 1),
}
# The more codes, the more of them may be left unused where a scale happens to fit.
_Q5_1_EFFORTS: dict[Effort, _Effort] = {
    "best": (clip_grid(8, 8, widest=-3, narrowest=1.5), neighbour_grid(4, 4), 2),
    "fast": (clip_grid(8, 8, widest=-2), neighbour_grid(4, 4), 1),
}


def encode_q4_1(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    return _close_q4_1(_search(rows, importance, 15, _Q4_1_EFFORTS[effort])).reshape(len(rows), -1)


def encode_q5_1(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    return _close_q5_1(_search(rows, importance, 31, _Q5_1_EFFORTS[effort])).reshape(len(rows), -1)


def decode_q4_1(data: np.ndarray) -> np.ndarray:
    return _decode(_open_q4_1(data)).reshape(len(data), -1)


def decode_q5_1(data: np.ndarray) -> np.ndarray:
    return _decode(_open_q5_1(data)).reshape(len(data), -1)


def _search(rows: np.ndarray, importance: np.ndarray | None, top_code: int, effort: _Effort) -> ScalarParts:
    blocks, weights = to_blocks(rows, importance, BLOCK_SIZE)
    steps, codes = np.empty((len(blocks), 2), np.float32), np.empty(blocks.shape, np.uint8)
    search_blocks(blocks, weights, np.float32(top_code), *effort, (steps, codes))
    return single_scale(steps[:, :1], codes.view(np.int8), steps[:, 1:])


def _open_q4_1(data: np.ndarray) -> ScalarParts:
    blocks = data.reshape(-1, Q4_1_TYPE_SIZE)
    codes = _unpack_nibbles(blocks[:, 4:])
    return single_scale(unpack_half(blocks[:, :2]), codes.view(np.int8), unpack_half(blocks[:, 2:4]))


def _close_q4_1(parts: ScalarParts) -> np.ndarray:
    return np.concatenate([_pack_steps(parts), _pack_nibbles(parts.levels.view(np.uint8))], axis=1)


def _open_q5_1(data: np.ndarray) -> ScalarParts:
    blocks = data.reshape(-1, Q5_1_TYPE_SIZE)
    codes = _unpack_nibbles(blocks[:, 8:]) | np.unpackbits(blocks[:, 4:8], axis=1, bitorder="little") << 4
    return single_scale(unpack_half(blocks[:, :2]), codes.view(np.int8), unpack_half(blocks[:, 2:4]))


def _close_q5_1(parts: ScalarParts) -> np.ndarray:
    codes = parts.levels.view(np.uint8)
    qh = np.packbits(codes >> 4, axis=1, bitorder="little")
    return np.concatenate([_pack_steps(parts), qh, _pack_nibbles(codes & 15)], axis=1)


def _pack_steps(parts: ScalarParts) -> np.ndarray:
    """d and m, uint8 [n_blocks, 4]."""
    return pack_half(parts.units * np.array([1, -1], np.float32)).reshape(-1, 4)


def _pack_nibbles(codes: np.ndarray) -> np.ndarray:
    return codes[:, :16] | codes[:, 16:] << 4


def _unpack_nibbles(qs: np.ndarray) -> np.ndarray:
    return np.concatenate([qs & 15, qs >> 4], axis=1)


def _decode(parts: ScalarParts) -> np.ndarray:
    return parts.units[:, :1] * parts.levels - parts.units[:, 1:]


Q4_1_BLOCKS = ScalarBlocks(integers(0, 15), 1, ONE_VALUE, ONE_VALUE, _open_q4_1, _close_q4_1)
Q5_1_BLOCKS = ScalarBlocks(integers(0, 31), 1, ONE_VALUE, ONE_VALUE, _open_q5_1, _close_q5_1)
