"""Kernels that search the codes of IQ1, IQ2 and IQ3: a group of 4 or 8 weights is a scale times a point of a codebook.

A sub-block's scale is an odd multiple 2 code + 1 of the super-block's unit, stored as float16 d. For a group x with
weights w, a point g at the scale s leaves the error s^2 B - 2 s A + const with A = sum(w x g) and B = sum(w g^2), which
do not depend on s: once A and B of the candidate points are known, a further scale costs two operations a point.

A lane is a trial: the candidates of a group meet many scales side by side. Nothing is summed across lanes, so strict
floating point does not stop the compiler from using vector registers. The least error comes first, and which point it
belongs to is asked for the winning scale alone.

What the formats do about signs:
  SIGNED   the points have signs; where there are variants, all coordinates of a group are shifted by +1 (variant 0)
           or -1 (variant 1)
  FREE     a sign bit a weight
  PARITY   sign bits that must be even in number over 8 weights. The cheapest sign to get wrong costs 4 s min(w |x| g),
           which goes into A: so the search stays exact. A variant is the parity of a group's signs.
Groups that share their variant come `span` after each other.
"""

import math
from typing import NamedTuple

import numpy as np

from bitwright.formats.compiler import Array, Real, inlined, jit
from bitwright.formats.kernels.float16 import NEGLIGIBLE, f16_step, power_of_two, round_f16
from bitwright.formats.kernels.lanes import lowest
from bitwright.formats.parts import Layout, PointParts

SIGNED, FREE, PARITY = 0, 1, 2
ZERO, ONE, TWO, FOUR, HALF = np.float32(0), np.float32(1), np.float32(2), np.float32(4), np.float32(0.5)
INFINITY = np.float32(np.inf)
# Of two scales with the same error, as round an outlier, the larger would spoil the unit of all scales.
COARSE_SCALE = np.float32(1e-5)
# How many units, and codes of a sub-block's scale, are tried side by side.
N_UNITS, N_NEIGHBOURS = 4, 4
N_LANES = N_UNITS * N_NEIGHBOURS

Levels = tuple[Real, Real, Real]
"""Lowest level, spacing, and index of the highest."""


Codes = tuple[Array, Array, Array]
"""Of a super-block's scales, points and variants."""


class Book(NamedTuple):
    """points, candidates, indices: as of a Codebook; levels: its levels, one by one."""

    points: Array
    levels: Levels
    candidates: Array
    indices: Array


class SearchEffort(NamedTuple):
    """n_candidates: points that are looked at for a group, a multiple of 8.
    peaks: levels that a sub-block's largest weight may land on when its scale is guessed, float32 [n].
    refine: whether the guess is refined with the candidates' help, over scales that are `ratios` of it,
    float32 [N_LANES].
    unit_trials: what multiple of the unit the largest scale may be, float32 [N_UNITS * n].
    n_refits: how often the best d is refitted; n_rounds: how often all is done with candidates of the scales so far.
    """

    n_candidates: int
    peaks: Array
    refine: bool
    ratios: Array
    unit_trials: Array
    n_refits: int
    n_rounds: int


class Work(NamedTuple):
    """Where a search keeps what it knows of a super-block; a row is a variant of a group.

    x: the weights, or their magnitudes where the format has sign bits, brought near one; odd: parity of each group's
    signs; coarse: of each sub-block, what a scale costs over its square.
    cells, a2, b: cell, 2 A and B of the candidates of each row; cheapest: of each candidate, the cheapest wrong sign.
    minima: least errors [row, lane]; picks [group]: row and candidate.
    fits, curvature: of each sub-block, the best scale and the cost of a deviation over its square.
    d, unit, error: of each unit; chosen [3, unit, sub-block]: lane, code and scale.
    lanes, peak_lanes, unit_lanes: running values of the trials.
    """

    x: Array
    odd: Array
    coarse: Array
    cells: Array
    a2: Array
    b: Array
    cheapest: Array
    minima: Array
    picks: Array
    fits: Array
    curvature: Array
    d: Array
    unit: Array
    error: Array
    chosen: Array
    lanes: Array
    peak_lanes: Array
    unit_lanes: Array


