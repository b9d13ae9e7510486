"""Kernels of error feedback for formats whose weights are scaled levels; see formats/feedback.py.

A row's error under the matrix H of its inputs' second moments is e H e with e = row - values. Its gradient g = H e is
kept up to date: a change of values[j] by delta takes delta H[j] from it, and changes the error by
delta^2 H[j, j] - 2 delta g[j]. All values are in units of the row's largest magnitude, near one, so nothing overflows.
"""

import numpy as np

from formats.compiler import njit

ZERO, ONE, TWO, HALF = np.float32(0), np.float32(1), np.float32(2), np.float32(0.5)
F16_MAX, F16_MIN_NORMAL = np.float32(65504), np.float32(2**-14)
# A determinant below this share of its first term is rounding noise.
SINGULAR = np.float32(1e-6)
# Places in a table of stored values that are tried: from the one before the optimum on.
N_NEIGHBOURS = 4
# A new unit changes all weights of a block: only for this share of the row's error a block.
UNIT_GAIN = np.float32(1e-2)
# Levels are integers from -128 on, and no midpoint of two falls inside half a unit.
HALF_STEPS = 256
LOWEST, HIGHEST = np.float32(-HALF_STEPS / 2), np.float32(HALF_STEPS / 2 - 0.5)

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
def half_step(u):
    return int(np.floor(TWO * min(max(u, LOWEST), HIGHEST))) + HALF_STEPS


@_jit
def round_span(rows, steps, lows, keep, nearest, lower, first, last, targets, errors, levels):
    """Rounds positions last - 1 down to first, and carries each error to those before it, down to first.

    All arrays but `nearest` and `lower` are [n_rows, n], in the order of the rounding; keep: levels that stay.
    targets: what the weights should be, given the errors of the positions behind them.
    """
    for r in range(rows.shape[0]):
        target, error = targets[r], errors[r]
        for p in range(last - 1, first - 1, -1):
            step = steps[r, p]
            if step != ZERO and not keep[r, p]:
                levels[r, p] = nearest[half_step((target[p] - lows[r, p]) / step)]
            error[p] = rows[r, p] - (lows[r, p] + step * levels[r, p])
            e, weights = error[p], lower[p]
            for k in range(first, p):
                target[k] += e * weights[k]


@_jit
def change(delta, row, gradient):
    """The gradient after a value has changed by delta; row: of H."""
    for k in range(gradient.size):
        gradient[k] -= delta * row[k]


@_jit
def change_four(deltas, matrix, first, gradient):
    """The same for as many values as there are deltas, a multiple of four, from column `first` on."""
    for j in range(0, deltas.size, 4):
        d0, d1, d2, d3 = deltas[j], deltas[j + 1], deltas[j + 2], deltas[j + 3]
        h0, h1, h2, h3 = matrix[first + j], matrix[first + j + 1], matrix[first + j + 2], matrix[first + j + 3]
        for k in range(gradient.size):
            gradient[k] -= (d0 * h0[k] + d1 * h1[k]) + (d2 * h2[k] + d3 * h3[k])


@_jit
def sweep_levels(matrix, nearest, step, low, first, last, levels, values, gradient):
    """Gives each weight of a sub-block the level that is best beside all others'. Returns how many changed."""
    n_changed = 0
    if step == ZERO:
        return n_changed
    inverse = ONE / step
    for j in range(first, last):
        target = values[j] + gradient[j] / matrix[j, j]
        level = nearest[half_step((target - low) * inverse)]
        if level != levels[j]:
            value = low + step * level
            change(value - values[j], matrix[j], gradient)
            levels[j], values[j] = level, value
            n_changed += 1
    return n_changed


@_jit
def place_below(table, place, value):
    """The place of the largest entry up to `value`, or the first place; the search begins at `place`."""
    while place + 1 < table.size and table[place + 1] <= value:
        place += 1
    while place > 0 and table[place] > value:
        place -= 1
    return place


