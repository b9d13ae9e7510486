"""Q1_0: 128 weights with one scale and a sign each. A weight is d or -d.

ggml's block_q1_0: 18 bytes, 1.125 bits per weight
    d     2     float16
    qs   16     bit j, little endian: weight j is d where it is set, -d where it is not

The signs are those of the weights; then the best d is the weighted mean of the magnitudes, so there is nothing to
search, and both efforts are the same.
"""

import numpy as np

from formats.block_format import Effort
from formats.compiler import njit
from formats.encoding import to_blocks
from formats.iq_packing import pack_half, unpack_half
from formats.parts import NO_MINIMUM, ONE_VALUE, ScalarBlocks, ScalarParts, single_scale

BLOCK_SIZE, TYPE_SIZE = 128, 18

ZERO = np.float32(0)
F16_MAX = np.float32(65504)


def encode(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    blocks, weights = to_blocks(rows, importance, BLOCK_SIZE)
    means = np.empty(len(blocks), np.float32)
    mean_magnitudes(blocks, weights, means)
    return _pack(np.minimum(means, F16_MAX), blocks >= 0).reshape(len(rows), -1)


def decode(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(-1, TYPE_SIZE)
    d = unpack_half(blocks[:, :2])
    return np.where(np.unpackbits(blocks[:, 2:], axis=1, bitorder="little"), d, -d).reshape(len(data), -1)


def _open(data: np.ndarray) -> ScalarParts:
    blocks = data.reshape(-1, TYPE_SIZE)
    signs = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").view(np.int8)
    return single_scale(unpack_half(blocks[:, :2]), 2 * signs - np.int8(1))


def _close(parts: ScalarParts) -> np.ndarray:
    return _pack(parts.units[:, 0], parts.levels > 0)


def _pack(d: np.ndarray, positive: np.ndarray) -> np.ndarray:
    return np.concatenate([pack_half(d), np.packbits(positive, axis=1, bitorder="little")], axis=1)


BLOCKS = ScalarBlocks(np.array([-1, 1], np.int8), 1, ONE_VALUE, NO_MINIMUM, _open, _close)


@njit(nogil=True, cache=True, error_model="numpy")
def mean_magnitudes(blocks, weights, means):
    """means[b]: the weighted mean of |x|; infinity where the sum leaves float32.

    blocks float32 [n_blocks, block_size], weights float32 [blocks_per_row, block_size], means float32 [n_blocks].
    """
    for b in range(blocks.shape[0]):
        x, w = blocks[b], weights[b % weights.shape[0]]
        x0, x1, x2, x3, w0, w1, w2, w3 = ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO
        # Four chains, as each sum has to wait for the one before.
        for j in range(0, x.size, 4):
            x0 += w[j] * abs(x[j])
            x1 += w[j + 1] * abs(x[j + 1])
            x2 += w[j + 2] * abs(x[j + 2])
            x3 += w[j + 3] * abs(x[j + 3])
            w0 += w[j]
            w1 += w[j + 1]
            w2 += w[j + 2]
            w3 += w[j + 3]
        means[b] = ((x0 + x1) + (x2 + x3)) / ((w0 + w1) + (w2 + w3))
