"""Search for the scale of integer codes with a bfloat16 scale: x = scale * code, or scale * (code - zero_point).

bfloat16 has 128 values an octave, so the scales that can be stored are few, and all that may be the best are tried,
from large to small, 16 at a time. A lane is a trial: the inner loops run over the trials, nothing is summed across
lanes, and strict floating point does not stop the compiler from using vector registers. The search begins a little
above the scale under which no weight is cut off, and ends when what the weights beyond the greatest code lose alone is
as much as the least error found, as that only grows with smaller scales.
"""

import math

import numpy as np

from bitwright.formats.bfloat16 import EPSILON_BITS
from bitwright.formats.compiler import Array, Real, jit
from bitwright.formats.kernels.float16 import NEGLIGIBLE, bf16_bits_above, bf16_value

ZERO, ONE = np.float32(0), np.float32(1)
INFINITY = np.float32(np.inf)
SIGN_BIT = np.int32(0x8000)
TRIALS = 16
# The asymmetric search's coarse scales: every so many bfloat16 values, and at most so many, which is two octaves.
COARSE, MOST_COARSE = np.int32(4), 64


@jit
def extremes(x: Array) -> tuple[Real, Real]:
    low, high = ZERO, ZERO
    for j in range(x.size):
        low, high = min(low, x[j]), max(high, x[j])
    return low, high


@jit
def load(x: Array, w: Array, unit: Real, v: Array, u: Array) -> None:
    """x in units of `unit` and its weights, in buffers whose size is a multiple of four; the rest stays zero."""
    for j in range(x.size):
        v[j], u[j] = x[j] / unit, w[j]


@jit
def try_scales(v: Array, w: Array, lanes: Array) -> None:
    """lanes[4] = error of each trial; lanes[0..3] = its scale, the inverse, and the least and the greatest code.

    Four weights at a time, as every lane's sum has to wait for its last store.
    """
    scale, inverse, bottom, top, error = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4]
    error[:] = ZERO
    for j in range(0, v.size, 4):
        v0, v1, v2, v3 = v[j], v[j + 1], v[j + 2], v[j + 3]
        w0, w1, w2, w3 = w[j], w[j + 1], w[j + 2], w[j + 3]
        for t in range(TRIALS):
            r0 = v0 - scale[t] * np.rint(min(max(v0 * inverse[t], bottom[t]), top[t]))
            r1 = v1 - scale[t] * np.rint(min(max(v1 * inverse[t], bottom[t]), top[t]))
            r2 = v2 - scale[t] * np.rint(min(max(v2 * inverse[t], bottom[t]), top[t]))
            r3 = v3 - scale[t] * np.rint(min(max(v3 * inverse[t], bottom[t]), top[t]))
            error[t] += (w0 * (r0 * r0) + w1 * (r1 * r1)) + (w2 * (r2 * r2) + w3 * (r3 * r3))


@jit
def clipping_error(v: Array, w: Array, bottom: Real, top: Real, chains: Array) -> Real:
    """What the weights outside of bottom .. top lose under any code."""
    chains[:] = ZERO
    for j in range(0, v.size, 4):
        for t in range(4):
            excess = max(v[j + t] - top, bottom - v[j + t], ZERO)
            chains[t] += w[j + t] * (excess * excess)
    total: Real = (chains[0] + chains[1]) + (chains[2] + chains[3])
    return total


@jit
def write_codes(v: Array, inverse: Real, bottom: Real, top: Real, codes: Array) -> None:
    for j in range(codes.size):
        codes[j] = np.int8(np.rint(min(max(v[j] * inverse, bottom), top)))


