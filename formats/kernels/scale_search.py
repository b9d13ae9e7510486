"""Search for the codes of formats that store a scale and no minimum: x = scale * code, code in bottom .. top.

A lane is a trial: one block's weights meet many trial scales side by side, and the inner loops run over the trials.
Nothing is summed across lanes, so strict floating point does not stop the compiler from using vector registers.

Many trials, spread widely, and the least-squares scale of the best one's codes: for a block this comes within some
thousandths of the best of all float16 scales, where few trials that are all refitted stay some hundredths above it.
The scales worth trying reach from those that cut the largest weight to half, as it may matter less than the others, to
those that leave a third of the codes unused, as they may happen to fit.

Scales may be negative: the codes reach one further below zero than above, and the longer side can serve either sign.

The kernels return codes; the modules of the formats pack them into bytes.
"""

import math
from typing import NamedTuple

import numpy as np

from bitwright.formats.choices import Effort
from bitwright.formats.compiler import Array, Real, inlined, jit
from bitwright.formats.encoding import to_blocks
from bitwright.formats.kernels.float16 import NEGLIGIBLE, next_f16, power_of_two, round_f16
from bitwright.formats.kernels.lanes import lowest
from bitwright.formats.parts import ScalarBlocks, ScalarParts, scaled_sub_blocks

ZERO, ONE = np.float32(0), np.float32(1)
INFINITY = np.float32(np.inf)
# Of two scales with the same error, as round an outlier, the larger would spoil the unit of all scales.
COARSE_SCALE = np.float32(1e-5)
# Subnormal float16 of at most 128 spacings.
COARSE_STEP = np.float32(2**-17)

Range = tuple[Real, Real]
"""The least and the greatest code."""
Ranges = tuple[Range, Range]
"""Of weights and of scales."""


class SuperBlockEffort(NamedTuple):
    """trials, step_trials: float32 [n], codes that a sub-block's largest weight, and the largest scale, may land on.
    neighbours: float32 [n], stored scales that are tried, as distances from the integer below the unrounded optimum.
    n_refits: how often the best d so far is refitted."""

    trials: Array
    neighbours: Array
    step_trials: Array
    n_refits: int


def search_parts(
    rows: np.ndarray,
    importance: np.ndarray | None,
    effort: Effort,
    of: ScalarBlocks,
    efforts: dict[Effort, SuperBlockEffort],
) -> ScalarParts:
    """The parts of super-blocks of sub-blocks with a scale each; arguments as block_format.Search has them."""
    blocks, weights = to_blocks(rows, importance, of.block_size)
    d, codes = np.empty(len(blocks), np.float32), np.empty(blocks.shape, np.int8)
    scales = np.empty((len(blocks), of.n_sub), np.int8)
    ranges = (
        (np.float32(of.levels[0]), np.float32(of.levels[-1])),
        (np.float32(of.scale_table[0]), np.float32(of.scale_table[-1])),
    )
    search_super_blocks(blocks, weights, ranges, efforts[effort], (d, scales, codes))
    return scaled_sub_blocks(d, scales - of.scale_table[0], codes)


@inlined
def peak(x: Array, first: int, last: int) -> Real:
    """The weight of the largest magnitude of x[first:last], with its sign."""
    low0, low1, high0, high1 = ZERO, ZERO, ZERO, ZERO
    for j in range(first, last, 2):
        low0, low1 = min(low0, x[j]), min(low1, x[j + 1])
        high0, high1 = max(high0, x[j]), max(high1, x[j + 1])
    low, high = min(low0, low1), max(high0, high1)
    return high if high > -low else low


@inlined
def sum_squares(
    x: Array, w: Array, first: int, last: int, inverse: Array, bottom: Real, top: Real, error: Array
) -> None:
    """error[lane] = the sum of w (x * inverse - code)^2 over x[first:last].

    Four weights at a time, as every lane's sum has to wait for its last store.
    """
    error[:] = ZERO
    for j in range(first, last, 4):
        x0, x1, x2, x3 = x[j], x[j + 1], x[j + 2], x[j + 3]
        w0, w1, w2, w3 = w[j], w[j + 1], w[j + 2], w[j + 3]
        for t in range(inverse.size):
            u0, u1, u2, u3 = x0 * inverse[t], x1 * inverse[t], x2 * inverse[t], x3 * inverse[t]
            u0 -= np.rint(min(max(u0, bottom), top))
            u1 -= np.rint(min(max(u1, bottom), top))
            u2 -= np.rint(min(max(u2, bottom), top))
            u3 -= np.rint(min(max(u3, bottom), top))
            error[t] += (w0 * u0 * u0 + w1 * u1 * u1) + (w2 * u2 * u2 + w3 * u3 * u3)