@_jit
def quadratic(matrix, scaled, offsets, first, gradient, products, sums):
    """What a change ds * scaled - dm * offsets of values costs:
    ds^2 sums[0] - 2 ds dm sums[1] + dm^2 sums[2] - 2 ds sums[3] + 2 dm sums[4]."""
    n = scaled.size
    products[:, :n] = ZERO
    for j in range(n):
        s, m, row = scaled[j], offsets[j], matrix[first + j]
        for k in range(n):
            products[0, k] += s * row[first + k]
            products[1, k] += m * row[first + k]
    sums[:] = ZERO
    for k in range(n):
        sums[0] += scaled[k] * products[0, k]
        sums[1] += scaled[k] * products[1, k]
        sums[2] += offsets[k] * products[1, k]
        sums[3] += scaled[k] * gradient[first + k]
        sums[4] += offsets[k] * gradient[first + k]


@_jit
def optimum(sums, two):
    """(ds, dm) of the least cost; dm is 0 unless `two`."""
    ss, sm, mm, gs, gm = sums[0], sums[1], sums[2], sums[3], sums[4]
    determinant = ss * mm - sm * sm
    if two and determinant > SINGULAR * ss * mm:
        return (gs * mm - gm * sm) / determinant, (gs * sm - gm * ss) / determinant
    return (gs / ss if ss > ZERO else ZERO), ZERO


@_jit
def cost_of(ds, dm, sums):
    return ds * (ds * sums[0] - TWO * (dm * sums[1] + sums[3])) + dm * (dm * sums[2] + TWO * sums[4])


@_jit
def move_scale(matrix, tables, units, places, levels, ones, first, values, gradient, products, sums, deltas):
    """Moves a sub-block's scale and minimum to the best stored ones near their optimum. Returns whether they moved.

    places: [2], in tables; levels: of the sub-block.
    """
    scale_table, minimum_table = tables
    d, dmin = units
    two = minimum_table.size > 1 and dmin != ZERO
    if d == ZERO:
        return False
    quadratic(matrix, levels, ones, first, gradient, products, sums)
    ds, dm = optimum(sums, two)
    scale, minimum = scale_table[places[0]], minimum_table[places[1]]
    below = place_below(scale_table, places[0], scale + ds / d)
    low = place_below(minimum_table, places[1], minimum + dm / dmin) if two else 0
    least, best_scale, best_minimum = ZERO, places[0], places[1]
    for a in range(max(below - 1, 0), min(below - 1 + N_NEIGHBOURS, scale_table.size)):
        for b in range(max(low - 1, 0) if two else places[1], min(low - 1 + N_NEIGHBOURS, minimum_table.size)):
            if not two and b != places[1]:
                break
            cost = cost_of(d * (scale_table[a] - scale), dmin * (minimum_table[b] - minimum), sums)
            if cost < least:
                least, best_scale, best_minimum = cost, a, b
    if not least < ZERO:
        return False
    places[0], places[1] = best_scale, best_minimum
    step, offset = d * scale_table[best_scale], dmin * minimum_table[best_minimum]
    for j in range(levels.size):
        value = step * levels[j] - offset
        deltas[j] = value - values[first + j]
        values[first + j] = value
    change_four(deltas[: levels.size], matrix, first, gradient)
    return True


