"""Q8_0, ggml's block_q8_0: 32 weights in 34 bytes, 8.5 bits per weight. A weight is d * code.

d     2     float16
qs   32     int8 codes, -127 .. 127; -128 decodes but is not written, as runtimes negate codes

The encoder tries scales that put a block's largest weight on codes from 127 down. A coarser scale costs little, 1.6 %
of the squared error a code, while each scale rounds the other weights anew: the best of many draws wins more than that.
No trial cuts the largest weight off, so that the search needs no clipping.
"""

import numpy as np

from formats.block_format import Effort
from formats.compiler import njit
from formats.encoding import to_blocks
from formats.iq_packing import pack_half, unpack_half
from formats.parts import NO_MINIMUM, ONE_VALUE, ScalarBlocks, ScalarParts, integers, single_scale

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
F16_MAX, F16_MIN_NORMAL = np.float32(65504), np.float32(2**-14)
# Between half of float16's spacing and one and a half of it, whatever the fraction; subnormals have their own.
F16_STEP, F16_SUBNORMAL_STEP = np.float32(1.3 * 2**-11), np.float32(2**-24)
# A block without a weight beyond this is zero in every format: less than 1e-20 of the least float16.
NEGLIGIBLE = np.float32(1e-30)


def encode(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    blocks, weights = to_blocks(rows, importance, BLOCK_SIZE)
    scales, data = np.empty(len(blocks), np.float32), np.empty((len(blocks), TYPE_SIZE), np.uint8)
    search_blocks(blocks, weights, _TRIALS[effort], scales, data.view(np.int8))
    data.view("<f2")[:, 0] = scales
    return data.reshape(len(rows), -1)


def decode(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(-1, TYPE_SIZE)
    return (unpack_half(blocks[:, :2]) * blocks[:, 2:].view(np.int8)).reshape(len(data), -1)


def _open(data: np.ndarray) -> ScalarParts:
    blocks = data.reshape(-1, TYPE_SIZE)
    return single_scale(unpack_half(blocks[:, :2]), blocks[:, 2:].view(np.int8))


def _close(parts: ScalarParts) -> np.ndarray:
    return np.concatenate([pack_half(parts.units[:, 0]), parts.levels.view(np.uint8)], axis=1)


BLOCKS = ScalarBlocks(integers(-127, 127), 1, ONE_VALUE, NO_MINIMUM, _open, _close)


_jit = njit(nogil=True, cache=True, error_model="numpy")


@_jit
def round_f16(value):
    """The float16 nearest to a value >= 0, as float32; beyond the range of float16 the largest one."""
    value = min(value, F16_MAX)
    split = value * np.float32(2**13 + 1)  # Veltkamp: leaves the upper 24 - 13 bits
    # Subnormals are multiples of 2**-24, which is the spacing of float32 in [0.5, 1).
    half = np.float32(0.5)
    return (value + half) - half if value < F16_MIN_NORMAL else split - (split - value)


@_jit
def search_blocks(blocks, weights, trials, scales, data):
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
        # Magnitudes order as their bits do, and a maximum of integers may be taken in any order.
        largest_bits = np.int32(0)
        for j in range(size):
            magnitude_bits = np.float32(abs(blocks[b, j])).view(np.int32)
            largest_bits = magnitude_bits if magnitude_bits > largest_bits else largest_bits
        largest = np.int32(largest_bits).view(np.float32)
        if largest < NEGLIGIBLE:
            scales[b] = ZERO
            continue
        for t in range(n_trials):
            nearest = round_f16(largest * trials[t])
            step = max(nearest * F16_STEP, F16_SUBNORMAL_STEP)
            d[t] = nearest if nearest * BEYOND_TOP >= largest else round_f16(nearest + step)
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
