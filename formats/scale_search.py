"""Search for the codes of formats that store a scale and no minimum: x = scale * code, code in bottom .. top.

A lane is a trial: one block's weights meet many trial scales side by side, and the inner loops run over the trials.
Nothing is summed across lanes, so strict floating point does not stop the compiler from using vector registers.

A trial is followed by the least-squares scale of its codes in closed form. With u = x / scale = q + r (q the code, r
what rounding left) the best change of the scale is by the factor 1 + Srq / Sqq, and it leaves the error
scale^2 (Srr - Srq^2 / Sqq), S being sums weighted by importance. Sums of r, rather than of x, keep their digits when
the error is small.

Scales may be negative: the codes reach one further below zero than above, and the longer side can serve either sign.

The kernels return codes; the modules of the formats pack them into bytes. Helpers that two searches share are written
out in both files: numba's cache would not notice a change in an imported one.
"""

import math

import numpy as np
from numba import njit

ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
INFINITY = np.float32(np.inf)
F16_MAX, F16_MIN_NORMAL = np.float32(65504), np.float32(2**-14)
# A block without a weight beyond this is zero in every format: less than 1e-20 of the least float16.
NEGLIGIBLE = np.float32(1e-30)
# Of two scales with the same error, as round an outlier, the larger would spoil the unit of all scales.
COARSE_SCALE = np.float32(1e-5)
# Subnormal float16 of at most 128 spacings.
COARSE_STEP = np.float32(2**-17)

_jit = njit(nogil=True, cache=True, error_model="numpy")


@_jit
def round_f16(value):
    """The nearest float16, as float32; beyond the range of float16 the largest one."""
    value = min(max(value, -F16_MAX), F16_MAX)
    split = value * np.float32(2**13 + 1)  # Veltkamp: leaves the upper 24 - 13 bits
    # Subnormals are multiples of 2**-24, which is the spacing of float32 in [0.5, 1).
    shift = np.float32(0.75) if value >= ZERO else np.float32(-0.75)
    return (value + shift) - shift if abs(value) < F16_MIN_NORMAL else split - (split - value)


@_jit
def power_of_two(largest):
    """The exponent that brings weights up to `largest` near one, so that squares stay inside float32."""
    return max(-100, math.frexp(largest)[1] - 1)


@_jit
def peak(x):
    """The weight of the largest magnitude, with its sign."""
    low0, low1, high0, high1 = ZERO, ZERO, ZERO, ZERO
    for j in range(0, x.size, 2):
        low0, low1 = min(low0, x[j]), min(low1, x[j + 1])
        high0, high1 = max(high0, x[j]), max(high1, x[j + 1])
    low, high = min(low0, low1), max(high0, high1)
    return high if high > -low else low


@_jit
def sum_residuals(x, w, inverse, bottom, top, sums):
    """sums[0..2, lane] = Sqq, Srq, Srr of each trial. Four weights at a time: each sum waits for its last store."""
    sums[:, :] = ZERO
    for j in range(0, x.size, 4):
        x0, x1, x2, x3 = x[j], x[j + 1], x[j + 2], x[j + 3]
        w0, w1, w2, w3 = w[j], w[j + 1], w[j + 2], w[j + 3]
        for t in range(inverse.size):
            u0, u1, u2, u3 = x0 * inverse[t], x1 * inverse[t], x2 * inverse[t], x3 * inverse[t]
            q0, q1 = np.rint(min(max(u0, bottom), top)), np.rint(min(max(u1, bottom), top))
            q2, q3 = np.rint(min(max(u2, bottom), top)), np.rint(min(max(u3, bottom), top))
            wq0, wq1, wq2, wq3 = w0 * q0, w1 * q1, w2 * q2, w3 * q3
            r0, r1, r2, r3 = u0 - q0, u1 - q1, u2 - q2, u3 - q3
            sums[0, t] += (wq0 * q0 + wq1 * q1) + (wq2 * q2 + wq3 * q3)
            sums[1, t] += (wq0 * r0 + wq1 * r1) + (wq2 * r2 + wq3 * r3)
            sums[2, t] += (w0 * r0 * r0 + w1 * r1 * r1) + (w2 * r2 * r2 + w3 * r3 * r3)


@_jit
def refit(sums, coarse, inverse, error):
    """Moves every trial to the least-squares scale of its codes.

    error[lane] is what it leaves, and `coarse` times the square of the scale: between equals the finer one wins.
    """
    for t in range(inverse.size):
        sqq, srq, srr = sums[0, t], sums[1, t], sums[2, t]
        a = srq / sqq if sqq > ZERO else ZERO
        a = a if a > -HALF else ZERO
        error[t] = (max(srr - a * (srq + srq - a * sqq), ZERO) + coarse) / (inverse[t] * inverse[t])
        inverse[t] /= ONE + a


