"""Q1_0: 128 weights with one scale and a sign each. A weight is d or -d.

ggml's block_q1_0: 18 bytes, 1.125 bits per weight
    d     2     float16
    qs   16     bit j, little endian: weight j is d where it is set, -d where it is not

The signs are those of the weights; then the best d is the weighted mean of the magnitudes, so there is nothing to
search, and both efforts are the same.
"""

import numpy as np
from gguf import GGMLQuantizationType as Type

from bitwright.formats.block_format import scalar_format
from bitwright.formats.choices import Effort
from bitwright.formats.compiler import Array, jit
from bitwright.formats.encoding import to_blocks
from bitwright.formats.kernels.float16 import F16_MAX
from bitwright.formats.packing import pack_half, unpack_half
from bitwright.formats.parts import ScalarBlocks, ScalarParts, single_scale

ZERO = np.float32(0)


def _search(rows: np.ndarray, importance: np.ndarray | None, effort: Effort, of: ScalarBlocks) -> ScalarParts:
    blocks, weights = to_blocks(rows, importance, of.block_size)
    means = np.empty(len(blocks), np.float32)
    mean_magnitudes(blocks, weights, means)
    return single_scale(np.minimum(means, F16_MAX)[:, None], _levels(blocks >= 0))


def _unpack(blocks: np.ndarray) -> ScalarParts:
    signs = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
    return single_scale(unpack_half(blocks[:, :2]), _levels(signs))


def _pack(parts: ScalarParts) -> np.ndarray:
    signs = np.packbits(parts.levels > 0, axis=1, bitorder="little")
    return np.concatenate([pack_half(parts.units[:, 0]), signs], axis=1)


def _levels(positive: np.ndarray) -> np.ndarray:
    """1 and -1 of bits or truth values."""
    levels: np.ndarray = 2 * positive.view(np.int8) - np.int8(1)
    return levels


@jit
def mean_magnitudes(blocks: Array, weights: Array, means: Array) -> None:
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


Q1_0 = scalar_format(Type.Q1_0, ScalarBlocks(128, 18, _unpack, _pack, np.array([-1, 1], np.int8)), _search)
