"""Search for the codes of formats that store a scale and no minimum: x = scale * code, code in bottom .. top.

A lane is a trial: one block's weights meet many trial scales side by side, and the inner loops run over the trials.
Nothing is summed across lanes, so strict floating point does not stop the compiler from using vector registers.

A trial is followed by the least-squares scale of its codes in closed form. With u = x / scale = q + r (q the code, r
what rounding left) the best change of the scale is by the factor 1 + Srq / Sqq, and it leaves the error
scale^2 (Srr - Srq^2 / Sqq), S being sums weighted by importance. Sums of r, rather than of x, keep their digits when the
error is small.

Scales may be negative: the codes reach one further below zero than above, and the longer side can serve either sign.

The kernels return codes; the modules of the formats pack them into bytes.
"""
# ruff: noqa: PLR0917  (compiled functions take their arguments by position)

import math

import numpy as np
from numba import njit

ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
INFINITY = np.float32(np.inf)
F16_MAX, F16_MIN_NORMAL = np.float32(65504), np.float32(2**-14)
# Trials of a sub-block's stored scale: the integers around the unrounded optimum.
N_NEIGHBOURS = 8


_jit = njit(nogil=True, cache=True, error_model="numpy")


@_jit
def round_f16(value):
    """The nearest float16, as float32; beyond the range of float16 the largest one."""
    value = min(max(value, -F16_MAX), F16_MAX)
    if abs(value) < F16_MIN_NORMAL:
        # Subnormals are multiples of 2**-24, which is the spacing of float32 in [0.5, 1).
        shift = np.float32(0.75) if value >= ZERO else np.float32(-0.75)
        return (value + shift) - shift
    split = value * np.float32(2**13 + 1)  # Veltkamp: leaves the upper 24 - 13 bits
    return split - (split - value)


@_jit
def power_of_two(largest):
    """The exponent that brings weights up to `largest` near one, so that squares stay inside float32."""
    return max(-100, math.frexp(largest)[1] - 1)


@_jit
def peak(x):
    """The weight of the largest magnitude, with its sign."""
    largest = x[0]
    for j in range(x.size):
        if abs(x[j]) > abs(largest):
            largest = x[j]
    return largest


@_jit
def sum_residuals(x, w, inverse, bottom, top, sums):
    """sums[0..2, lane] = Sqq, Srq, Srr of each trial."""
    sums[:, :] = ZERO
    for j in range(x.size):
        xj, wj = x[j], w[j]
        for t in range(inverse.size):
            u = xj * inverse[t]
            q = np.rint(min(max(u, bottom), top))
            r = u - q
            wq = wj * q
            sums[0, t] += wq * q
            sums[1, t] += wq * r
            sums[2, t] += wj * r * r


@_jit
def refit(sums, inverse, error):
    """Moves every trial to the least-squares scale of its codes; error[lane] is what it leaves."""
    for t in range(inverse.size):
        sqq, srq, srr = sums[0, t], sums[1, t], sums[2, t]
        a = srq / sqq if sqq > ZERO else ZERO
        a = a if a > -HALF else ZERO
        error[t] = max(srr - a * (srq + srq - a * sqq), ZERO) / (inverse[t] * inverse[t])
        inverse[t] /= ONE + a


@_jit
def lowest(error):
    best = 0
    for t in range(error.size):
        if error[t] < error[best]:
            best = t
    return best


@_jit
def fit_scale(x, w, bottom, top, trials, n_passes, lanes, sums):
    """(scale, Sqq) of the best trial; trials are the codes that the largest weight may land on. (0, 0) for zeros."""
    inverse, error = lanes[0], lanes[1]
    largest = peak(x)
    if largest == ZERO:
        return ZERO, ZERO
    for t in range(trials.size):
        inverse[t] = trials[t] / largest
    best_error, scale, curvature = INFINITY, ZERO, ZERO
    for _ in range(n_passes):
        sum_residuals(x, w, inverse, bottom, top, sums)
        refit(sums, inverse, error)
        best = lowest(error)
        if error[best] < best_error:
            best_error, scale, curvature = error[best], ONE / inverse[best], sums[0, best]
    return scale, curvature


@_jit
def sum_errors(x, w, scale, bottom, top, sums):
    """sums[0..2, lane] = error, Sqq, Sxq of each trial exactly as it will be decoded."""
    sums[:, :] = ZERO
    for j in range(x.size):
        xj, wj = x[j], w[j]
        for t in range(scale.size):
            inverse = ONE / scale[t] if scale[t] != ZERO else ZERO
            q = np.rint(min(max(xj * inverse, bottom), top))
            left = xj - scale[t] * q
            wq = wj * q
            sums[0, t] += wj * left * left
            sums[1, t] += wq * q
            sums[2, t] += wq * xj


@_jit
def write_codes(x, scale, bottom, top, codes):
    inverse = ONE / scale if scale != ZERO else ZERO
    for j in range(x.size):
        codes[j] = np.int8(np.rint(min(max(x[j] * inverse, bottom), top)))