@inlined
def sum_products(
    x: Array, w: Array, first: int, last: int, inverse: Real, bottom: Real, top: Real, terms: Array
) -> tuple[Real, Real]:
    """Swxq and Swqq of the codes q of x[first:last] under one scale. terms: room for [2, x.size]."""
    for j in range(first, last):
        q = np.rint(min(max(x[j] * inverse, bottom), top))
        terms[0, j], terms[1, j] = w[j] * (x[j] * q), w[j] * (q * q)
    xq0, xq1, qq0, qq1 = ZERO, ZERO, ZERO, ZERO
    for j in range(first, last, 2):
        xq0, xq1 = xq0 + terms[0, j], xq1 + terms[0, j + 1]
        qq0, qq1 = qq0 + terms[1, j], qq1 + terms[1, j + 1]
    return xq0 + xq1, qq0 + qq1


@jit
def search_blocks(
    blocks: Array, weights: Array, bottom: Real, top: Real, trials: Array, n_refits: int, out: tuple[Array, Array]
) -> None:
    """Scale and codes of blocks with one float16 scale, decoded as scale * code.

    blocks float32 [n_blocks, block_size], weights float32 [blocks_per_row, block_size].
    trials float32 [n_trials]: the codes that the largest weight of a block may land on; each is judged with its scale
    rounded to float16, and the best one is refitted n_refits times. The rounded refit is never worse.
    out: (scales float32 [n_blocks], codes int8 like blocks).
    """
    scales, codes = out
    size = blocks.shape[1]
    x, w, terms = np.empty(size, np.float32), np.empty(size, np.float32), np.empty((2, size), np.float32)
    lanes = np.empty((3, trials.size), np.float32)
    inverse, error, rounded = lanes[0], lanes[1], lanes[2]
    for b in range(blocks.shape[0]):
        column = b % weights.shape[0]
        for j in range(size):
            x[j], w[j] = blocks[b, j], weights[column, j]
        largest = peak(x, 0, size)
        if abs(largest) < NEGLIGIBLE:
            scales[b] = ZERO
            continue
        for t in range(trials.size):
            rounded[t] = round_f16(largest / trials[t])
            inverse[t] = ONE / rounded[t] if rounded[t] != ZERO else ZERO
        sum_squares(x, w, 0, size, inverse, bottom, top, error)
        for t in range(trials.size):
            # In units of the largest weight, whose own square may be outside of float32.
            unit = rounded[t] / largest
            error[t] = error[t] * (unit * unit) if rounded[t] != ZERO else INFINITY
        scale = rounded[lowest(error)]
        for _ in range(n_refits):
            if scale != ZERO:
                sum_xq, sum_qq = sum_products(x, w, 0, size, ONE / scale, bottom, top, terms)
                refitted = round_f16(sum_xq / sum_qq) if sum_qq > ZERO else ZERO
                scale = refitted if refitted != ZERO else scale
        scales[b] = scale
    # In a loop of its own: beside the search it was not vectorised.
    for b in range(blocks.shape[0]):
        inverse_scale = ONE / scales[b] if scales[b] != ZERO else ZERO
        for j in range(size):
            codes[b, j] = np.int8(np.rint(min(max(blocks[b, j] * inverse_scale, bottom), top)))


@inlined
def fit_scale(
    x: Array, w: Array, first: int, last: int, code_range: Range, trials: Array, lanes: Array, terms: Array
) -> Real:
    """The scale of the best trial, refitted; trials are the codes that the largest weight may land on. 0 for zeros."""
    bottom, top = code_range
    largest = peak(x, first, last)
    scale = ZERO
    if largest != ZERO:
        inverse, error = lanes[0], lanes[1]
        sum_w = ZERO
        for j in range(first, last):
            sum_w += w[j]
        for t in range(trials.size):
            inverse[t] = trials[t] / largest
        sum_squares(x, w, first, last, inverse, bottom, top, error)
        for t in range(trials.size):
            error[t] = (error[t] + COARSE_SCALE * sum_w) / (inverse[t] * inverse[t])
        best = inverse[lowest(error)]
        sum_xq, sum_qq = sum_products(x, w, first, last, best, bottom, top, terms)
        scale = sum_xq / sum_qq if sum_qq > ZERO else ONE / best
    return scale


@inlined
def store_sub_blocks(
    x: Array, w: Array, fits: Array, d: Real, ranges: Ranges, neighbours: Array, lanes: Array, stored: Array
) -> Real:
    """Gives every sub-block the best stored scale near its fit: stored[i], as a code. Returns the weighted error.

    fits float32 [2, n_sub]: the unrounded scales, and what a scale of zero leaves.
    """
    (bottom, top), (bottom_scale, top_scale) = ranges
    n_sub, size = stored.size, x.size // stored.size
    inverse, scale_codes, error = lanes[0], lanes[1], lanes[2]
    total = ZERO
    for i in range(n_sub):
        below = np.floor(fits[0, i] / d) if d != ZERO else ZERO
        for t in range(neighbours.size):
            scale_codes[t] = min(max(below + neighbours[t], bottom_scale), top_scale)
            scale = d * scale_codes[t]
            inverse[t] = ONE / scale if scale != ZERO else ZERO
        sum_squares(x, w, i * size, (i + 1) * size, inverse, bottom, top, error)
        for t in range(neighbours.size):
            scale = d * scale_codes[t]
            error[t] = error[t] * (scale * scale) if scale != ZERO else fits[1, i]
        best = lowest(error)
        stored[i] = scale_codes[best]
        total += error[best]
    return total


