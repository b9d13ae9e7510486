"""Search for the codes of IQ4_NL and IQ4_XS: x = scale * LEVELS[code], 16 levels that lie closer about zero.

A lane is a trial: one block's weights meet many trial scales side by side, and the inner loops run over the trials.
Nothing is summed across lanes, so strict floating point does not stop the compiler from using vector registers.

With u = x / scale = q + r (q the level, r what it leaves) the least-squares scale of a trial's codes is scale
(1 + Srq / Sqq), and it leaves the error scale^2 (Srr - Srq^2 / Sqq), S being sums weighted by importance. Sums of r,
rather than of x, keep their digits when the error is small.

Scales may be negative: the levels reach further below zero than above, and the longer side can serve either sign.
"""

import math

import gguf
import numpy as np

from bitwright.formats.compiler import Array, Real, jit
from bitwright.formats.kernels.float16 import NEGLIGIBLE, next_f16, power_of_two, round_f16
from bitwright.formats.kernels.half_steps import HALF_STEPS, half_step, nearest_levels
from bitwright.formats.kernels.lanes import lowest

LEVELS = np.array(gguf.quants.IQ4_NL.kvalues, np.float32)
# NEAREST_LEVEL[half_step(u)] is the level nearest to u.
NEAREST_LEVEL = LEVELS[nearest_levels(LEVELS)]

ZERO, ONE = np.float32(0), np.float32(1)
INFINITY = np.float32(np.inf)
# Of two scales with the same error, as round an outlier, the larger would spoil the unit of all scales.
COARSE_SCALE = np.float32(1e-6)
# A refit may turn a scale round, as no level is zero, but not shrink it to nothing.
SMALLEST_FACTOR = np.float32(1e-3)
# IQ4_XS's scales of sub-blocks, and how many units and codes of a scale are tried side by side.
BOTTOM_SCALE, TOP_SCALE = np.float32(-32), np.float32(31)
N_UNITS, N_NEIGHBOURS = 4, 4


@jit
def peak(x: Array) -> Real:
    """The weight of the largest magnitude, with its sign."""
    low, high = ZERO, ZERO
    for j in range(x.size):
        low, high = min(low, x[j]), max(high, x[j])
    return high if high > -low else low


@jit
def sum_residuals(x: Array, w: Array, inverse: Array, sums: Array) -> None:
    """sums[0..2, lane] = Sqq, Srq, Srr of each trial. Two weights at a time, for every sum waits for its last store."""
    sums[:, :] = ZERO
    for j in range(0, x.size, 2):
        x0, x1, w0, w1 = x[j], x[j + 1], w[j], w[j + 1]
        for t in range(inverse.size):
            u0, u1 = x0 * inverse[t], x1 * inverse[t]
            q0, q1 = NEAREST_LEVEL[half_step(u0)], NEAREST_LEVEL[half_step(u1)]
            wq0, wq1, r0, r1 = w0 * q0, w1 * q1, u0 - q0, u1 - q1
            sums[0, t] += wq0 * q0 + wq1 * q1
            sums[1, t] += wq0 * r0 + wq1 * r1
            sums[2, t] += w0 * r0 * r0 + w1 * r1 * r1


@jit
def refit(sums: Array, coarse: Real, inverse: Array, error: Array) -> None:
    """Moves every trial to the least-squares scale of its codes.

    error[lane] is what it leaves, and `coarse` times the square of the scale: between equals the finer one wins.
    """
    for t in range(inverse.size):
        sqq, srq, srr = sums[0, t], sums[1, t], sums[2, t]
        a = srq / sqq
        a = a if abs(ONE + a) > SMALLEST_FACTOR else ZERO
        error[t] = (max(srr - a * (srq + srq - a * sqq), ZERO) + coarse) / (inverse[t] * inverse[t])
        inverse[t] /= ONE + a


@jit
def write_levels(x: Array, inverse: Real, levels: Array) -> None:
    for j in range(x.size):
        levels[j] = np.int8(NEAREST_LEVEL[half_step(x[j] * inverse)])


@jit
def start_trials(x: Array, trials: Array, inverse: Array) -> bool:
    """Every trial lets the largest weight land on one level; false for a block of zeros."""
    largest = peak(x)
    if abs(largest) < NEGLIGIBLE:
        return False
    for t in range(trials.size):
        inverse[t] = trials[t] / largest
    return True