@jit
def search_symmetric(
    blocks: Array,
    weights: Array,
    bottom: Real,
    top: Real,
    stride: np.int32,
    exhaustive: bool,
    signs: int,
    out: tuple[Array, Array],
) -> None:
    """The best bfloat16 scale of each block, and its codes in bottom .. top.

    blocks float32 [n_blocks, block_size], weights float32 [blocks_per_row, block_size]; bottom = -top - 1.
    stride: of the scales that are tried, counted in bfloat16 values.
    exhaustive: go on until no smaller scale can be better; otherwise one window of trials.
    signs: of the scales: 1, positive ones; 2, negative ones too, so that the longer side may serve either sign.
    out: (bits of the scales uint16 [n_blocks], codes int8 like blocks).
    """
    scales, codes = out
    size = blocks.shape[1]
    v, w = np.zeros((size + 3) // 4 * 4, np.float32), np.zeros((size + 3) // 4 * 4, np.float32)
    lanes, chains = np.empty((5, TRIALS), np.float32), np.empty(4, np.float32)
    lanes[2, :], lanes[3, :] = bottom, top
    for b in range(blocks.shape[0]):
        low, high = extremes(blocks[b])
        largest = max(high, -low)
        if largest < NEGLIGIBLE:
            scales[b] = EPSILON_BITS
            codes[b, :] = 0
            continue
        unit = np.float32(math.ldexp(1.0, math.frexp(largest)[1] - 1))
        best_error, best, best_unit = INFINITY, np.int32(0), unit
        for _ in range(signs):
            load(blocks[b], weights[b % weights.shape[0]], unit, v, w)
            # Where the largest weight takes the code before the last one.
            next_bits = bf16_bits_above(max(high / (top - ONE), low / (bottom + ONE)))
            searching = True
            while searching:
                for t in range(TRIALS):
                    lanes[0, t] = bf16_value(next_bits - stride * np.int32(t)) / abs(unit)
                    lanes[1, t] = ONE / lanes[0, t]
                try_scales(v, w, lanes)
                for t in range(TRIALS):
                    if lanes[4, t] < best_error:
                        best_error, best, best_unit = lanes[4, t], next_bits - stride * np.int32(t), unit
                next_bits -= stride * np.int32(TRIALS)
                step = bf16_value(next_bits) / abs(unit)
                searching = exhaustive and bool(clipping_error(v, w, bottom * step, top * step, chains) < best_error)
            # A negative unit turns the weights round.
            low, high, unit = -high, -low, -unit
        load(blocks[b], weights[b % weights.shape[0]], best_unit, v, w)
        write_codes(v, ONE / (bf16_value(best) / abs(best_unit)), bottom, top, codes[b])
        scales[b] = best if best_unit > ZERO else best | SIGN_BIT


@jit
def set_trials(lanes: Array, t: int, bits: np.int32, shift: Real, unit: Real, bottom: Real, top: Real) -> None:
    lanes[0, t] = bf16_value(bits) / unit
    lanes[1, t] = ONE / lanes[0, t]
    lanes[2, t], lanes[3, t] = bottom + shift, top + shift


@jit
def search_asymmetric(
    blocks: Array, weights: Array, bottom: Real, top: Real, n_refined: int, out: tuple[Array, Array, Array]
) -> None:
    """As search_symmetric with a zero point, of four bits: x = scale * (code - zero_point), both in bottom .. top.

    Zero always has a code. Every COARSE-th scale is tried with all 16 zero points, then all scales around the n_refined
    best of these pairs with theirs.
    out: (bits of the scales uint16 [n_blocks], zero points int8 [n_blocks], codes int8 like blocks).
    """
    scales, zero_points, codes = out
    size = blocks.shape[1]
    v, w = np.zeros((size + 3) // 4 * 4, np.float32), np.zeros((size + 3) // 4 * 4, np.float32)
    lanes, table = np.empty((5, TRIALS), np.float32), np.empty((MOST_COARSE, TRIALS), np.float32)
    for b in range(blocks.shape[0]):
        low, high = extremes(blocks[b])
        largest = max(high, -low)
        if largest < NEGLIGIBLE:
            scales[b] = EPSILON_BITS
            zero_points[b] = 0
            codes[b, :] = 0
            continue
        unit = np.float32(math.ldexp(1.0, math.frexp(largest)[1] - 1))
        load(blocks[b], weights[b % weights.shape[0]], unit, v, w)
        low_weight, high_weight = ZERO, ZERO
        for j in range(size):
            low_weight = max(low_weight, w[j]) if blocks[b, j] == low else low_weight
            high_weight = max(high_weight, w[j]) if blocks[b, j] == high else high_weight
        both = low < ZERO and high > ZERO
        shared = low_weight * high_weight / (low_weight + high_weight) if both else max(low_weight, high_weight)
        first_bits = bf16_bits_above((high - low) / (top - bottom - ONE))
        least, n_coarse = INFINITY, 0
        while n_coarse < MOST_COARSE:
            bits = first_bits - COARSE * np.int32(n_coarse)
            step = bf16_value(bits) / unit
            # No smaller scale loses less than what is beyond its range wherever that lies, zero being in it; the
            # extremes have to share what they are too far apart.
            width = (top - bottom) * step
            excess = max((high - low) / unit - width, ZERO)
            if max(shared * (excess * excess), clipping_error(v, w, -width, width, lanes[4])) >= least:
                break
            for t in range(TRIALS):
                set_trials(lanes, t, bits, -top + np.float32(t), unit, bottom, top)
            try_scales(v, w, lanes)
            for t in range(TRIALS):
                table[n_coarse, t] = lanes[4, t]
                least = min(least, lanes[4, t])
            n_coarse += 1
        best_error, best, best_shift = INFINITY, first_bits, ZERO
        for _ in range(n_refined):
            pair, least = 0, INFINITY
            for i in range(n_coarse * TRIALS):
                if table[i // TRIALS, i % TRIALS] < least:
                    pair, least = i, table[i // TRIALS, i % TRIALS]
            table[pair // TRIALS, pair % TRIALS] = INFINITY
            middle, shift = first_bits - COARSE * np.int32(pair // TRIALS), -top + np.float32(pair % TRIALS)
            for t in range(TRIALS):
                set_trials(lanes, t, middle + np.int32(TRIALS // 2 - t), shift, unit, bottom, top)
            try_scales(v, w, lanes)
            for t in range(TRIALS):
                if lanes[4, t] < best_error:
                    best_error, best, best_shift = lanes[4, t], middle + np.int32(TRIALS // 2 - t), shift
        scales[b] = best
        zero_points[b] = np.int8(-best_shift)
        write_codes(v, ONE / (bf16_value(best) / unit), bottom + best_shift, top + best_shift, codes[b])
        for j in range(size):
            codes[b, j] -= np.int8(best_shift)
