"""Search for the codes of IQ1, IQ2 and IQ3: a group of 4 or 8 weights is a scale times a point of a codebook.

A sub-block's scale is an odd multiple 2 code + 1 of the super-block's unit, stored as float16 d. For a group x with
weights w, a point g at the scale s leaves the error s^2 B - 2 s A + const with A = sum(w x g) and B = sum(w g^2), which
do not depend on s: once A and B of the candidate points are known, a further scale costs two operations a point.

A lane is a trial: the candidates of a group meet many scales side by side. Nothing is summed across lanes, so strict
floating point does not stop the compiler from using vector registers. The least error comes first, and which point it
belongs to is asked for the winning scale alone.

What the formats do about signs:
  SIGNED   the points have signs; a variant shifts all coordinates of a group by +1 (variant 0) or -1 (variant 1)
  FREE     a sign bit a weight
  PARITY   sign bits that must be even in number over 8 weights. The cheapest sign to get wrong costs 4 s min(w |x| g),
           which goes into A: so the search stays exact. A variant is the parity of a group's signs.
Groups that share their variant come `span` after each other.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from formats.encoding import to_blocks
from formats.grids import codebook

BLOCK_SIZE = 256
SIGNED, FREE, PARITY = 0, 1, 2
ZERO, ONE, TWO, FOUR, HALF = np.float32(0), np.float32(1), np.float32(2), np.float32(4), np.float32(0.5)
INFINITY = np.float32(np.inf)
F16_MAX, F16_MIN_NORMAL = np.float32(65504), np.float32(2**-14)
# A block without a weight beyond this is zero in every format: less than 1e-20 of the least float16.
NEGLIGIBLE = np.float32(1e-30)
# Of two scales with the same error, as round an outlier, the larger would spoil the unit of all scales.
COARSE_SCALE = np.float32(1e-5)
# How many units, and codes of a sub-block's scale, are tried side by side.
N_UNITS, N_NEIGHBOURS = 4, 4

_jit = njit(nogil=True, cache=True, error_model="numpy")


class Layout(NamedTuple):
    """What tells the formats apart.

    signs: SIGNED, FREE or PARITY; n_variants: 1 or 2; span: groups that share a variant.
    n_sub: sub-blocks of a super-block; top_code: highest code of their scales.
    unit: a scale is d * unit * (2 code + 1).
    """

    signs: int
    n_variants: int
    span: int
    n_sub: int
    top_code: np.float32
    unit: np.float32


class SearchEffort(NamedTuple):
    """n_candidates: points that are looked at for a group, a multiple of 8.
    peaks: levels that a sub-block's largest weight may land on when its scale is first guessed, float32 [n].
    ratios: scales tried about the guess, relative to it, float32 [N_UNITS * N_NEIGHBOURS].
    unit_trials: what multiple of the unit the largest scale may be, float32 [N_UNITS * n].
    n_refits: how often the best d is refitted; n_rounds: how often all is done with candidates of the scales so far."""

    n_candidates: int
    peaks: np.ndarray
    ratios: np.ndarray
    unit_trials: np.ndarray
    n_refits: int
    n_rounds: int


def search_rows(
    rows: np.ndarray, importance: np.ndarray | None, grid: str, layout: Layout, effort: SearchEffort
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The codes of rows, checked and weighted as in to_blocks; grid: name of the codebook.

    Returns d float32 [n_blocks] (values of float16), scales uint8 [n_blocks, n_sub], point indices
    uint16 [n_blocks, n_groups] and signs uint8 [n_blocks, n_groups]: a bit a weight, lowest first, set where it is
    negative, or the variant of the group when layout.signs is SIGNED.
    """
    blocks, weights = to_blocks(rows, importance, BLOCK_SIZE)
    book = codebook(grid, effort.n_candidates)
    n_blocks, n_groups = len(blocks), BLOCK_SIZE // book.points.shape[1]
    d, scales = np.empty(n_blocks, np.float32), np.empty((n_blocks, layout.n_sub), np.uint8)
    indices, signs = np.empty((n_blocks, n_groups), np.uint16), np.empty((n_blocks, n_groups), np.uint8)
    fields = book.points, book.levels, book.candidates, book.indices
    search(blocks, weights, layout, effort, fields, (d, scales, indices, signs))
    return d, scales, indices, signs


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
def next_f16(value, step):
    """The float16 `step` (-1, 0 or 1) places above a positive one, zero at the least."""
    # Between half of the spacing and one and a half, whatever the fraction.
    return round_f16(max(value + step * max(value * np.float32(1.3 * 2**-11), np.float32(2**-24)), ZERO))