@_jit
def lowest(error):
    """The first lane with the least error. The least comes first, over four chains, for the index stalls the search."""
    e0, e1, e2, e3 = error[0], error[1], error[2], error[3]
    for t in range(4, error.size, 4):
        e0, e1 = min(e0, error[t]), min(e1, error[t + 1])
        e2, e3 = min(e2, error[t + 2]), min(e3, error[t + 3])
    least = min(e0, e1, e2, e3)
    for t in range(error.size):
        if error[t] == least:
            return t
    return 0


@_jit
def fit_scale(x, w, sum_w, bottom, top, trials, lanes, sums):
    """The scale of the best trial; trials are the codes that the largest weight may land on. 0 for zeros."""
    inverse, error = lanes[0], lanes[1]
    largest = peak(x)
    if largest == ZERO:
        return ZERO
    for t in range(trials.size):
        inverse[t] = trials[t] / largest
    sum_residuals(x, w, inverse, bottom, top, sums)
    refit(sums, COARSE_SCALE * sum_w, inverse, error)
    return ONE / inverse[lowest(error)]


@_jit
def sum_squares(x, w, inverse, bottom, top, error):
    """error[lane] = Srr of each trial. Four weights at a time, as every lane's sum has to wait for its last store."""
    error[:] = ZERO
    for j in range(0, x.size, 4):
        x0, x1, x2, x3 = x[j], x[j + 1], x[j + 2], x[j + 3]
        w0, w1, w2, w3 = w[j], w[j + 1], w[j + 2], w[j + 3]
        for t in range(inverse.size):
            u0, u1, u2, u3 = x0 * inverse[t], x1 * inverse[t], x2 * inverse[t], x3 * inverse[t]
            u0 -= np.rint(min(max(u0, bottom), top))
            u1 -= np.rint(min(max(u1, bottom), top))
            u2 -= np.rint(min(max(u2, bottom), top))
            u3 -= np.rint(min(max(u3, bottom), top))
            error[t] += (w0 * u0 * u0 + w1 * u1 * u1) + (w2 * u2 * u2 + w3 * u3 * u3)


@_jit
def write_codes(x, inverse, bottom, top, codes):
    for j in range(x.size):
        codes[j] = np.int8(np.rint(min(max(x[j] * inverse, bottom), top)))


@_jit
def search_blocks(blocks, weights, bottom, top, trials, n_refits, out):
    """Scale and codes of blocks with one float16 scale, decoded as scale * code.

    blocks float32 [n_blocks, block_size], weights float32 [blocks_per_row, block_size].
    trials float32 [n_trials]: the codes that the largest weight of a block may land on; every trial is refitted
    n_refits times and then judged with its scale rounded to float16.
    out: (scales float32 [n_blocks], codes int8 like blocks).
    """
    scales, codes = out
    lanes, sums = np.empty((3, trials.size), np.float32), np.empty((3, trials.size), np.float32)
    inverse, error, rounded = lanes[0], lanes[1], lanes[2]
    for b in range(blocks.shape[0]):
        x, w = blocks[b], weights[b % weights.shape[0]]
        largest = peak(x)
        if abs(largest) < NEGLIGIBLE:
            scales[b] = ZERO
            codes[b, :] = 0
            continue
        for t in range(trials.size):
            inverse[t] = trials[t] / largest
        for _ in range(n_refits):
            sum_residuals(x, w, inverse, bottom, top, sums)
            refit(sums, ZERO, inverse, error)
        for t in range(trials.size):
            rounded[t] = round_f16(ONE / inverse[t])
            inverse[t] = ONE / rounded[t] if rounded[t] != ZERO else ZERO
        sum_squares(x, w, inverse, bottom, top, error)
        for t in range(trials.size):
            # In units of the largest weight, whose own square may be outside of float32.
            unit = rounded[t] / largest
            error[t] = error[t] * (unit * unit) if rounded[t] != ZERO else INFINITY
        best = lowest(error)
        scales[b] = rounded[best]
        write_codes(x, inverse[best], bottom, top, codes[b])


