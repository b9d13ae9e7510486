"""Q2_K, ggml's block_q2_K: 16 sub-blocks of 16 weights, each with a 4-bit scale and a 4-bit minimum.

256 weights in 84 bytes, 2.625 bits per weight. A weight is d * scale * code - dmin * minimum, with a code of 2 bits.

    scales   16     byte i: scale of sub-block i in the low nibble, its minimum in the high one
    qs       64     byte 32 h + l: codes of weights 128 h + l + 0, 32, 64, 96 at bits 0, 2, 4, 6
    d         2     float16, unit of the scales
    dmin      2     float16, unit of the minima
"""

import numpy as np

from formats.block_format import Effort
from formats.encoding import to_blocks
from formats.parts import ScalarBlocks, ScalarParts, integers
from formats.scale_min_search import clip_grid, neighbour_grid, search_super_blocks

BLOCK_SIZE, TYPE_SIZE = 256, 84
N_SUB_BLOCKS = 16
TOP_CODE, TOP_SCALE = np.float32(3), np.float32(15)
SHIFTS = np.array([0, 2, 4, 6], np.uint8)[:, None]

# Trial ranges of a sub-block, stored scales and minima tried around its optimum, codes that the largest scale and the
# largest minimum are tried on, fits of each trial range, refits of d and dmin.
_NINE_PAIRS = np.array([(scale, minimum) for scale in (15, 13, 11) for minimum in (15, 13, 11)], np.float32)
_EFFORTS = {
    "best": (clip_grid(8, 8, widest=-1, narrowest=1.2), neighbour_grid(4, 4), _NINE_PAIRS, 1, 2),
    "fast": (clip_grid(4, 4, widest=-0.5, narrowest=1), neighbour_grid(4, 4), _NINE_PAIRS[:1], 1, 1),
}


def encode(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    blocks, weights = to_blocks(rows, importance, BLOCK_SIZE)
    steps = np.empty((len(blocks), 2), np.float32)
    scales = np.empty((len(blocks), 2, N_SUB_BLOCKS), np.uint8)
    codes = np.empty(blocks.shape, np.uint8)
    search_super_blocks(blocks, weights, TOP_CODE, TOP_SCALE, *_EFFORTS[effort], (steps, scales, codes))
    return _close(ScalarParts(steps, scales.astype(np.int16), codes.view(np.int8))).reshape(len(rows), -1)


def decode(data: np.ndarray) -> np.ndarray:
    units, scales, levels = _open(data)
    d, dmin = units.T[:, :, None]
    codes = levels.reshape(-1, N_SUB_BLOCKS, 16)
    rows = (d * scales[:, 0])[:, :, None] * codes - (dmin * scales[:, 1])[:, :, None]
    return rows.reshape(len(data), -1)


def _open(data: np.ndarray) -> ScalarParts:
    blocks = data.reshape(-1, TYPE_SIZE)
    units = np.ascontiguousarray(blocks[:, 80:]).view("<f2").astype(np.float32)
    scales = np.stack([blocks[:, :16] & 15, blocks[:, :16] >> 4], axis=1).astype(np.int16)
    codes = (blocks[:, 16:80].reshape(-1, 2, 1, 32) >> SHIFTS & 3).reshape(-1, BLOCK_SIZE)
    return ScalarParts(units, scales, codes.view(np.int8))


def _close(parts: ScalarParts) -> np.ndarray:
    header = (parts.scales[:, 0] | parts.scales[:, 1] << 4).astype(np.uint8)
    codes = parts.levels.view(np.uint8).reshape(-1, 2, 4, 32)
    qs = np.bitwise_or.reduce(codes << SHIFTS, axis=2).reshape(-1, 64)
    return np.concatenate([header, qs, parts.units.astype("<f2").view(np.uint8)], axis=1)


_TABLE = np.arange(TOP_SCALE + 1, dtype=np.float32)
BLOCKS = ScalarBlocks(integers(0, int(TOP_CODE)), N_SUB_BLOCKS, _TABLE, _TABLE, _open, _close)