@jit
def guess_scale(
    x: Array, w: Array, first: int, size: int, coarse: Real, levels: Levels, peaks: Array, lanes: Array
) -> tuple[Real, Real]:
    """The scale at which rounding each weight of a sub-block to a level on its own does best, and sum(w level^2).

    x: weights, or their magnitudes where the levels are positive; first, size: the sub-block's place in x.
    """
    largest = ZERO
    for j in range(first, first + size):
        largest = max(largest, abs(x[j]))
    if largest < NEGLIGIBLE:
        return ZERO, ZERO
    bottom, spacing, top = levels
    lanes[:, :] = ZERO
    inverse, sxq, sqq = lanes[0], lanes[1], lanes[2]
    for t in range(peaks.size):
        inverse[t] = peaks[t] / largest
    per_level, offset = ONE / spacing, bottom / spacing
    for j in range(first, first + size, 2):
        x0, x1, w0, w1 = x[j], x[j + 1], w[j], w[j + 1]
        y0, y1 = x0 * per_level, x1 * per_level
        for t in range(peaks.size):
            q0 = bottom + spacing * np.rint(min(max(y0 * inverse[t] - offset, ZERO), top))
            q1 = bottom + spacing * np.rint(min(max(y1 * inverse[t] - offset, ZERO), top))
            sxq[t] += w0 * x0 * q0 + w1 * x1 * q1
            sqq[t] += w0 * q0 * q0 + w1 * q1 * q1
    for t in range(peaks.size):
        # What the least-squares scale leaves, less what zeros do.
        scale = sxq[t] / sqq[t] if sqq[t] > ZERO else ZERO
        inverse[t] = scale * (coarse * scale - sxq[t])
    best = lowest(inverse)
    return (sxq[best] / sqq[best] if sqq[best] > ZERO else largest / peaks[best]), sqq[best]


@jit
def cell_of(x: Array, first: int, n_dims: int, inverse: Real, shift: Real, levels: Levels) -> np.int32:
    """The number of the cell that a group lies in."""
    bottom, spacing, top = levels
    per_level, offset = inverse / spacing, (shift + bottom) / spacing
    cell, factor = np.int32(0), np.int32(1)
    for j in range(first, first + n_dims):
        cell += factor * np.int32(np.rint(min(max(x[j] * per_level - offset, ZERO), top)))
        factor *= np.int32(top) + np.int32(1)
    return cell


@inlined
def load_candidates(w: Array, i: int, scale: Real, layout: Layout, book: Book, work: Work) -> None:
    """The cells of sub-block i's groups and variants at that scale, and of the points g near each, plus its shift:
    a2 = 2 sum(w x g), b = sum(w g^2), and for wrong signs cheapest = min(w x g)."""
    x, cells, a2, b, cheapest, candidates = work.x, work.cells, work.a2, work.b, work.cheapest, book.candidates
    n_dims, n_candidates, n_variants = candidates.shape[1], candidates.shape[2], layout.n_variants
    n_groups = work.odd.size // layout.n_sub
    inverse = ONE / scale if scale > ZERO else ZERO
    for row in range(i * n_groups * n_variants, (i + 1) * n_groups * n_variants):
        group, variant = row // n_variants, row % n_variants
        first = group * n_dims
        shift = np.float32(1 - 2 * variant) if n_variants == 2 and layout.signs == SIGNED else ZERO
        cell = cell_of(x, first, n_dims, inverse, shift, book.levels)
        cells[row] = cell
        for k in range(n_candidates):
            a2[row, k], b[row, k], cheapest[k] = ZERO, ZERO, INFINITY
        for d in range(0, n_dims, 4):
            j = first + d
            w0, w1, w2, w3 = w[j], w[j + 1], w[j + 2], w[j + 3]
            wx0, wx1, wx2, wx3 = w0 * x[j], w1 * x[j + 1], w2 * x[j + 2], w3 * x[j + 3]
            for k in range(n_candidates):
                g0, g1 = np.float32(candidates[cell, d, k]) + shift, np.float32(candidates[cell, d + 1, k]) + shift
                g2, g3 = np.float32(candidates[cell, d + 2, k]) + shift, np.float32(candidates[cell, d + 3, k]) + shift
                a_0, a_1, a_2, a_3 = wx0 * g0, wx1 * g1, wx2 * g2, wx3 * g3
                a2[row, k] += TWO * ((a_0 + a_1) + (a_2 + a_3))
                b[row, k] += (w0 * g0 * g0 + w1 * g1 * g1) + (w2 * g2 * g2 + w3 * g3 * g3)
                cheapest[k] = min(cheapest[k], a_0, a_1, a_2, a_3)
        if layout.signs == PARITY and work.odd[group] != variant:
            for k in range(n_candidates):
                a2[row, k] -= FOUR * cheapest[k]