@_jit
def lowest(error):
    """The first lane with the least error. The least comes first, for the index would stall the search."""
    least = error[0]
    for t in range(1, error.size):
        least = min(least, error[t])
    for t in range(error.size):
        if error[t] == least:
            return t
    return 0


@_jit
def guess_scale(x, w, coarse, levels, peaks, sums):
    """The scale at which rounding each weight to a level on its own does best; 0 for zeros. The levels' signs are
    those of the weights, so that x may come without."""
    largest = ZERO
    for j in range(x.size):
        largest = max(largest, abs(x[j]))
    if largest < NEGLIGIBLE:
        return ZERO
    bottom, spacing, top = levels
    sums[:, :] = ZERO
    inverse, sxq, sqq = sums[0], sums[1], sums[2]
    for t in range(peaks.size):
        inverse[t] = peaks[t] / largest
    for j in range(0, x.size, 2):
        x0, x1, w0, w1 = x[j], x[j + 1], w[j], w[j + 1]
        for t in range(peaks.size):
            q0 = bottom + spacing * np.rint(min(max((x0 * inverse[t] - bottom) / spacing, ZERO), top))
            q1 = bottom + spacing * np.rint(min(max((x1 * inverse[t] - bottom) / spacing, ZERO), top))
            sxq[t] += w0 * x0 * q0 + w1 * x1 * q1
            sqq[t] += w0 * q0 * q0 + w1 * q1 * q1
    for t in range(peaks.size):
        # What the least-squares scale leaves, less what zeros do.
        scale = sxq[t] / sqq[t] if sqq[t] > ZERO else ZERO
        inverse[t] = scale * (coarse * scale - sxq[t])
    best = lowest(inverse)
    return sxq[best] / sqq[best] if sqq[best] > ZERO else largest / peaks[best]


@_jit
def cell_of(x, inverse, shift, levels, n_cells):
    """The number of the cell that a group lies in."""
    if n_cells == 1:
        return 0
    bottom, spacing, top = levels
    cell, factor = 0, 1
    for j in range(x.size):
        cell += factor * int(np.rint(min(max((x[j] * inverse - shift - bottom) / spacing, ZERO), top)))
        factor *= int(top) + 1
    return cell


@_jit
def project(x, w, points, shift, a, b, cheapest):
    """a = sum(w x g), b = sum(w g^2) and cheapest = min(w x g) of the points g = points[:, k] + shift."""
    a[:], b[:], cheapest[:] = ZERO, ZERO, INFINITY
    for i in range(0, x.size, 4):
        w0, w1, w2, w3 = w[i], w[i + 1], w[i + 2], w[i + 3]
        wx0, wx1, wx2, wx3 = w0 * x[i], w1 * x[i + 1], w2 * x[i + 2], w3 * x[i + 3]
        for k in range(a.size):
            g0, g1 = np.float32(points[i, k]) + shift, np.float32(points[i + 1, k]) + shift
            g2, g3 = np.float32(points[i + 2, k]) + shift, np.float32(points[i + 3, k]) + shift
            a0, a1, a2, a3 = wx0 * g0, wx1 * g1, wx2 * g2, wx3 * g3
            a[k] += (a0 + a1) + (a2 + a3)
            b[k] += (w0 * g0 * g0 + w1 * g1 * g1) + (w2 * g2 * g2 + w3 * g3 * g3)
            cheapest[k] = min(cheapest[k], a0, a1, a2, a3)