@_jit
def search_blocks(blocks, weights, bottom, top, trials, n_passes, ulps, out):
    """Scale and codes of blocks with one float16 scale, decoded as scale * code.

    blocks float32 [n_blocks, block_size], weights float32 [blocks_per_row, block_size].
    trials float32 [n_trials]: the codes that the largest weight of a block may land on.
    ulps float32 [n]: neighbours of the least-squares scale, as factors, that are tried once rounded to float16.
    out: (scales float32 [n_blocks], codes int8 like blocks).
    """
    scales, codes = out
    block_size = blocks.shape[1]
    x = np.empty(block_size, np.float32)
    lanes, sums = np.empty((2, trials.size), np.float32), np.empty((3, trials.size), np.float32)
    rounded, rounded_sums = np.empty(ulps.size, np.float32), np.empty((3, ulps.size), np.float32)
    for b in range(blocks.shape[0]):
        block, w = blocks[b], weights[b % weights.shape[0]]
        exponent = power_of_two(abs(peak(block)))
        up, down = np.float32(2.0**exponent), np.float32(2.0**-exponent)
        for j in range(block_size):
            x[j] = block[j] * down
        scale, _ = fit_scale(x, w, bottom, top, trials, n_passes, lanes, sums)
        for t in range(ulps.size):
            rounded[t] = round_f16(scale * ulps[t] * up) * down
        sum_errors(x, w, rounded, bottom, top, rounded_sums)
        scale = rounded[lowest(rounded_sums[0])]
        scales[b] = scale * up
        write_codes(x, scale, bottom, top, codes[b])


@_jit
def common_step(values, curvature, bottom, top, trials, lanes, sums):
    """The step whose multiples come closest to the values, each error weighed by its curvature."""
    inverse = lanes[0]
    largest = peak(values)
    if largest == ZERO:
        return ZERO
    for t in range(trials.size):
        inverse[t] = trials[t] / largest
    sums[:, :] = ZERO
    for i in range(values.size):
        for t in range(trials.size):
            code = np.rint(min(max(values[i] * inverse[t], bottom), top))
            sums[0, t] += curvature[i] * values[i] * code
            sums[1, t] += curvature[i] * code * code
    best = 0
    for t in range(trials.size):
        if sums[0, t] * sums[0, t] * sums[1, best] > sums[0, best] * sums[0, best] * sums[1, t]:
            best = t
    return sums[0, best] / sums[1, best] if sums[1, best] > ZERO else largest / bottom


@_jit
def store_sub_blocks(x, w, fits, d, bottom, top, bottom_scale, top_scale, lanes, sums, stored):
    """Gives every sub-block the best stored scale near its fit: stored[i], as a code.

    Returns the weighted error and the least-squares d of these codes.
    """
    n_sub, size = fits.size, x.size // fits.size
    scale, scale_codes = lanes[0], lanes[1]
    total, sum_xq, sum_qq = ZERO, ZERO, ZERO
    for i in range(n_sub):
        nearest = np.floor(fits[i] / d) if d != ZERO else ZERO
        for t in range(N_NEIGHBOURS):
            scale_codes[t] = min(max(nearest + np.float32(t - (N_NEIGHBOURS // 2 - 1)), bottom_scale), top_scale)
            scale[t] = d * scale_codes[t]
        first = i * size
        sum_errors(x[first : first + size], w[first : first + size], scale, bottom, top, sums)
        best = lowest(sums[0])
        code = scale_codes[best]
        stored[i] = code
        total += sums[0, best]
        sum_qq += code * code * sums[1, best]
        sum_xq += code * sums[2, best]
    return total, (sum_xq / sum_qq if sum_qq > ZERO else d)


@_jit
def search_super_blocks(
    blocks, weights, bottom, top, bottom_scale, top_scale, trials, step_trials, n_passes, n_rounds, out
):
    """Scales and codes of super-blocks, decoded as d * scale * code.

    blocks float32 [n_blocks, block_size], weights float32 [blocks_per_row, block_size].
    trials, step_trials float32 [n]: the codes that a sub-block's largest weight, and the largest scale, may land on.
    out: (d float32 [n_blocks], scales int8 [n_blocks, n_sub], codes int8 like blocks).
    """
    steps, scales, codes = out
    block_size, n_sub = blocks.shape[1], scales.shape[1]
    size = block_size // n_sub
    x = np.empty(block_size, np.float32)
    trial_lanes, trial_sums = np.empty((2, trials.size), np.float32), np.empty((3, trials.size), np.float32)
    step_lanes, step_sums = np.empty((1, step_trials.size), np.float32), np.empty((2, step_trials.size), np.float32)
    lanes, sums = np.empty((2, N_NEIGHBOURS), np.float32), np.empty((3, N_NEIGHBOURS), np.float32)
    fits, curvature = np.empty(n_sub, np.float32), np.empty(n_sub, np.float32)
    stored, best_stored = np.empty(n_sub, np.float32), np.empty(n_sub, np.float32)
    for b in range(blocks.shape[0]):
        block, w = blocks[b], weights[b % weights.shape[0]]
        exponent = power_of_two(abs(peak(block)))
        up, down = np.float32(2.0**exponent), np.float32(2.0**-exponent)
        for j in range(block_size):
            x[j] = block[j] * down
        for i in range(n_sub):
            part = slice(i * size, (i + 1) * size)
            fits[i], curvature[i] = fit_scale(x[part], w[part], bottom, top, trials, n_passes, trial_lanes, trial_sums)
        d = common_step(fits, curvature, bottom_scale, top_scale, step_trials, step_lanes, step_sums)
        best_error, best_d = INFINITY, ZERO
        best_stored[:] = ZERO
        for _ in range(n_rounds):
            d = round_f16(d * up) * down
            error, refitted = store_sub_blocks(x, w, fits, d, bottom, top, bottom_scale, top_scale, lanes, sums, stored)
            if error < best_error:
                best_error, best_d = error, d
                best_stored[:] = stored
            d = refitted
        steps[b] = best_d * up
        for i in range(n_sub):
            part = slice(i * size, (i + 1) * size)
            scales[b, i] = np.int8(best_stored[i])
            write_codes(x[part], best_d * best_stored[i], bottom, top, codes[b, part])