@jit
def least_errors(scales: Array, a2: Array, b: Array, row: int, minima: Array) -> None:
    """minima[row, t]: least scales[t] * b - a2. Eight candidates at a time, as every lane waits for its last store."""
    for t in range(N_LANES):
        minima[row, t] = INFINITY
    for k in range(0, b.shape[1], 8):
        a_0, a_1, a_2, a_3 = a2[row, k], a2[row, k + 1], a2[row, k + 2], a2[row, k + 3]
        a_4, a_5, a_6, a_7 = a2[row, k + 4], a2[row, k + 5], a2[row, k + 6], a2[row, k + 7]
        b_0, b_1, b_2, b_3 = b[row, k], b[row, k + 1], b[row, k + 2], b[row, k + 3]
        b_4, b_5, b_6, b_7 = b[row, k + 4], b[row, k + 5], b[row, k + 6], b[row, k + 7]
        for t in range(N_LANES):
            s = scales[t]
            e01, e23 = min(s * b_0 - a_0, s * b_1 - a_1), min(s * b_2 - a_2, s * b_3 - a_3)
            e45, e67 = min(s * b_4 - a_4, s * b_5 - a_5), min(s * b_6 - a_6, s * b_7 - a_7)
            minima[row, t] = min(minima[row, t], e01, e23, e45, e67)


@jit
def try_scales(
    i: int, scales: Array, layout: Layout, a2: Array, b: Array, minima: Array, sums: Array, total: Array
) -> None:
    """total[t]: sub-block i's error at scales[t], less that of zeros; minima[row, t]: a group's, over the scale."""
    n_variants, n_groups = layout.n_variants, b.shape[0] // layout.n_sub // layout.n_variants
    total[:] = ZERO
    for first in range(i * n_groups, (i + 1) * n_groups, layout.span):
        sums[:, :] = ZERO
        for g in range(first, first + layout.span):
            for v in range(n_variants):
                row = g * n_variants + v
                least_errors(scales, a2, b, row, minima)
                for t in range(N_LANES):
                    sums[v, t] += minima[row, t]
        for t in range(N_LANES):
            total[t] += min(sums[0, t], sums[n_variants - 1, t])
    for t in range(N_LANES):
        total[t] *= scales[t]


@jit
def pick_points(
    i: int, scale: Real, lane: int, layout: Layout, a2: Array, b: Array, minima: Array, picks: Array
) -> tuple[Real, Real]:
    """picks[g]: the row and the candidate of each group of sub-block i behind minima[:, lane]. Returns A and B."""
    n_variants, n_groups = layout.n_variants, b.shape[0] // layout.n_sub // layout.n_variants
    sum_a, sum_b = ZERO, ZERO
    for first in range(i * n_groups, (i + 1) * n_groups, layout.span):
        sum_0, sum_1 = ZERO, ZERO
        for g in range(first, first + layout.span):
            sum_0 += minima[g * n_variants, lane]
            sum_1 += minima[g * n_variants + n_variants - 1, lane]
        variant = 1 if sum_1 < sum_0 else 0
        for g in range(first, first + layout.span):
            row, k = g * n_variants + variant, 0
            while k < b.shape[1] - 1 and scale * b[row, k] - a2[row, k] != minima[row, lane]:
                k += 1
            picks[g, 0], picks[g, 1] = row, k
            sum_a += HALF * a2[row, k]
            sum_b += b[row, k]
    return sum_a, sum_b


@jit
def propose_units(
    fits: Array, curvature: Array, unit_trials: Array, layout: Layout, up: Real, lanes: Array, d: Array
) -> None:
    """The most promising d of the fitted scales times `up`: the best of each of N_UNITS stretches of the trials."""
    trial, error = lanes[0], lanes[1]
    largest = ZERO
    for i in range(fits.size):
        largest = max(largest, fits[i])
    for t in range(trial.size):
        # Where float16 is coarse, the rounded d decides how well the scales can be hit.
        trial[t] = round_f16(largest / unit_trials[t] / layout.unit * up)
        error[t] = ZERO if trial[t] > ZERO else INFINITY
    for i in range(fits.size):
        fit = fits[i] * up
        for t in range(trial.size):
            unit = trial[t] * layout.unit
            code = (fit / unit - ONE) * HALF if unit > ZERO else ZERO
            r = (fit - unit * (TWO * np.rint(min(max(code, ZERO), layout.top_code)) + ONE)) / (largest * up)
            error[t] += curvature[i] * r * r
    stretch = trial.size // N_UNITS
    for n in range(N_UNITS):
        d[n] = trial[n * stretch + lowest(error[n * stretch : (n + 1) * stretch])]


