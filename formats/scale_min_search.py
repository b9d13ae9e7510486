"""Search for the codes of formats that store a scale and a minimum: x = scale * code + low, code in 0 .. top_code.

A lane is a trial: one block's weights meet many trial scales side by side, and the inner loops run over the trials.
Nothing is summed across lanes, so strict floating point does not stop the compiler from using vector registers.

A trial is followed by the least-squares scale and low of its codes in closed form. With u = (x - low) / scale = q + r
(q the code, r what rounding left) the best change of the scale by the factor 1 + a and of low by b * scale has
    a = (Srq Sw - Sr Sq) / (Sqq Sw - Sq^2),  b = (Sr Sqq - Srq Sq) / (Sqq Sw - Sq^2)
and leaves the error scale^2 (Srr - a Srq - b Sr), S being sums weighted by importance. Sums of r, rather than of x,
keep their digits when the error is small.

The kernels return codes; the modules of the formats pack them into bytes.
"""

import math

import numpy as np
from numba import njit

ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
INFINITY = np.float32(np.inf)
F16_MAX, F16_MIN_NORMAL = np.float32(65504), np.float32(2**-14)
# A determinant below this share of its first term is rounding noise: all weight lies on one code.
SINGULAR = np.float32(1e-6)
# Trials of a sub-block's stored codes: 4 scales times 4 minima around the unrounded optimum.
N_NEIGHBOURS = 4


def clip_grid(n_low: int, n_high: int, widest: float = -0.5, narrowest: float = 2.0) -> np.ndarray:
    """Trial ranges, float32 [2, n_low * n_high]: steps cut from the lower end times steps cut from the upper one."""
    low, high = np.linspace(widest, narrowest, n_low), np.linspace(widest, narrowest, n_high)
    return np.stack([grid.ravel() for grid in np.meshgrid(low, high, indexing="ij")]).astype(np.float32)


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
def span(x, ceiling):
    """Least and greatest weight; the least is lowered to `ceiling`, the greatest low that the format can store."""
    low, high = x[0], x[0]
    for j in range(x.size):
        low, high = min(low, x[j]), max(high, x[j])
    return min(low, ceiling), high


@_jit
def sum_residuals(x, w, inverse, low, top_code, sums):
    """sums[0..4, lane] = Sq, Sqq, Sr, Srq, Srr of each trial."""
    sums[:, :] = ZERO
    for j in range(x.size):
        xj, wj = x[j], w[j]
        for t in range(inverse.size):
            u = (xj - low[t]) * inverse[t]
            q = np.rint(min(max(u, ZERO), top_code))
            wq, wr = wj * q, wj * (u - q)
            sums[0, t] += wq
            sums[1, t] += wq * q
            sums[2, t] += wr
            sums[3, t] += wr * q
            sums[4, t] += wr * (u - q)


@_jit
def refit(sums, sum_w, ceiling, inverse, low, error):
    """Moves every trial to the least-squares scale and low of its codes; error[lane] is what they leave."""
    for t in range(inverse.size):
        sq, sqq, sr, srq, srr = sums[0, t], sums[1, t], sums[2, t], sums[3, t], sums[4, t]
        step = ONE / inverse[t]
        determinant = sqq * sum_w - sq * sq
        solvable = determinant > SINGULAR * sqq * sum_w
        a = (srq * sum_w - sr * sq) / determinant if solvable else ZERO
        b = (sr * sqq - srq * sq) / determinant if solvable else sr / sum_w
        bounded = low[t] + b * step > ceiling
        # At the ceiling low is fixed, and the scale alone is fitted.
        b = (ceiling - low[t]) * inverse[t] if bounded else b
        a = ((srq - b * sq) / sqq if sqq > ZERO else ZERO) if bounded else a
        a = a if a > -HALF else ZERO
        left = srr - a * (srq + srq - a * sqq) - b * (sr + sr - b * sum_w) + (a + a) * b * sq
        error[t] = max(left, ZERO) * step * step
        low[t] += b * step
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
def fit_block(x, w, sum_w, top_code, ceiling, clips, n_passes, lanes, sums, fitted):
    """fitted = scale, low, Sq, Sqq of the best trial; the last two before its refit."""
    inverse, low, error = lanes[0], lanes[1], lanes[2]
    least, greatest = span(x, ceiling)
    width = greatest - least
    fitted[:] = ZERO
    fitted[1] = least
    if not width > ZERO:
        return
    for t in range(inverse.size):
        low[t] = least + clips[0, t] * width / top_code
        inverse[t] = (top_code / width) / (ONE - (clips[0, t] + clips[1, t]) / top_code)
    best_error = INFINITY
    for _ in range(n_passes):
        sum_residuals(x, w, inverse, low, top_code, sums)
        refit(sums, sum_w, ceiling, inverse, low, error)
        best = lowest(error)
        if error[best] < best_error:
            best_error = error[best]
            fitted[0], fitted[1] = ONE / inverse[best], low[best]
            fitted[2], fitted[3] = sums[0, best], sums[1, best]