@_jit
def load_candidates(x, w, scale, odd, layout, levels, candidates, workspace):
    """For every group of a sub-block and every variant, the cell and A2 = 2 A and B of its candidates."""
    cells, a2, b, cheapest = workspace
    n_dims = candidates.shape[1]
    inverse = ONE / scale if scale > ZERO else ZERO
    for g in range(odd.size):
        part = slice(g * n_dims, (g + 1) * n_dims)
        for v in range(layout.n_variants):
            shift = np.float32(1 - 2 * v) if layout.signs == SIGNED else ZERO
            cell = cell_of(x[part], inverse, shift, levels, candidates.shape[0])
            cells[v, g] = cell
            project(x[part], w[part], candidates[cell], shift, a2[v, g], b[v, g], cheapest)
            wrong = FOUR if layout.signs == PARITY and odd[g] != v else ZERO
            for k in range(cheapest.size):
                a2[v, g, k] = TWO * a2[v, g, k] - wrong * cheapest[k]


@_jit
def least_errors(scales, a2, b, least):
    """least[t]: least scales[t] * b - a2. Eight candidates at a time, as least[t] has to wait for its last store."""
    least[:] = INFINITY
    for k in range(0, b.size, 8):
        a_0, a_1, a_2, a_3 = a2[k], a2[k + 1], a2[k + 2], a2[k + 3]
        a_4, a_5, a_6, a_7 = a2[k + 4], a2[k + 5], a2[k + 6], a2[k + 7]
        b_0, b_1, b_2, b_3 = b[k], b[k + 1], b[k + 2], b[k + 3]
        b_4, b_5, b_6, b_7 = b[k + 4], b[k + 5], b[k + 6], b[k + 7]
        for t in range(scales.size):
            s = scales[t]
            e01, e23 = min(s * b_0 - a_0, s * b_1 - a_1), min(s * b_2 - a_2, s * b_3 - a_3)
            e45, e67 = min(s * b_4 - a_4, s * b_5 - a_5), min(s * b_6 - a_6, s * b_7 - a_7)
            least[t] = min(least[t], e01, e23, e45, e67)


@_jit
def try_scales(scales, span, a2, b, minima, total):
    """total[t]: error of a sub-block at scales[t], less that of zeros; minima[v, g, t]: a group's, over the scale."""
    n_variants, n_groups, n_lanes = b.shape[0], b.shape[1], scales.size
    sums = np.empty((2, n_lanes), np.float32)
    total[:] = ZERO
    for first in range(0, n_groups, span):
        sums[:, :] = ZERO
        for v in range(n_variants):
            for g in range(first, first + span):
                least = minima[v, g]
                least_errors(scales, a2[v, g], b[v, g], least)
                for t in range(n_lanes):
                    sums[v, t] += least[t]
        for t in range(n_lanes):
            total[t] += min(sums[0, t], sums[n_variants - 1, t])
    for t in range(n_lanes):
        total[t] *= scales[t]


@_jit
def pick_points(scale, lane, span, a2, b, minima, picks):
    """picks[0..1, g]: the variant and the candidate of each group behind minima[:, :, lane]. Returns A and B."""
    n_variants, n_groups, n_candidates = b.shape
    sum_a, sum_b = ZERO, ZERO
    for first in range(0, n_groups, span):
        variant = 0
        if n_variants == 2:
            sum_0, sum_1 = ZERO, ZERO
            for g in range(first, first + span):
                sum_0 += minima[0, g, lane]
                sum_1 += minima[1, g, lane]
            variant = 1 if sum_1 < sum_0 else 0
        for g in range(first, first + span):
            k = 0
            while k < n_candidates - 1 and scale * b[variant, g, k] - a2[variant, g, k] != minima[variant, g, lane]:
                k += 1
            picks[0, g], picks[1, g] = variant, k
            sum_a += HALF * a2[variant, g, k]
            sum_b += b[variant, g, k]
    return sum_a, sum_b


@_jit
def propose_units(fits, curvature, unit_trials, layout, up, lanes, d):
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