@inlined
def fit_sub_block(i: int, guess: Real, ratios: Array, layout: Layout, work: Work) -> tuple[Real, Real]:
    """The scale of a sub-block that leaves the least error; its curvature, a deviation's cost over its square."""
    coarse, a2, b, minima, lanes = work.coarse[i], work.a2, work.b, work.minima, work.lanes
    scales, total = lanes[0], lanes[1]
    for t in range(ratios.size):
        scales[t] = guess * ratios[t] if guess > ZERO else ONE
    try_scales(i, scales, layout, a2, b, minima, lanes[2:4], total)
    if guess == ZERO:
        return ZERO, total[0]
    for t in range(ratios.size):
        total[t] += coarse * scales[t] * scales[t]
    best = lowest(total)
    sum_a, sum_b = pick_points(i, scales[best], best, layout, a2, b, minima, work.picks)
    return (sum_a / sum_b if sum_a > ZERO else scales[best]), sum_b


@jit
def store_scales(
    fits: Array, unit: Array, layout: Layout, a2: Array, b: Array, minima: Array, lanes: Array, out: tuple[Array, Array]
) -> None:
    """The best codes near the fits for N_UNITS units: error[n], and chosen[0..2, n, i] = lane, code and scale."""
    error, chosen = out
    scales, total, codes = lanes[0], lanes[1], lanes[4]
    error[:] = ZERO
    for i in range(fits.size):
        for n in range(N_UNITS):
            below = np.floor((fits[i] / unit[n] - ONE) * HALF) if unit[n] > ZERO else ZERO
            for k in range(N_NEIGHBOURS):
                t = n * N_NEIGHBOURS + k
                codes[t] = min(max(below + np.float32(k - (N_NEIGHBOURS // 2 - 1)), ZERO), layout.top_code)
                scales[t] = unit[n] * (TWO * codes[t] + ONE)
        try_scales(i, scales, layout, a2, b, minima, lanes[2:4], total)
        for n in range(N_UNITS):
            best = n * N_NEIGHBOURS
            for t in range(best + 1, (n + 1) * N_NEIGHBOURS):
                best = t if total[t] < total[best] else best
            error[n] += total[best]
            chosen[0, n, i], chosen[1, n, i], chosen[2, n, i] = np.float32(best), codes[best], scales[best]


@jit
def pick_block(chosen: Array, n: int, layout: Layout, a2: Array, b: Array, minima: Array, picks: Array) -> Real:
    """picks of all groups for unit n of `chosen`. Returns the least-squares unit of these points and codes."""
    sum_a, sum_b = ZERO, ZERO
    for i in range(layout.n_sub):
        factor, scale = TWO * chosen[1, n, i] + ONE, chosen[2, n, i]
        part_a, part_b = pick_points(i, scale, int(chosen[0, n, i]), layout, a2, b, minima, picks)
        sum_a += factor * part_a
        sum_b += factor * factor * part_b
    return sum_a / sum_b


@jit
def sign_bits(x: Array, w: Array, first: int, n_dims: int, point: Array, flip: bool) -> int:
    """A bit a weight, set where it is negative; `flip` turns the cheapest one over."""
    bits, cheapest, where = 0, INFINITY, 0
    for j in range(n_dims):
        weight = x[first + j]
        bits |= (1 << j) if weight < ZERO else 0
        cost = w[first + j] * abs(weight) * np.float32(point[j])
        if cost < cheapest:
            cheapest, where = cost, j
    return bits ^ (1 << where) if flip else bits


@jit
def load_block(
    source: Array, w: Array, layout: Layout, down: Real, coarse_level: Real, x: Array, odd: Array, coarse: Array
) -> None:
    """A block's weights times `down`; the parity of each group's signs; what a coarse scale of a sub-block costs."""
    size, n_dims = x.size // coarse.size, x.size // odd.size
    for j in range(x.size):
        x[j] = source[j] * down if layout.signs == SIGNED else abs(source[j]) * down
    for g in range(odd.size):
        odd[g] = 0
        for j in range(g * n_dims, (g + 1) * n_dims):
            odd[g] ^= 1 if source[j] < ZERO else 0
    for i in range(coarse.size):
        coarse[i] = ZERO
        for j in range(i * size, (i + 1) * size):
            coarse[i] += coarse_level * w[j]


@jit
def fit_scales(w: Array, layout: Layout, effort: SearchEffort, book: Book, guessed: bool, work: Work) -> None:
    """Loads the candidates of all sub-blocks at their scales work.fits, which are guessed first unless they are
    `guessed` already, and refines the scales with them if that is asked for."""
    n_sub = layout.n_sub
    size = work.x.size // n_sub
    for i in range(n_sub):
        if not guessed:
            work.fits[i], work.curvature[i] = guess_scale(
                work.x, w, i * size, size, work.coarse[i], book.levels, effort.peaks, work.peak_lanes
            )
        load_candidates(w, i, work.fits[i], layout, book, work)
        if effort.refine:
            work.fits[i], work.curvature[i] = fit_sub_block(i, work.fits[i], effort.ratios, layout, work)


@jit
def search_block(
    w: Array, up: Real, down: Real, layout: Layout, effort: SearchEffort, book: Book, work: Work, out: Codes
) -> Real:
    """d, as float16's value, of the super-block in work."""
    scale_codes, point_codes, variants = out
    best_d, best_error = ZERO, ZERO  # what a block of zeros leaves
    for _ in range(effort.n_rounds):
        guessed = bool(best_d > ZERO)
        for i in range(layout.n_sub if guessed else 0):
            work.fits[i] = best_d * down * layout.unit * (TWO * np.float32(scale_codes[i]) + ONE)
        fit_scales(w, layout, effort, book, guessed, work)
        propose_units(work.fits, work.curvature, effort.unit_trials, layout, up, work.unit_lanes, work.d)
        for _ in range(1 + effort.n_refits):
            for n in range(N_UNITS):
                work.unit[n] = work.d[n] * down * layout.unit
            stored = work.error, work.chosen
            store_scales(work.fits, work.unit, layout, work.a2, work.b, work.minima, work.lanes, stored)
            n = lowest(work.error)
            if not work.error[n] < best_error:
                break
            best_error, best_d = work.error[n], work.d[n]
            refitted = pick_block(work.chosen, n, layout, work.a2, work.b, work.minima, work.picks)
            for i in range(layout.n_sub):
                scale_codes[i] = np.uint8(work.chosen[1, n, i])
            for g in range(point_codes.size):
                row = work.picks[g, 0]
                point_codes[g] = book.indices[work.cells[row], work.picks[g, 1]]
                variants[g] = row - g * layout.n_variants
            d = round_f16(refitted / layout.unit * up)
            for n in range(N_UNITS):
                # The float16 itself and its two neighbours, none below zero.
                work.d[n] = round_f16(max(d + np.float32(n % 3 - 1) * f16_step(d), ZERO))
    return best_d


@jit
def search(
    blocks: Array, weights: Array, layout: Layout, effort: SearchEffort, book: Book, work: Work, out: PointParts
) -> None:
    """Codes of super-blocks.

    blocks float32 [n_blocks, 256], weights float32 [blocks_per_row, 256].
    """
    steps, scale_codes, point_codes, signs = out
    points, (bottom, spacing, top) = book.points, book.levels
    highest, n_dims = bottom + spacing * top, points.shape[1]
    for block in range(blocks.shape[0]):
        x, w = blocks[block], weights[block % weights.shape[0]]
        largest = ZERO
        for j in range(x.size):
            largest = max(largest, abs(x[j]))
        steps[block], scale_codes[block], point_codes[block], signs[block] = ZERO, 0, 0, 0
        if largest < NEGLIGIBLE:
            continue
        exponent = power_of_two(largest)
        up, down = np.float32(math.ldexp(1.0, exponent)), np.float32(math.ldexp(1.0, -exponent))
        load_block(x, w, layout, down, COARSE_SCALE * highest * highest, work.x, work.odd, work.coarse)
        codes = scale_codes[block], point_codes[block], signs[block]
        steps[block] = search_block(w, up, down, layout, effort, book, work, codes)
        if layout.signs != SIGNED:
            for g in range(work.odd.size):
                flip = layout.signs == PARITY and work.odd[g] != signs[block, g]
                signs[block, g] = sign_bits(x, w, g * n_dims, n_dims, points[point_codes[block, g]], flip)