@jit
def search_blocks(blocks: Array, weights: Array, trials: Array, n_refits: int, out: tuple[Array, Array]) -> None:
    """Scale and codes of IQ4_NL's blocks.

    blocks float32 [n_blocks, 32], weights float32 [blocks_per_row, 32].
    trials float32 [n]: the levels that the largest weight of a block may land on.
    out: (scales float32 [n_blocks], values of float16; levels int8 like blocks).
    """
    scales, levels = out
    lanes, sums = np.empty((3, trials.size), np.float32), np.empty((3, trials.size), np.float32)
    inverse, error, rounded = lanes[0], lanes[1], lanes[2]
    for b in range(blocks.shape[0]):
        x, w = blocks[b], weights[b % weights.shape[0]]
        if not start_trials(x, trials, inverse):
            scales[b] = ZERO
            levels[b, :] = NEAREST_LEVEL[HALF_STEPS]
            continue
        for _ in range(n_refits):
            sum_residuals(x, w, inverse, sums)
            refit(sums, ZERO, inverse, error)
        largest = peak(x)
        for t in range(trials.size):
            rounded[t] = round_f16(ONE / inverse[t])
            inverse[t] = ONE / rounded[t] if rounded[t] != ZERO else ZERO
        sum_residuals(x, w, inverse, sums)
        for t in range(trials.size):
            # In units of the largest weight, whose own square may be outside of float32.
            unit = rounded[t] / largest
            error[t] = sums[2, t] * (unit * unit) if rounded[t] != ZERO else INFINITY
        best = lowest(error)
        # No level is zero: a block whose important weights all but vanish is better off without a scale.
        sum_xx = ZERO
        for j in range(x.size):
            sum_xx += w[j] * ((x[j] / largest) * (x[j] / largest))
        scales[b] = rounded[best] if error[best] < sum_xx else ZERO
        write_levels(x, inverse[best], levels[b])


@jit
def fit_sub_blocks(
    x: Array, w: Array, trials: Array, lanes: Array, sums: Array, fits: Array, curvature: Array, sum_xx: Array
) -> None:
    """Unrounded scale of every sub-block, and what a deviation from it costs: curvature times its square."""
    inverse, error = lanes[0], lanes[1]
    size = x.size // fits.size
    for i in range(fits.size):
        part = slice(i * size, (i + 1) * size)
        fits[i], curvature[i], sum_xx[i] = ZERO, ZERO, ZERO
        if not start_trials(x[part], trials, inverse):
            continue
        sum_w = ZERO
        for j in range(i * size, (i + 1) * size):
            sum_w += w[j]
            sum_xx[i] += w[j] * x[j] * x[j]
        sum_residuals(x[part], w[part], inverse, sums)
        refit(sums, COARSE_SCALE * sum_w, inverse, error)
        best = lowest(error)
        fits[i], curvature[i] = ONE / inverse[best], sums[0, best]


@jit
def propose_units(fits: Array, curvature: Array, unit_trials: Array, up: Real, lanes: Array, units: Array) -> None:
    """The most promising float16 units of the fitted scales times `up`: the best of N_UNITS stretches of the trials.

    unit_trials: the codes that the scale of the largest magnitude may land on.
    """
    trial, error = lanes[0], lanes[1]
    largest = peak(fits)
    for t in range(trial.size):
        trial[t] = round_f16(largest / unit_trials[t] * up)
        # Where float16 is coarse, the rounded unit decides how well the scales can be hit.
        error[t] = ZERO if trial[t] != ZERO else INFINITY
    for i in range(fits.size):
        fit = fits[i] * up
        for t in range(trial.size):
            scale = fit / trial[t] if trial[t] != ZERO else ZERO
            code = np.rint(min(max(scale, BOTTOM_SCALE), TOP_SCALE))
            r = (fit - trial[t] * code) / (largest * up)
            error[t] += curvature[i] * r * r
    stretch = trial.size // N_UNITS
    for n in range(N_UNITS):
        units[n] = trial[n * stretch + lowest(error[n * stretch : (n + 1) * stretch])]


