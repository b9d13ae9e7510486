"""Q8_0, ggml's block_q8_0: 32 weights in 34 bytes, 8.5 bits per weight. A weight is d * code.

d     2     float16
qs   32     int8 codes, -127 .. 127; -128 decodes but is not written, as runtimes negate codes

The encoder tries scales that put a block's largest weight on codes from 127 down. A coarser scale costs little, 1.6 %
of the squared error a code, while each scale rounds the other weights anew: the best of many draws wins more than that.
No trial cuts the largest weight off, so that the search needs no clipping.
"""

import numpy as np
from gguf import GGMLQuantizationType as Type

from bitwright.formats.block_format import BlockFormat
from bitwright.formats.choices import Effort
from bitwright.formats.compiler import Array, jit
from bitwright.formats.encoding import to_blocks
from bitwright.formats.kernels.float16 import NEGLIGIBLE, f16_step, round_f16
from bitwright.formats.kernels.lanes import magnitude
from bitwright.formats.packing import pack_half, unpack_half
from bitwright.formats.parts import ScalarBlocks, ScalarParts, integers, single_scale

BLOCK_SIZE, TYPE_SIZE = 32, 34

# One over the codes that a block's largest weight is tried on.
_TRIALS = {
    "best": (1 / np.linspace(118.4, 127.4, 16)).astype(np.float32),
    "fast": (1 / np.linspace(120, 127.4, 8)).astype(np.float32),
}

ZERO, ONE = np.float32(0), np.float32(1)
INFINITY = np.float32(np.inf)
TOP = np.float32(127)
BEYOND_TOP = np.float32(127.5)


def _encode(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    blocks, weights = to_blocks(rows, importance, BLOCK_SIZE)
    scales, data = np.empty(len(blocks), np.float32), np.empty((len(blocks), TYPE_SIZE), np.uint8)
    search_blocks(blocks, weights, _TRIALS[effort], scales, data.view(np.int8))
    data.view("<f2")[:, 0] = scales
    return data.reshape(len(rows), -1)


def _unpack(blocks: np.ndarray) -> ScalarParts:
    return single_scale(unpack_half(blocks[:, :2]), blocks[:, 2:].view(np.int8))


def _pack(parts: ScalarParts) -> np.ndarray:
    return np.concatenate([pack_half(parts.units[:, 0]), parts.levels.view(np.uint8)], axis=1)


@jit
def search_blocks(blocks: Array, weights: Array, trials: Array, scales: Array, data: Array) -> None:
    """The best scale of each block and the codes of its weights.

    blocks float32 [n_blocks, 32], weights float32 [blocks_per_row, 32]; trials float32 [n].
    Writes scales float32 [n_blocks] and, behind two bytes for them, codes: data int8 [n_blocks, 34].

    A lane is a trial. Rows are indexed, not cut out and handed to helpers, as each slice that is passed on is counted
    as a reference; and all loops run to the sizes of arrays, as loops of known length are unrolled instead of
    vectorised. Both together took as long as the search.
    """
    size, n_trials = blocks.shape[1], trials.size
    lanes = np.empty((3, n_trials), np.float32)
    d, inverse, error = lanes[0], lanes[1], lanes[2]
    for b in range(blocks.shape[0]):
        largest = magnitude(blocks, b)
        if largest < NEGLIGIBLE:
            scales[b] = ZERO
            continue
        for t in range(n_trials):
            nearest = round_f16(largest * trials[t])
            d[t] = nearest if nearest * BEYOND_TOP >= largest else round_f16(nearest + f16_step(nearest))
            inverse[t], error[t] = ONE / d[t], ZERO
        w = b % weights.shape[0]
        # Four weights at a time, as every lane's sum has to wait for its last store.
        for j in range(0, size, 4):
            x0, x1, x2, x3 = blocks[b, j], blocks[b, j + 1], blocks[b, j + 2], blocks[b, j + 3]
            w0, w1, w2, w3 = weights[w, j], weights[w, j + 1], weights[w, j + 2], weights[w, j + 3]
            for t in range(n_trials):
                u0, u1, u2, u3 = x0 * inverse[t], x1 * inverse[t], x2 * inverse[t], x3 * inverse[t]
                r0, r1, r2, r3 = u0 - np.rint(u0), u1 - np.rint(u1), u2 - np.rint(u2), u3 - np.rint(u3)
                error[t] += (w0 * (r0 * r0) + w1 * (r1 * r1)) + (w2 * (r2 * r2) + w3 * (r3 * r3))
        unit = ONE / largest
        for t in range(n_trials):
            step = d[t] * unit
            error[t] *= step * step
        best, least = 0, INFINITY
        for t in range(n_trials):
            if error[t] < least:
                best, least = t, error[t]
        scales[b] = d[best]
    # In a loop of its own: beside the search it took four times as long.
    for b in range(blocks.shape[0]):
        inverse_d = ONE / scales[b] if scales[b] > ZERO else ZERO
        for j in range(size):
            data[b, 2 + j] = np.int8(np.rint(min(max(blocks[b, j] * inverse_d, -TOP), TOP)))


_BLOCKS = ScalarBlocks(BLOCK_SIZE, TYPE_SIZE, _unpack, _pack, integers(-127, 127))
Q8_0 = BlockFormat(Type.Q8_0, BLOCK_SIZE, TYPE_SIZE, _encode, _BLOCKS.decode, blocks=_BLOCKS)
