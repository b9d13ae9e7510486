"""Search for the codes of formats that store a scale and a minimum: x = scale * code + low, code in 0 .. top_code.

A lane is a trial: one block's weights meet many trial scales side by side, and the inner loops run over the trials.
Nothing is summed across lanes, so strict floating point does not stop the compiler from using vector registers.

A trial range is followed by the least-squares scale and low of its codes in closed form. With u = (x - low) / scale =
q + r (q the code, r what rounding left) the best change of the scale by the factor 1 + a and of low by b * scale has
    a = (Srq Sw - Sr Sq) / (Sqq Sw - Sq^2),  b = (Sr Sqq - Srq Sq) / (Sqq Sw - Sq^2)
and leaves the error scale^2 (Srr - a Srq - b Sr), S being sums weighted by importance. Sums of r, rather than of x,
keep their digits when the error is small. Among stored scales and minima the error alone is compared.

The kernels return codes; the modules of the formats pack them into bytes.
"""

import math
from typing import NamedTuple

import numpy as np

from bitwright.formats.choices import Effort
from bitwright.formats.compiler import Array, Real, inlined, jit
from bitwright.formats.encoding import to_blocks
from bitwright.formats.kernels.float16 import power_of_two, round_f16
from bitwright.formats.kernels.lanes import lowest
from bitwright.formats.parts import ScalarBlocks, ScalarParts

ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
INFINITY = np.float32(np.inf)
# A determinant below this share of its first term is rounding noise: all weight lies on one code.
SINGULAR = np.float32(1e-6)
# The relative spacing of float16, at its least.
F16_SPACING = np.float32(2**-11)
# Of two scales with the same error, as round an outlier, the larger would spoil the unit of all scales.
COARSE_SCALE = np.float32(1e-5)

Pair = tuple[Real, Real]
Trials = tuple[Array, int]
Lanes = tuple[Array, Array]


class BlockEffort(NamedTuple):
    """clips: float32 [2, n], by how many steps a trial's range is cut at either end, negative to widen it.
    neighbours: float32 [2, n], scales and lows that are tried around the least-squares fit of the best trial, in
    spacings of float16, for beside a low far from zero the rounding of either is not small.
    n_fits: how often a trial range is fitted."""

    clips: Array
    neighbours: Array
    n_fits: int


class SuperBlockEffort(NamedTuple):
    """clips, n_fits: as of BlockEffort, of a sub-block.
    neighbours: float32 [2, n], stored scales and minima that are tried, as distances from the integers below the fit.
    step_trials: float32 [n, 2], the codes that the largest scale and the largest minimum are tried on.
    n_refits: how often the best d and dmin so far are refitted."""

    clips: Array
    neighbours: Array
    step_trials: Array
    n_fits: int
    n_refits: int


def clip_grid(n_low: int, n_high: int, widest: float, narrowest: float = 2) -> np.ndarray:
    """Trial ranges, float32 [2, n_low * n_high]: steps cut from the lower end times steps cut from the upper one.

    A range that is wider than the weights leaves codes unused, but draws the others' rounding anew.
    """
    low, high = np.linspace(widest, narrowest, n_low), np.linspace(widest, narrowest, n_high)
    return np.stack([grid.ravel() for grid in np.meshgrid(low, high, indexing="ij")]).astype(np.float32)