@jit
def store_sub_blocks(
    x: Array, w: Array, fits: Array, sum_xx: Array, units: Array, lanes: Array, sums: Array, out: tuple[Array, Array]
) -> None:
    """For each of the units the best stored scale of every sub-block near its fit.

    out: stored[n, i], as a code; result[0..2, n]: the weighted error, and Sxq and Sqq of the unit.
    """
    stored, result = out
    inverse, scale, code = lanes[0], lanes[1], lanes[2]
    size = x.size // fits.size
    result[:, :] = ZERO
    for i in range(fits.size):
        for n in range(N_UNITS):
            below = np.floor(fits[i] / units[n]) if units[n] != ZERO else ZERO
            for k in range(N_NEIGHBOURS):
                t = n * N_NEIGHBOURS + k
                code[t] = min(max(below + np.float32(k - (N_NEIGHBOURS // 2 - 1)), BOTTOM_SCALE), TOP_SCALE)
                scale[t] = units[n] * code[t]
                inverse[t] = ONE / scale[t] if scale[t] != ZERO else ZERO
        part = slice(i * size, (i + 1) * size)
        sum_residuals(x[part], w[part], inverse, sums)
        for n in range(N_UNITS):
            least, best = sum_xx[i], -1
            for t in range(n * N_NEIGHBOURS, (n + 1) * N_NEIGHBOURS):
                error = sums[2, t] * (scale[t] * scale[t])
                if scale[t] != ZERO and error < least:
                    least, best = error, t
            result[0, n] += least
            stored[n, i] = ZERO
            if best < 0:
                continue
            stored[n, i] = code[best]
            result[1, n] += code[best] * (scale[best] * (sums[0, best] + sums[1, best]))
            result[2, n] += code[best] * code[best] * sums[0, best]


@jit
def search_super_blocks(
    blocks: Array, weights: Array, trials: Array, unit_trials: Array, n_refits: int, out: tuple[Array, Array, Array]
) -> None:
    """Scales and codes of IQ4_XS's super-blocks, decoded as d * scale * level.

    blocks float32 [n_blocks, 256], weights float32 [blocks_per_row, 256].
    trials float32 [n]: the levels that a sub-block's largest weight may land on.
    unit_trials float32 [N_UNITS * n]: the codes that the largest scale may land on.
    The best d so far is refitted n_refits times, beside its neighbours among float16.
    out: (d float32 [n_blocks], values of float16; scales int8 [n_blocks, n_sub]; levels int8 like blocks).
    """
    steps, scales, levels = out
    block_size, n_sub = blocks.shape[1], scales.shape[1]
    size = block_size // n_sub
    x = np.empty(block_size, np.float32)
    trial_lanes, trial_sums = np.empty((2, trials.size), np.float32), np.empty((3, trials.size), np.float32)
    lanes = np.empty((3, N_UNITS * N_NEIGHBOURS), np.float32)
    sums, unit_lanes = np.empty(lanes.shape, np.float32), np.empty((2, unit_trials.size), np.float32)
    fits, curvature, sum_xx = np.empty(n_sub, np.float32), np.empty(n_sub, np.float32), np.empty(n_sub, np.float32)
    stored, best_stored = np.empty((N_UNITS, n_sub), np.float32), np.empty(n_sub, np.float32)
    units, d, result = np.empty(N_UNITS, np.float32), np.empty(N_UNITS, np.float32), np.empty((3, N_UNITS), np.float32)
    for b in range(blocks.shape[0]):
        block, w = blocks[b], weights[b % weights.shape[0]]
        largest = peak(block)
        steps[b], scales[b], levels[b] = ZERO, 0, NEAREST_LEVEL[HALF_STEPS]
        if abs(largest) < NEGLIGIBLE:
            continue
        exponent = power_of_two(abs(largest))
        up, down = np.float32(math.ldexp(1.0, exponent)), np.float32(math.ldexp(1.0, -exponent))
        for j in range(block_size):
            x[j] = block[j] * down
        fit_sub_blocks(x, w, trials, trial_lanes, trial_sums, fits, curvature, sum_xx)
        propose_units(fits, curvature, unit_trials, up, unit_lanes, d)
        best_error, refitted = INFINITY, ZERO
        for round_ in range(1 + n_refits):
            for n in range(N_UNITS):
                if round_ > 0:
                    d[n] = next_f16(refitted, np.float32(n % 3 - 1))
                units[n] = d[n] * down
            store_sub_blocks(x, w, fits, sum_xx, units, lanes, sums, (stored, result))
            for n in range(N_UNITS):
                if result[0, n] < best_error:
                    best_error, steps[b] = result[0, n], d[n]
                    best_stored[:] = stored[n]
                    refitted = round_f16(result[1, n] / result[2, n] * up) if result[2, n] > ZERO else d[n]
        for i in range(n_sub):
            part = slice(i * size, (i + 1) * size)
            scales[b, i] = np.int8(best_stored[i])
            scale = steps[b] * down * best_stored[i]
            write_levels(x[part], ONE / scale if scale != ZERO else ZERO, levels[b, part])