@_jit
def fit_sub_block(guess, coarse, ratios, span, a2, b, minima, picks):
    """The scale of a sub-block that leaves the least error; its curvature, a deviation's cost over its square."""
    scales, total = np.empty(ratios.size, np.float32), np.empty(ratios.size, np.float32)
    for t in range(ratios.size):
        scales[t] = guess * ratios[t] if guess > ZERO else ONE
    try_scales(scales, span, a2, b, minima, total)
    if guess == ZERO:
        return ZERO, total[0]
    for t in range(ratios.size):
        total[t] += coarse * scales[t] * scales[t]
    best = lowest(total)
    sum_a, sum_b = pick_points(scales[best], best, span, a2, b, minima, picks)
    return (sum_a / sum_b if sum_a > ZERO else scales[best]), sum_b


@_jit
def store_scales(fits, unit, layout, a2, b, minima, error, chosen):
    """The best codes near the fits for N_UNITS units: error[n], and chosen[0..2, n, i] = lane, code and scale."""
    lanes = np.empty((3, minima.shape[3]), np.float32)  # unpacked, its rows would not count as contiguous
    scales, total, codes = lanes[0], lanes[1], lanes[2]
    error[:] = ZERO
    for i in range(fits.size):
        for n in range(N_UNITS):
            below = np.floor((fits[i] / unit[n] - ONE) * HALF) if unit[n] > ZERO else ZERO
            for k in range(N_NEIGHBOURS):
                t = n * N_NEIGHBOURS + k
                codes[t] = min(max(below + np.float32(k - (N_NEIGHBOURS // 2 - 1)), ZERO), layout.top_code)
                scales[t] = unit[n] * (TWO * codes[t] + ONE)
        try_scales(scales, layout.span, a2[i], b[i], minima[i], total)
        for n in range(N_UNITS):
            best = n * N_NEIGHBOURS + lowest(total[n * N_NEIGHBOURS : (n + 1) * N_NEIGHBOURS])
            error[n] += total[best]
            chosen[0, n, i], chosen[1, n, i], chosen[2, n, i] = np.float32(best), codes[best], scales[best]


@_jit
def sign_bits(x, w, point, flip):
    """A bit a weight, set where it is negative; `flip` turns the cheapest one over."""
    bits, cheapest, where = 0, INFINITY, 0
    for j in range(x.size):
        bits |= (1 << j) if x[j] < ZERO else 0
        cost = w[j] * abs(x[j]) * np.float32(point[j])
        if cost < cheapest:
            cheapest, where = cost, j
    return bits ^ (1 << where) if flip else bits


@_jit
def search(blocks, weights, layout, effort, codebook, out):
    """Codes of super-blocks.

    blocks float32 [n_blocks, 256], weights float32 [blocks_per_row, 256].
    codebook: (points, levels, candidates, indices), the fields of a Codebook.
    out: (d float32 [n_blocks], values of float16; scales uint8 [n_blocks, n_sub], codes;
    points uint16 [n_blocks, n_groups]; signs uint8 [n_blocks, n_groups], a bit a weight, or the variant when SIGNED).
    """
    steps, scale_codes, point_codes, signs = out
    points, levels_array, candidates, indices = codebook
    levels = (levels_array[0], levels_array[1], levels_array[2])
    highest = levels[0] + levels[1] * levels[2]
    n_sub, n_variants, n_dims, n_candidates = layout.n_sub, layout.n_variants, points.shape[1], candidates.shape[2]
    size = blocks.shape[1] // n_sub
    n_groups = size // n_dims
    x, odd = np.empty(blocks.shape[1], np.float32), np.empty((n_sub, n_groups), np.int64)
    guess_sums, unit_lanes = (
        np.empty((3, effort.peaks.size), np.float32),
        np.empty((2, effort.unit_trials.size), np.float32),
    )
    cells = np.empty((n_sub, n_variants, n_groups), np.int64)
    a2 = np.empty((n_sub, n_variants, n_groups, n_candidates), np.float32)
    b = np.empty_like(a2)
    cheapest, minima = (
        np.empty(n_candidates, np.float32),
        np.empty((n_sub, n_variants, n_groups, effort.ratios.size), np.float32),
    )
    picks = np.empty((2, n_groups), np.int64)
    fits, curvature, coarse = np.empty(n_sub, np.float32), np.empty(n_sub, np.float32), np.empty(n_sub, np.float32)
    d, unit, error = np.empty(N_UNITS, np.float32), np.empty(N_UNITS, np.float32), np.empty(N_UNITS, np.float32)
    chosen = np.empty((3, N_UNITS, n_sub), np.float32)
    for block in range(blocks.shape[0]):
        source, w = blocks[block], weights[block % weights.shape[0]]
        largest = ZERO
        for j in range(source.size):
            largest = max(largest, abs(source[j]))
        steps[block], scale_codes[block], point_codes[block], signs[block] = ZERO, 0, 0, 0
        if largest < NEGLIGIBLE:
            continue
        exponent = max(-100, math.frexp(largest)[1] - 1)  # brings the weights near one
        up, down = np.float32(math.ldexp(1.0, exponent)), np.float32(math.ldexp(1.0, -exponent))
        for j in range(source.size):
            x[j] = source[j] * down if layout.signs == SIGNED else abs(source[j]) * down
        for i in range(n_sub):
            coarse[i] = ZERO
            for j in range(i * size, (i + 1) * size):
                coarse[i] += COARSE_SCALE * highest * highest * w[j]
            for g in range(n_groups):
                odd[i, g] = 0
                for j in range(i * size + g * n_dims, i * size + (g + 1) * n_dims):
                    odd[i, g] ^= 1 if source[j] < ZERO else 0
        best_error = ZERO  # what a block of zeros leaves
        for round_ in range(effort.n_rounds):
            for i in range(n_sub):
                part = slice(i * size, (i + 1) * size)
                if round_ == 0 or steps[block] == ZERO:
                    fits[i] = guess_scale(x[part], w[part], coarse[i], levels, effort.peaks, guess_sums)
                else:
                    code = TWO * np.float32(scale_codes[block, i]) + ONE
                    fits[i] = steps[block] * down * layout.unit * code
                workspace = cells[i], a2[i], b[i], cheapest
                load_candidates(x[part], w[part], fits[i], odd[i], layout, levels, candidates, workspace)
                fits[i], curvature[i] = fit_sub_block(
                    fits[i], coarse[i], effort.ratios, layout.span, a2[i], b[i], minima[i], picks
                )
            propose_units(fits, curvature, effort.unit_trials, layout, up, unit_lanes, d)
            for _ in range(1 + effort.n_refits):
                for n in range(N_UNITS):
                    unit[n] = d[n] * down * layout.unit
                store_scales(fits, unit, layout, a2, b, minima, error, chosen)
                n = lowest(error)
                if not error[n] < best_error:
                    break
                best_error, steps[block] = error[n], d[n]
                sum_a, sum_b = ZERO, ZERO
                for i in range(n_sub):
                    code, scale = chosen[1, n, i], chosen[2, n, i]
                    part_a, part_b = pick_points(
                        scale, int(chosen[0, n, i]), layout.span, a2[i], b[i], minima[i], picks
                    )
                    sum_a += (TWO * code + ONE) * part_a
                    sum_b += (TWO * code + ONE) * (TWO * code + ONE) * part_b
                    scale_codes[block, i] = np.uint8(code)
                    for g in range(n_groups):
                        v = picks[0, g]
                        point_codes[block, i * n_groups + g] = indices[cells[i, v, g], picks[1, g]]
                        signs[block, i * n_groups + g] = v
                refitted = round_f16(sum_a / sum_b / layout.unit * up)
                for n in range(N_UNITS):
                    d[n] = next_f16(refitted, np.float32(n % 3 - 1))
        if layout.signs != SIGNED:
            for g in range(n_sub * n_groups):
                part = slice(g * n_dims, (g + 1) * n_dims)
                flip = layout.signs == PARITY and odd.reshape(-1)[g] != signs[block, g]
                signs[block, g] = sign_bits(source[part], w[part], points[point_codes[block, g]], flip)