@_jit
def sum_errors(x, w, scale, low, top_code, sums):
    """sums[0..4, lane] = error, Sq, Sqq, Sxq, Sx of each trial exactly as it will be decoded."""
    sums[:, :] = ZERO
    for j in range(x.size):
        xj, wj = x[j], w[j]
        for t in range(scale.size):
            inverse = ONE / scale[t] if scale[t] > ZERO else ZERO
            q = np.rint(min(max((xj - low[t]) * inverse, ZERO), top_code))
            left = xj - (scale[t] * q + low[t])
            wq = wj * q
            sums[0, t] += wj * left * left
            sums[1, t] += wq
            sums[2, t] += wq * q
            sums[3, t] += wq * xj


@_jit
def common_step(values, curvature, top, trials, sums):
    """The step whose multiples 0 .. top come closest to the values, each error weighed by its curvature."""
    largest = ZERO
    for i in range(values.size):
        largest = max(largest, values[i])
    if not largest > ZERO:
        return ZERO
    sums[:2, :] = ZERO
    for i in range(values.size):
        for t in range(trials.size):
            code = np.rint(min(values[i] * ((top + trials[t]) / largest), top))
            sums[0, t] += curvature[i] * values[i] * code
            sums[1, t] += curvature[i] * code * code
    best = 0
    for t in range(trials.size):
        if sums[0, t] * sums[0, t] * sums[1, best] > sums[0, best] * sums[0, best] * sums[1, t]:
            best = t
    return sums[0, best] / sums[1, best] if sums[1, best] > ZERO else largest / top