@inlined
def refit_step(x: Array, w: Array, stored: Array, d: Real, code_range: Range, terms: Array) -> Real:
    """The least-squares d of the codes under the stored scales. terms: room for [2, x.size]."""
    (bottom, top), size = code_range, x.size // stored.size
    for i in range(stored.size):
        scale = d * stored[i]
        inverse = ONE / scale if scale != ZERO else ZERO
        for j in range(i * size, (i + 1) * size):
            q = stored[i] * np.rint(min(max(x[j] * inverse, bottom), top))
            terms[0, j], terms[1, j] = w[j] * (x[j] * q), w[j] * (q * q)
    xq0, xq1, qq0, qq1 = ZERO, ZERO, ZERO, ZERO
    for j in range(0, x.size, 2):
        xq0, xq1 = xq0 + terms[0, j], xq1 + terms[0, j + 1]
        qq0, qq1 = qq0 + terms[1, j], qq1 + terms[1, j + 1]
    qq = qq0 + qq1
    return (xq0 + xq1) / qq if qq > ZERO else d


@jit
def search_super_blocks(
    blocks: Array, weights: Array, ranges: Ranges, effort: SuperBlockEffort, out: tuple[Array, Array, Array]
) -> None:
    """Scales and codes of super-blocks, decoded as d * scale * code.

    blocks float32 [n_blocks, block_size], weights float32 [blocks_per_row, block_size].
    Every step trial stores the scales in its own units; the best d so far is refitted, and where float16 is coarse its
    two neighbours are tried.
    out: (d float32 [n_blocks], scales int8 [n_blocks, n_sub], codes int8 like blocks).
    """
    steps, scales, codes = out
    trials, neighbours, step_trials, n_refits = effort
    (bottom, top), _ = ranges
    block_size, n_sub, n_starts = blocks.shape[1], scales.shape[1], step_trials.size
    size = block_size // n_sub
    x, w = np.empty(block_size, np.float32), np.empty(block_size, np.float32)
    terms = np.empty((2, block_size), np.float32)
    trial_lanes, lanes = np.empty((2, trials.size), np.float32), np.empty((3, neighbours.size), np.float32)
    fits = np.empty((2, n_sub), np.float32)
    stored, best_stored = np.empty(n_sub, np.float32), np.empty(n_sub, np.float32)
    for b in range(blocks.shape[0]):
        column = b % weights.shape[0]
        for j in range(block_size):
            x[j], w[j] = blocks[b, j], weights[column, j]
        exponent = power_of_two(abs(peak(x, 0, block_size)))
        up, down = np.float32(math.ldexp(1.0, exponent)), np.float32(math.ldexp(1.0, -exponent))
        for j in range(block_size):
            x[j] *= down
        for i in range(n_sub):
            first, last = i * size, (i + 1) * size
            fits[1, i] = ZERO
            for j in range(first, last):
                fits[1, i] += w[j] * x[j] * x[j]
            fits[0, i] = fit_scale(x, w, first, last, ranges[0], trials, trial_lanes, terms)
        largest = peak(fits[0], 0, n_sub)
        best_error, best_d = INFINITY, ZERO
        best_stored[:] = ZERO
        n, n_rounds = 0, n_starts + n_refits
        while n < n_rounds or (n < n_rounds + 2 and abs(best_d) < COARSE_STEP):
            if n < n_starts:
                d = round_f16(largest / step_trials[n] * up)
            elif n < n_rounds:
                d = round_f16(refit_step(x, w, best_stored, best_d * down, ranges[0], terms) * up)
            else:
                d = next_f16(best_d, ONE if n == n_rounds else -ONE)
            n += 1
            error = store_sub_blocks(x, w, fits, d * down, ranges, neighbours, lanes, stored)
            if error < best_error:
                best_error, best_d = error, d
                best_stored[:] = stored
        steps[b] = best_d
        for i in range(n_sub):
            scales[b, i] = np.int8(best_stored[i])
    # In a loop of its own: beside the search it was not vectorised.
    for b in range(blocks.shape[0]):
        for i in range(n_sub):
            scale = steps[b] * np.float32(scales[b, i])
            inverse_scale = ONE / scale if scale != ZERO else ZERO
            for j in range(i * size, (i + 1) * size):
                codes[b, j] = np.int8(np.rint(min(max(blocks[b, j] * inverse_scale, bottom), top)))
