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
    steps, codes = _search(rows, importance, 15, _Q4_1_EFFORTS[effort])
    return np.concatenate([steps, _pack_nibbles(codes)], axis=1).reshape(len(rows), -1)


def encode_q5_1(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    steps, codes = _search(rows, importance, 31, _Q5_1_EFFORTS[effort])
    qh = np.packbits(codes >> 4, axis=1, bitorder="little")
    return np.concatenate([steps, qh, _pack_nibbles(codes & 15)], axis=1).reshape(len(rows), -1)


def decode_q4_1(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(-1, Q4_1_TYPE_SIZE)
    return _decode(blocks[:, :4], _unpack_nibbles(blocks[:, 4:])).reshape(len(data), -1)


def decode_q5_1(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(-1, Q5_1_TYPE_SIZE)
    high = np.unpackbits(blocks[:, 4:8], axis=1, bitorder="little")
    return _decode(blocks[:, :4], _unpack_nibbles(blocks[:, 8:]) | high << 4).reshape(len(data), -1)


def _search(
    rows: np.ndarray, importance: np.ndarray | None, top_code: int, effort: _Effort
) -> tuple[np.ndarray, np.ndarray]:
    """d and m as bytes, uint8 [n_blocks, 4], and codes uint8 [n_blocks, 32]."""
    blocks, weights = to_blocks(rows, importance, BLOCK_SIZE)
    steps, codes = np.empty((len(blocks), 2), np.float32), np.empty(blocks.shape, np.uint8)
    search_blocks(blocks, weights, np.float32(top_code), *effort, (steps, codes))
    return steps.astype("<f2").view(np.uint8), codes


def _pack_nibbles(codes: np.ndarray) -> np.ndarray:
    return codes[:, :16] | codes[:, 16:] << 4


def _unpack_nibbles(qs: np.ndarray) -> np.ndarray:
    return np.concatenate([qs & 15, qs >> 4], axis=1)


def _decode(steps: np.ndarray, codes: np.ndarray) -> np.ndarray:
    d, m = np.ascontiguousarray(steps).view("<f2").astype(np.float32).T[:, :, None]
    return d * codes + m