def neighbour_grid(n_scales: int, n_minima: int) -> np.ndarray:
    """Distances from the integers below an optimum, float32 [2, n_scales * n_minima]: of scales times of minima."""
    scales, minima = (np.arange(n, dtype=np.float32) - (n // 2 - 1) for n in (n_scales, n_minima))
    return np.stack([grid.ravel() for grid in np.meshgrid(scales, minima, indexing="ij")])


def search_parts(
    rows: np.ndarray,
    importance: np.ndarray | None,
    effort: Effort,
    of: ScalarBlocks,
    efforts: dict[Effort, SuperBlockEffort],
) -> ScalarParts:
    """The parts of super-blocks of sub-blocks with a scale and a minimum each; arguments as block_format.Search has
    them."""
    blocks, weights = to_blocks(rows, importance, of.block_size)
    steps, codes = np.empty((len(blocks), 2), np.float32), np.empty(blocks.shape, np.uint8)
    scales = np.empty((len(blocks), 2, of.n_sub), np.uint8)
    tops = np.float32(of.levels[-1]), np.float32(of.scale_table[-1])
    search_super_blocks(blocks, weights, tops, efforts[effort], (steps, scales, codes))
    return ScalarParts(steps, scales.astype(np.int16), codes.view(np.int8))


@inlined
def span(x: Array, first: int, last: int) -> Pair:
    """Least and greatest weight of x[first:last]."""
    low0, low1, high0, high1 = x[first], x[first + 1], x[first], x[first + 1]
    for j in range(first + 2, last, 2):
        low0, low1 = min(low0, x[j]), min(low1, x[j + 1])
        high0, high1 = max(high0, x[j]), max(high1, x[j + 1])
    return min(low0, low1), max(high0, high1)


@inlined
def sum_residuals(
    x: Array, w: Array, first: int, last: int, inverse: Array, low: Array, top_code: Real, sums: Array
) -> None:
    """sums[0..4, lane] = Sq, Sqq, Sr, Srq, Srr of x[first:last]. Two weights at a time: sums wait for their stores."""
    sums[:, :] = ZERO
    for j in range(first, last, 2):
        x0, x1, w0, w1 = x[j], x[j + 1], w[j], w[j + 1]
        for t in range(inverse.size):
            u0, u1 = (x0 - low[t]) * inverse[t], (x1 - low[t]) * inverse[t]
            q0, q1 = np.rint(min(max(u0, ZERO), top_code)), np.rint(min(max(u1, ZERO), top_code))
            wq0, wq1, wr0, wr1 = w0 * q0, w1 * q1, w0 * (u0 - q0), w1 * (u1 - q1)
            sums[0, t] += wq0 + wq1
            sums[1, t] += wq0 * q0 + wq1 * q1
            sums[2, t] += wr0 + wr1
            sums[3, t] += wr0 * q0 + wr1 * q1
            sums[4, t] += wr0 * (u0 - q0) + wr1 * (u1 - q1)


@inlined
def sum_squares(
    x: Array, w: Array, first: int, last: int, inverse: Array, low: Array, top_code: Real, error: Array
) -> None:
    """error[lane] = Srr of x[first:last]. Four weights at a time, as every lane's sum waits for its last store."""
    error[:] = ZERO
    for j in range(first, last, 4):
        x0, x1, x2, x3 = x[j], x[j + 1], x[j + 2], x[j + 3]
        w0, w1, w2, w3 = w[j], w[j + 1], w[j + 2], w[j + 3]
        for t in range(inverse.size):
            u0, u1 = (x0 - low[t]) * inverse[t], (x1 - low[t]) * inverse[t]
            u2, u3 = (x2 - low[t]) * inverse[t], (x3 - low[t]) * inverse[t]
            u0 -= np.rint(min(max(u0, ZERO), top_code))
            u1 -= np.rint(min(max(u1, ZERO), top_code))
            u2 -= np.rint(min(max(u2, ZERO), top_code))
            u3 -= np.rint(min(max(u3, ZERO), top_code))
            error[t] += (w0 * (u0 * u0) + w1 * (u1 * u1)) + (w2 * (u2 * u2) + w3 * (u3 * u3))


@inlined
def refit(sums: Array, sum_w: Real, coarse: Real, ceiling: Real, inverse: Array, low: Array, error: Array) -> None:
    """Moves every trial to the least-squares scale and low of its codes.

    error[lane] is what they leave, and `coarse` times the square of the scale: between equals the finer one wins.
    """
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
        error[t] = (max(left, ZERO) + coarse) * step * step
        low[t] += b * step
        inverse[t] /= ONE + a


@inlined
def fit_block(
    x: Array, w: Array, first: int, last: int, sum_w: Real, limits: Pair, trials: Trials, room: Lanes
) -> tuple[Real, Real, Real]:
    """(scale, low, mean code) of the best trial for x[first:last].

    limits: the greatest code, and what low is at most; trials: clips and n_fits; room: float32 [3, n] and [5, n].
    """
    (top_code, ceiling), (clips, n_fits), (lanes, sums) = limits, trials, room
    inverse, low, error = lanes[0], lanes[1], lanes[2]
    least, greatest = span(x, first, last)
    least = min(least, ceiling)
    width = greatest - least
    best_error, best_scale, best_low, mean_code = INFINITY, ZERO, least, ZERO
    if width > ZERO:
        for t in range(inverse.size):
            low[t] = least + clips[0, t] * width / top_code
            inverse[t] = (top_code / width) / (ONE - (clips[0, t] + clips[1, t]) / top_code)
        for _ in range(n_fits):
            sum_residuals(x, w, first, last, inverse, low, top_code, sums)
            refit(sums, sum_w, COARSE_SCALE * sum_w, ceiling, inverse, low, error)
            best = lowest(error)
            if error[best] < best_error:
                best_error, best_scale, best_low = error[best], ONE / inverse[best], low[best]
                mean_code = sums[0, best] / sum_w
    return best_scale, best_low, mean_code


@jit
def search_blocks(blocks: Array, weights: Array, top_code: Real, effort: BlockEffort, out: tuple[Array, Array]) -> None:
    """Scale, minimum and codes of blocks with a float16 scale and a float16 low, decoded as scale * code + low.

    blocks float32 [n_blocks, block_size], weights float32 [blocks_per_row, block_size].
    out: (scale and low float32 [n_blocks, 2], codes uint8 like blocks).
    """
    clips, neighbours, n_fits = effort
    steps, codes = out
    size = blocks.shape[1]
    x, w = np.empty(size, np.float32), np.empty(size, np.float32)
    room = np.empty((3, clips.shape[1]), np.float32), np.empty((5, clips.shape[1]), np.float32)
    n_lanes = neighbours.shape[1]
    lanes = np.empty((4, n_lanes), np.float32)
    scales, lows, inverse, error = lanes[0], lanes[1], lanes[2], lanes[3]
    for b in range(blocks.shape[0]):
        column = b % weights.shape[0]
        for j in range(size):
            x[j], w[j] = blocks[b, j], weights[column, j]
        least, greatest = span(x, 0, size)
        exponent = power_of_two(max(-least, greatest))
        up, down = np.float32(math.ldexp(1.0, exponent)), np.float32(math.ldexp(1.0, -exponent))
        sum_w, sum_wx, sum_wxx = ZERO, ZERO, ZERO
        for j in range(size):
            x[j] *= down
            sum_w += w[j]
            sum_wx += w[j] * x[j]
            sum_wxx += w[j] * x[j] * x[j]
        scale, low, _ = fit_block(x, w, 0, size, sum_w, (top_code, INFINITY), (clips, n_fits), room)
        for t in range(n_lanes):
            scales[t] = round_f16(scale * (ONE + neighbours[0, t] * F16_SPACING) * up) * down
            lows[t] = round_f16(low * (ONE + neighbours[1, t] * F16_SPACING) * up) * down
            inverse[t] = ONE / scales[t] if scales[t] > ZERO else ZERO
        sum_squares(x, w, 0, size, inverse, lows, top_code, error)
        for t in range(n_lanes):
            flat = sum_wxx - lows[t] * (sum_wx + sum_wx - lows[t] * sum_w)
            error[t] = error[t] * (scales[t] * scales[t]) if scales[t] > ZERO else flat
        best = lowest(error)
        steps[b, 0], steps[b, 1] = scales[best] * up, lows[best] * up
    # In a loop of its own: beside the search it was not vectorised.
    for b in range(blocks.shape[0]):
        inverse_scale, least = ONE / steps[b, 0] if steps[b, 0] > ZERO else ZERO, steps[b, 1]
        for j in range(size):
            codes[b, j] = np.uint8(np.rint(min(max((blocks[b, j] - least) * inverse_scale, ZERO), top_code)))


@inlined
def store_sub_blocks(
    x: Array, w: Array, fits: Array, units: Pair, tops: Pair, neighbours: Array, lanes: Array, stored: Array
) -> Real:
    """Gives every sub-block the best stored scale and minimum near its fit: stored[:, i], as codes.

    units: d and dmin; tops: the greatest code of a weight, and of a scale or minimum. Returns the weighted error.
    """
    (d, dmin), (top_code, top_scale) = units, tops
    n_sub, size = fits.shape[0], x.size // fits.shape[0]
    inverse, low, error, scale_codes, min_codes = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4]
    total = ZERO
    for i in range(n_sub):
        fit_scale, fit_minimum, mean_code, sum_w, sum_wx, sum_wxx = fits[i]
        below = np.floor(fit_scale / d) if d > ZERO else ZERO
        for t in range(inverse.size):
            scale_codes[t] = min(max(below + neighbours[0, t], ZERO), top_scale)
            scale = d * scale_codes[t]
            inverse[t] = ONE / scale if scale > ZERO else ZERO
            # Where the scale grows, the minimum follows, so that the mean of the decoded weights stays.
            minimum = fit_minimum + (scale - fit_scale) * mean_code
            code = (np.floor(minimum / dmin) if dmin > ZERO else ZERO) + neighbours[1, t]
            min_codes[t] = min(max(code, ZERO), top_scale)
            low[t] = -(dmin * min_codes[t])
        sum_squares(x, w, i * size, (i + 1) * size, inverse, low, top_code, error)
        for t in range(inverse.size):
            scale = d * scale_codes[t]
            flat = sum_wxx - low[t] * (sum_wx + sum_wx - low[t] * sum_w)
            error[t] = error[t] * (scale * scale) if scale > ZERO else max(flat, ZERO)
        best = lowest(error)
        total += error[best]
        stored[0, i], stored[1, i] = scale_codes[best], min_codes[best]
    return total


@inlined
def refit_steps(
    x: Array, w: Array, fits: Array, stored: Array, d: Real, dmin: Real, top_code: Real, terms: Array
) -> Pair:
    """The least-squares d and dmin of the codes under the stored scales and minima; terms: room for [3, x.size].

    Those that went in where the equations do not determine them.
    """
    n_sub, size = fits.shape[0], x.size // fits.shape[0]
    ss, sm, mm, sx, mx = ZERO, ZERO, ZERO, ZERO, ZERO
    for i in range(n_sub):
        first, last = i * size, (i + 1) * size
        s, m = stored[0, i], stored[1, i]
        scale, minimum = d * s, dmin * m
        inverse = ONE / scale if scale > ZERO else ZERO
        for j in range(first, last):
            q = np.rint(min(max((x[j] + minimum) * inverse, ZERO), top_code))
            terms[0, j], terms[1, j], terms[2, j] = w[j] * q, w[j] * (q * q), w[j] * (q * x[j])
        sq, sqq, sxq = ZERO, ZERO, ZERO
        for j in range(first, last):
            sq, sqq, sxq = sq + terms[0, j], sqq + terms[1, j], sxq + terms[2, j]
        ss += s * s * sqq
        sm += s * m * sq
        mm += m * m * fits[i, 3]
        sx += s * sxq
        mx += m * fits[i, 4]
    determinant = ss * mm - sm * sm
    new_d, new_dmin = d, dmin
    if determinant > SINGULAR * ss * mm:
        # decoded = d (s q) - dmin m, hence the signs of the mixed terms
        new_d, new_dmin = (sx * mm - mx * sm) / determinant, (sx * sm - mx * ss) / determinant
    if not (new_d > ZERO and new_dmin >= ZERO) or not determinant > SINGULAR * ss * mm:
        new_d, new_dmin = ((sx + dmin * sm) / ss if ss > ZERO else d), dmin
    return (new_d, new_dmin) if new_d > ZERO else (d, dmin)


@jit
def search_super_blocks(
    blocks: Array, weights: Array, tops: Pair, effort: SuperBlockEffort, out: tuple[Array, Array, Array]
) -> None:
    """Scales, minima and codes of super-blocks, decoded as d * scale * code - dmin * minimum.

    blocks float32 [n_blocks, block_size], weights float32 [blocks_per_row, block_size].
    tops: the greatest code of a weight, and of a scale or minimum.
    Every step trial stores scales and minima in its own units.
    out: (d and dmin float32 [n_blocks, 2], scales and minima uint8 [n_blocks, 2, n_sub], codes uint8 like blocks).
    """
    top_code = tops[0]
    clips, neighbours, step_trials, n_fits, n_refits = effort
    steps, scales, codes = out
    block_size, n_sub, n_starts = blocks.shape[1], scales.shape[2], step_trials.shape[0]
    size = block_size // n_sub
    x, w = np.empty(block_size, np.float32), np.empty(block_size, np.float32)
    terms = np.empty((3, block_size), np.float32)
    room = np.empty((3, clips.shape[1]), np.float32), np.empty((5, clips.shape[1]), np.float32)
    lanes = np.empty((5, neighbours.shape[1]), np.float32)
    # Of each sub-block: scale, minimum, mean code, Sw, Swx, Swxx.
    fits = np.empty((n_sub, 6), np.float32)
    stored, best_stored = np.empty((2, n_sub), np.float32), np.empty((2, n_sub), np.float32)
    for b in range(blocks.shape[0]):
        column = b % weights.shape[0]
        for j in range(block_size):
            x[j], w[j] = blocks[b, j], weights[column, j]
        least, greatest = span(x, 0, block_size)
        exponent = power_of_two(max(-least, greatest))
        up, down = np.float32(math.ldexp(1.0, exponent)), np.float32(math.ldexp(1.0, -exponent))
        for j in range(block_size):
            x[j] *= down
        largest_scale, largest_minimum = ZERO, ZERO
        for i in range(n_sub):
            first, last = i * size, (i + 1) * size
            sum_w, sum_wx, sum_wxx = ZERO, ZERO, ZERO
            for j in range(first, last):
                sum_w += w[j]
                sum_wx += w[j] * x[j]
                sum_wxx += w[j] * x[j] * x[j]
            scale, low, mean_code = fit_block(x, w, first, last, sum_w, (top_code, ZERO), (clips, n_fits), room)
            fits[i, 0], fits[i, 1], fits[i, 2] = scale, -low, mean_code
            fits[i, 3], fits[i, 4], fits[i, 5] = sum_w, sum_wx, sum_wxx
            largest_scale, largest_minimum = max(largest_scale, scale), max(largest_minimum, -low)
        best_error, best_d, best_dmin = INFINITY, ZERO, ZERO
        best_stored[:, :] = ZERO
        for n in range(n_starts + n_refits):
            if n < n_starts:
                d, dmin = largest_scale / step_trials[n, 0], largest_minimum / step_trials[n, 1]
            else:
                d, dmin = refit_steps(x, w, fits, best_stored, best_d, best_dmin, top_code, terms)
            d, dmin = round_f16(d * up) * down, round_f16(dmin * up) * down
            error = store_sub_blocks(x, w, fits, (d, dmin), tops, neighbours, lanes, stored)
            if error < best_error:
                best_error, best_d, best_dmin = error, d, dmin
                best_stored[:, :] = stored
        steps[b, 0], steps[b, 1] = best_d * up, best_dmin * up
        for i in range(n_sub):
            scales[b, 0, i], scales[b, 1, i] = np.uint8(best_stored[0, i]), np.uint8(best_stored[1, i])
    # In a loop of its own: beside the search it was not vectorised.
    for b in range(blocks.shape[0]):
        for i in range(n_sub):
            scale, minimum = steps[b, 0] * np.float32(scales[b, 0, i]), steps[b, 1] * np.float32(scales[b, 1, i])
            inverse = ONE / scale if scale > ZERO else ZERO
            for j in range(i * size, (i + 1) * size):
                codes[b, j] = np.uint8(np.rint(min(max((blocks[b, j] + minimum) * inverse, ZERO), top_code)))