@_jit
def store_sub_blocks(x, w, fits, sum_xx, d, code_range, scale_range, neighbours, lanes, sums, stored):
    """Gives every sub-block the best stored scale near its fit: stored[i], as a code.

    Returns the weighted error and the least-squares d of these codes.
    """
    bottom, top = code_range
    bottom_scale, top_scale = scale_range
    n_sub, size = fits.size, x.size // fits.size
    inverse, scale_codes, error = lanes[0], lanes[1], lanes[2]
    total, sum_xq, sum_qq = ZERO, ZERO, ZERO
    for i in range(n_sub):
        below = np.floor(fits[i] / d) if d != ZERO else ZERO
        for t in range(neighbours.size):
            scale_codes[t] = min(max(below + neighbours[t], bottom_scale), top_scale)
            scale = d * scale_codes[t]
            inverse[t] = ONE / scale if scale != ZERO else ZERO
        part = slice(i * size, (i + 1) * size)
        sum_residuals(x[part], w[part], inverse, bottom, top, sums)
        for t in range(neighbours.size):
            scale = d * scale_codes[t]
            error[t] = sums[2, t] * (scale * scale) if scale != ZERO else sum_xx[i]
        best = lowest(error)
        code = scale_codes[best]
        stored[i] = code
        total += error[best]
        sum_qq += code * code * sums[0, best]
        # Sxq = scale (Sqq + Srq); one factor of the code goes with the d that is sought
        sum_xq += code * code * (sums[0, best] + sums[1, best])
    return total, (d * (sum_xq / sum_qq) if sum_qq > ZERO else d)


@_jit
def next_f16(value, away):
    """The float16 next to a float16 value: further from zero, or nearer to it."""
    # Between half of the spacing and one and a half, whatever the fraction.
    step = max(abs(value) * np.float32(1.3 * 2**-11), np.float32(2**-24))
    step = step if away else -step
    return round_f16(value + step if value > ZERO else value - step)


@_jit
def search_super_blocks(blocks, weights, code_range, scale_range, trials, neighbours, step_trials, n_refits, out):
    """Scales and codes of super-blocks, decoded as d * scale * code.

    blocks float32 [n_blocks, block_size], weights float32 [blocks_per_row, block_size].
    code_range, scale_range: least and greatest code, of weights and of scales.
    trials, step_trials float32 [n]: the codes that a sub-block's largest weight, and the largest scale, may land on.
    neighbours float32 [n]: stored scales that are tried, as distances from the integer below the unrounded optimum.
    Every step trial stores the scales in its own units; the best d so far is refitted n_refits times, and where
    float16 is coarse its two neighbours are tried.
    out: (d float32 [n_blocks], scales int8 [n_blocks, n_sub], codes int8 like blocks).
    """
    steps, scales, codes = out
    bottom, top = code_range
    block_size, n_sub, n_starts = blocks.shape[1], scales.shape[1], step_trials.size
    size = block_size // n_sub
    x = np.empty(block_size, np.float32)
    trial_lanes, trial_sums = np.empty((2, trials.size), np.float32), np.empty((3, trials.size), np.float32)
    lanes, sums = np.empty((3, neighbours.size), np.float32), np.empty((3, neighbours.size), np.float32)
    fits, sum_xx = np.empty(n_sub, np.float32), np.empty(n_sub, np.float32)
    stored, best_stored = np.empty(n_sub, np.float32), np.empty(n_sub, np.float32)
    for b in range(blocks.shape[0]):
        block, w = blocks[b], weights[b % weights.shape[0]]
        exponent = power_of_two(abs(peak(block)))
        up, down = np.float32(math.ldexp(1.0, exponent)), np.float32(math.ldexp(1.0, -exponent))
        for j in range(block_size):
            x[j] = block[j] * down
        for i in range(n_sub):
            part = slice(i * size, (i + 1) * size)
            sum_w, sum_xx[i] = ZERO, ZERO
            for j in range(i * size, (i + 1) * size):
                sum_w += w[j]
                sum_xx[i] += w[j] * x[j] * x[j]
            fits[i] = fit_scale(x[part], w[part], sum_w, bottom, top, trials, trial_lanes, trial_sums)
        largest = peak(fits)
        best_error, best_d, refitted = INFINITY, ZERO, ZERO
        best_stored[:] = ZERO
        n, n_rounds = 0, n_starts + n_refits
        while n < n_rounds or (n < n_rounds + 2 and abs(best_d) < COARSE_STEP):
            if n < n_starts:
                d = round_f16(largest / step_trials[n] * up)
            elif n < n_rounds:
                d = round_f16(refitted * up)
            else:
                d = next_f16(best_d, n == n_rounds)
            n += 1
            error, least_squares = store_sub_blocks(
                x, w, fits, sum_xx, d * down, code_range, scale_range, neighbours, lanes, sums, stored
            )
            if error < best_error:
                best_error, best_d, refitted = error, d, least_squares
                best_stored[:] = stored
        steps[b] = best_d
        for i in range(n_sub):
            part = slice(i * size, (i + 1) * size)
            scales[b, i] = np.int8(best_stored[i])
            scale = best_d * down * best_stored[i]
            write_codes(x[part], ONE / scale if scale != ZERO else ZERO, bottom, top, codes[b, part])