@_jit
def store_sub_blocks(x, w, fits, d, dmin, top_code, top_scale, lanes, sums, stored, normal):
    """Gives every sub-block the best stored scale and minimum near its fit.

    stored[:, i] = scale and minimum of sub-block i, as codes; normal: the normal equations of d and dmin.
    Returns the weighted error.
    """
    n_sub, size = fits.shape[0], x.size // fits.shape[0]
    scale, low, scale_codes, min_codes = lanes[0], lanes[1], lanes[2], lanes[3]
    total = ZERO
    normal[:] = ZERO
    for i in range(n_sub):
        nearest_scale = np.floor(fits[i, 0] / d) if d > ZERO else ZERO
        for t in range(scale.size):
            code = nearest_scale + np.float32(t // N_NEIGHBOURS - 1)
            scale_codes[t] = min(max(code, ZERO), top_scale)
            scale[t] = d * scale_codes[t]
            # Where the scale grows, the minimum follows, so that the mean of the decoded weights stays.
            minimum = fits[i, 1] + (scale[t] - fits[i, 0]) * fits[i, 2]
            code = (np.floor(minimum / dmin) if dmin > ZERO else ZERO) + np.float32(t % N_NEIGHBOURS - 1)
            min_codes[t] = min(max(code, ZERO), top_scale)
            low[t] = -(dmin * min_codes[t])
        first = i * size
        sum_errors(x[first : first + size], w[first : first + size], scale, low, top_code, sums)
        best = lowest(sums[0])
        total += sums[0, best]
        s, m = scale_codes[best], min_codes[best]
        stored[0, i], stored[1, i] = s, m
        normal[0] += s * s * sums[2, best]
        normal[1] += s * m * sums[1, best]
        normal[2] += m * m * fits[i, 4]
        normal[3] += s * sums[3, best]
        normal[4] += m * fits[i, 5]
    return total


@_jit
def solve_steps(normal, d, dmin):
    """The least-squares d and dmin of given codes; those that went in where the equations do not determine them."""
    ss, sm, mm, sx, mx = normal[0], normal[1], normal[2], normal[3], normal[4]
    determinant = ss * mm - sm * sm
    if determinant > SINGULAR * ss * mm:
        # decoded = d (s q) - dmin m, hence the signs of the mixed terms
        new_d, new_dmin = (sx * mm - mx * sm) / determinant, (sx * sm - mx * ss) / determinant
        if new_d > ZERO and new_dmin >= ZERO:
            return new_d, new_dmin
    if ss > ZERO:
        new_d = (sx + dmin * sm) / ss
        if new_d > ZERO:
            return new_d, dmin
    return d, dmin


@_jit
def search_super_blocks(blocks, weights, top_code, top_scale, clips, step_trials, n_passes, n_rounds, out):
    """Scales, minima and codes of super-blocks, decoded as d * scale * code - dmin * minimum.

    blocks float32 [n_blocks, block_size], weights float32 [blocks_per_row, block_size].
    clips float32 [2, n_trials]: by how many steps a trial's range is cut at either end, negative to widen it.
    step_trials float32 [n]: what is added to top_scale in trial super-scales.
    out: (d and dmin float32 [n_blocks, 2], scales and minima uint8 [n_blocks, 2, n_sub], codes uint8 like blocks).
    """
    steps, scales, codes = out
    block_size, n_sub = blocks.shape[1], scales.shape[2]
    size = block_size // n_sub
    x = np.empty(block_size, np.float32)
    trial_lanes, trial_sums = np.empty((3, clips.shape[1]), np.float32), np.empty((5, clips.shape[1]), np.float32)
    stored_lanes = np.empty((4, N_NEIGHBOURS * N_NEIGHBOURS), np.float32)
    stored_sums = np.empty((4, N_NEIGHBOURS * N_NEIGHBOURS), np.float32)
    step_sums = np.empty((2, step_trials.size), np.float32)
    fitted, normal = np.empty(4, np.float32), np.empty(5, np.float32)
    # Of each sub-block: scale, minimum, mean code, curvature of its error over the scale, Sw, Sx.
    fits = np.empty((n_sub, 6), np.float32)
    stored, best_stored = np.empty((2, n_sub), np.float32), np.empty((2, n_sub), np.float32)
    for b in range(blocks.shape[0]):
        block, w = blocks[b], weights[b % weights.shape[0]]
        exponent = power_of_two(np.abs(block).max())
        up, down = np.float32(2.0**exponent), np.float32(2.0**-exponent)
        for j in range(block_size):
            x[j] = block[j] * down
        for i in range(n_sub):
            xi, wi = x[i * size : (i + 1) * size], w[i * size : (i + 1) * size]
            sum_w, sum_wx = ZERO, ZERO
            for j in range(size):
                sum_w += wi[j]
                sum_wx += wi[j] * xi[j]
            fit_block(xi, wi, sum_w, top_code, ZERO, clips, n_passes, trial_lanes, trial_sums, fitted)
            fits[i, 0], fits[i, 1], fits[i, 2] = fitted[0], -fitted[1], fitted[2] / sum_w
            fits[i, 3] = fitted[3] - fitted[2] * fits[i, 2]
            fits[i, 4], fits[i, 5] = sum_w, sum_wx
        d = common_step(fits[:, 0], fits[:, 3], top_scale, step_trials, step_sums)
        dmin = common_step(fits[:, 1], fits[:, 4], top_scale, step_trials, step_sums)
        best_error = INFINITY
        steps[b, :] = ZERO
        best_stored[:, :] = ZERO
        for _ in range(n_rounds):
            d, dmin = round_f16(d * up) * down, round_f16(dmin * up) * down
            error = store_sub_blocks(
                x, w, fits, d, dmin, top_code, top_scale, stored_lanes, stored_sums, stored, normal
            )
            if error < best_error:
                best_error = error
                steps[b, 0], steps[b, 1] = d, dmin
                best_stored[:, :] = stored
            d, dmin = solve_steps(normal, d, dmin)
        for i in range(n_sub):
            scale, low = steps[b, 0] * best_stored[0, i], -(steps[b, 1] * best_stored[1, i])
            scales[b, 0, i], scales[b, 1, i] = np.uint8(best_stored[0, i]), np.uint8(best_stored[1, i])
            inverse = ONE / scale if scale > ZERO else ZERO
            for j in range(i * size, (i + 1) * size):
                codes[b, j] = np.uint8(np.rint(min(max((x[j] - low) * inverse, ZERO), top_code)))
        steps[b, 0] *= up
        steps[b, 1] *= up