@_jit
def move_units(matrix, tables, up, units, places, levels, first, values, gradient, scaled, offsets, work, least_gain):
    """Moves a block's d and dmin to their least squares under H, as float16. Returns whether they moved.

    units: [2], divided by `up`; places: [2, n_sub]; levels: of the block; work: products, sums and deltas.
    """
    scale_table, minimum_table = tables
    products, sums, deltas = work
    size = levels.size // places.shape[1]
    for j in range(levels.size):
        scaled[j] = scale_table[places[0, j // size]] * levels[j]
        offsets[j] = minimum_table[places[1, j // size]]
    quadratic(matrix, scaled[: levels.size], offsets[: levels.size], first, gradient, products, sums)
    ds, dm = optimum(sums, units[1] != ZERO)
    d, dmin = round_f16((units[0] + ds) * up) / up, round_f16((units[1] + dm) * up) / up
    if not (d * units[0] > ZERO and -cost_of(d - units[0], dmin - units[1], sums) > least_gain):
        return False
    units[0], units[1] = d, dmin
    for j in range(levels.size):
        value = d * scaled[j] - dmin * offsets[j]
        deltas[j] = value - values[first + j]
        values[first + j] = value
    change_four(deltas[: levels.size], matrix, first, gradient)
    return True


@_jit
def row_error(row, values, gradient):
    total = 0.0
    for j in range(row.size):
        total += (row[j] - values[j]) * gradient[j]
    return total


@_jit
def refine(rows, ups, keep, matrix, nearest, tables, fixed_unit, n_rounds, n_sweeps, gradients, state, errors):
    """Changes levels, scales and units of rows in turn, each to its best beside all others, until nothing changes.

    rows, gradients float32 [n_rows, n]; ups float32 [n_rows], what a row was divided by; keep bool [n_rows, n_blocks].
    state: units float32 [n_rows, n_blocks, 2] divided by ups, places int16 [n_rows, n_blocks, 2, n_sub], levels and
    values float32 [n_rows, n]. errors float64 [n_rows]: what is left of e H e.
    """
    all_units, all_places, all_levels, all_values = state
    scale_table, minimum_table = tables
    n_blocks, n_sub = all_places.shape[1], all_places.shape[3]
    block_size = rows.shape[1] // n_blocks
    size = block_size // n_sub
    products, sums = np.empty((2, block_size), np.float32), np.empty(5, np.float32)
    deltas, scaled, offsets = np.empty(block_size, np.float32), np.empty(block_size, np.float32), np.empty(
        block_size, np.float32
    )  # fmt: skip
    ones = np.ones(size, np.float32)
    movable = scale_table.size > 1 or minimum_table.size > 1
    for r in range(rows.shape[0]):
        levels, values, gradient = all_levels[r], all_values[r], gradients[r]
        for _ in range(n_rounds):
            n_changed = 0
            for _ in range(n_sweeps):
                n_swept = 0
                for b in range(n_blocks):
                    for i in range(0 if keep[r, b] else n_sub):
                        step = all_units[r, b, 0] * scale_table[all_places[r, b, 0, i]]
                        low = -(all_units[r, b, 1] * minimum_table[all_places[r, b, 1, i]])
                        first = b * block_size + i * size
                        n_swept += sweep_levels(
                            matrix, nearest, step, low, first, first + size, levels, values, gradient
                        )
                n_changed += n_swept
                if n_swept == 0:
                    break
            for b in range(n_blocks if movable else 0):
                for i in range(0 if keep[r, b] else n_sub):
                    first = b * block_size + i * size
                    units = all_units[r, b, 0], all_units[r, b, 1]
                    places, sub_levels = all_places[r, b, :, i], levels[first : first + size]
                    n_changed += move_scale(
                        matrix, tables, units, places, sub_levels, ones, first, values, gradient, products, sums, deltas
                    )
            least_gain = UNIT_GAIN * np.float32(row_error(rows[r], values, gradient)) / np.float32(n_blocks)
            for b in range(0 if fixed_unit else n_blocks):
                if not keep[r, b]:
                    first = b * block_size
                    work = products, sums, deltas
                    n_changed += move_units(
                        matrix, tables, ups[r], all_units[r, b], all_places[r, b], levels[first : first + block_size],
                        first, values, gradient, scaled, offsets, work, least_gain,
                    )  # fmt: skip
            if n_changed == 0:
                break
        errors[r] = row_error(rows[r], values, gradient)
