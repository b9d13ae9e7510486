"""Q8_0, ggml's block_q8_0: 32 weights in 34 bytes, 8.5 bits per weight. A weight is d * code.

d     2     float16
qs   32     int8 codes, -127 .. 127; -128 decodes but is not written, as runtimes negate codes
"""

import numpy as np

from formats.block_format import Effort
from formats.encoding import to_blocks
from formats.scale_search import search_blocks

BLOCK_SIZE, TYPE_SIZE = 32, 34
BOTTOM, TOP = np.float32(-127), np.float32(127)

# The codes that a block's largest weight is tried on: at the end of the range, and a little beyond it.
_TRIALS = {
    "best": np.concatenate([[127], np.linspace(126.6, 131, 15)]).astype(np.float32),
    "fast": np.linspace(127, 128.4, 8, dtype=np.float32),
}


def encode(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    blocks, weights = to_blocks(rows, importance, BLOCK_SIZE)
    scales, codes = np.empty(len(blocks), np.float32), np.empty(blocks.shape, np.int8)
    search_blocks(blocks, weights, BOTTOM, TOP, _TRIALS[effort], 0, (scales, codes))
    d = scales.astype("<f2").view(np.uint8).reshape(-1, 2)
    return np.concatenate([d, codes.view(np.uint8)], axis=1).reshape(len(rows), -1)


def decode(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(-1, TYPE_SIZE)
    d = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    return (d * blocks[:, 2:].view(np.int8)).reshape(len(data), -1)
