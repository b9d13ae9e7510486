"""Kernels of error feedback for formats whose weights are scaled levels; see formats/feedback/choose.py.

A row's error under the matrix H of its inputs' second moments is e H e with e = row - values. Its gradient g = H e is
kept up to date: a change of values[j] by delta takes delta H[j] from it, and changes the error by
delta^2 H[j, j] - 2 delta g[j]. All values are in units of the row's largest magnitude, near one, so nothing overflows.
"""

from typing import NamedTuple

import numpy as np

from bitwright.formats.compiler import Array, Real, jit
from bitwright.formats.feedback.lanes import GROUP, add_one, carry_group
from bitwright.formats.feedback.row import UNIT_GAIN, Positions, Row, Tile, change_four, dot, multiply, row_error, tell
from bitwright.formats.kernels.float16 import round_f16
from bitwright.formats.kernels.half_steps import half_step

ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
# A determinant below this share of its first term is rounding noise.
SINGULAR = np.float32(1e-6)
# Places in a table of stored values that are tried: from the one before the optimum on.
N_NEIGHBOURS = 4

Tables = tuple[Array, Array]
"""The values of stored scales and minima."""


class Grid(NamedTuple):
    """What levels mean: a weight is low + step * level. Lanes of rows: steps, lows float32 [n_sub_blocks, n_rows];
    free: bool of that shape, whether levels may change; levels: float32 [n, n_rows], of every column."""

    steps: Array
    lows: Array
    free: Array
    levels: Array


# Of a form: whether it still holds.
STALE, FRESH = np.float32(1), np.float32(0)

Span = tuple[int, int]
"""The first column, and the one after the last."""

Forms = Array
"""float32 [n_rows, n_blocks, n_sub + 1, 4]: of every sub-block, and last of the block's units, what take_form has found
and whether it is stale, as levels or scales have changed since."""


class State(NamedTuple):
    """What the rows hold: units float32 [n_rows, n_blocks, 2] divided by the rows' ups, places int16
    [n_rows, n_blocks, 2, n_sub] in the tables, levels, values and gradients float32 [n_rows, n]."""

    units: Array
    places: Array
    levels: Array
    values: Array
    gradients: Array


class Search(NamedTuple):
    """nearest: float32, the level nearest to each half unit; tables: of scales and minima; fixed_unit: units stay.
    n_rounds: how often every part of a row is visited at the most, n_sweeps: over its levels in each."""

    nearest: Array
    tables: Tables
    fixed_unit: bool
    n_rounds: int
    n_sweeps: int


class Room(NamedTuple):
    """For numbers of a part of a row while it is worked on: float32 [n] each, but sums [5]. ones: of a sub-block;
    inverses: of the diagonal of H."""

    products: Array
    wanted: Array
    inverses: Array
    sums: Array
    deltas: Array
    scaled: Array
    offsets: Array
    ones: Array


@jit
def allocate(n: int) -> Room:
    floats = np.empty((6, n), np.float32)
    ones = np.ones(n, np.float32)
    return Room(floats[0], floats[1], floats[2], np.empty(5, np.float32), floats[3], floats[4], floats[5], ones)


@jit
def round_lane(target: Array, step: Array, low: Array, free: Array, nearest: Array, level: Array) -> None:
    """The levels nearest to the targets of one position."""
    for r in range(target.size):
        s = step[r] if free[r] else ONE
        rounded = nearest[half_step((target[r] - low[r]) / s)]
        level[r] = rounded if free[r] else level[r]


@jit
def round_span(positions: Positions, grid: Grid, nearest: Array, lower: Array, first: int, last: int) -> None:
    """Rounds positions last - 1 down to first, and carries each error to those before it, down to first.

    nearest: float32, the level nearest to each half unit.
    """
    order, rows, targets, errors = positions
    size = rows.shape[0] // grid.steps.shape[0]
    for end in range(last, first, -GROUP):
        start = max(first, end - GROUP)
        for p in range(end - 1, start - 1, -1):
            column = order[p]
            i = column // size
            row, error, level, step, low = rows[p], errors[p], grid.levels[column], grid.steps[i], grid.lows[i]
            round_lane(targets[p], step, low, grid.free[i], nearest, level)
            for r in range(row.size):
                error[r] = row[r] - (low[r] + step[r] * level[r])
            for k in range(start, p):
                add_one(lower[p, k], error, targets[k])
        if start > first:
            carry_group(lower, errors, start, first, targets)


@jit
def change(delta: Real, row: Array, gradient: Array) -> None:
    """The gradient after a value has changed by delta; row: of H."""
    for k in range(gradient.size):
        gradient[k] -= delta * row[k]


@jit
def wanted_levels(
    row: Row, inverses: Array, nearest: Array, grid: tuple[Real, Real], span: Span, wanted: Array
) -> None:
    """wanted[first:last]: the best level of each weight beside all others; grid: step and low."""
    (step, low), (first, last) = grid, span
    values, gradient, scale = row.values[first:last], row.gradient[first:last], inverses[first:last]
    levels, inverse = wanted[first:last], ONE / step
    for j in range(values.size):
        levels[j] = nearest[half_step((values[j] + gradient[j] * scale[j] - low) * inverse)]


@jit
def sweep_levels(
    row: Row, inverses: Array, nearest: Array, grid: tuple[Real, Real], span: Span, levels: Array, wanted: Array
) -> int:
    """Gives each weight of the span, first to last of one sub-block, the level that is best beside all others'.

    inverses: of the diagonal of row.matrix. Returns how many changed.
    """
    (step, low), (first, last) = grid, span
    n_changed = 0
    if step == ZERO:
        return n_changed
    wanted_levels(row, inverses, nearest, grid, span, wanted)
    for j in range(first, last):
        level = wanted[j]
        if level != levels[j]:
            value = low + step * level
            change(value - row.values[j], row.matrix[j], row.gradient)
            levels[j], row.values[j] = level, value
            n_changed += 1
            wanted_levels(row, inverses, nearest, grid, (j + 1, last), wanted)
    return n_changed


@jit
def place_below(table: Array, place: int, value: Real) -> int:
    """The place of the largest entry up to `value`, or the first place; the search begins at `place`."""
    while place + 1 < table.size and table[place + 1] <= value:
        place += 1
    while place > 0 and table[place] > value:
        place -= 1
    return place


@jit
def take_form(matrix: Array, scaled: Array, offsets: Array, two: bool, first: int, room: Room, form: Array) -> None:
    """What a change ds * scaled - dm * offsets of values costs by itself, see cost_of; only ds where not `two`."""
    products = room.products[: scaled.size]
    multiply(scaled, matrix, first, products)
    form[0], form[1], form[2] = dot(scaled, products), ZERO, ZERO
    if two:
        form[1] = dot(offsets, products)
        multiply(offsets, matrix, first, products)
        form[2] = dot(offsets, products)


@jit
def take_pulls(scaled: Array, offsets: Array, first: int, gradient: Array, sums: Array) -> None:
    """What is gained by such a change beside all other errors."""
    part = gradient[first : first + scaled.size]
    sums[3], sums[4] = dot(scaled, part), dot(offsets, part)


@jit
def optimum(sums: Array, two: bool) -> tuple[Real, Real]:
    """(ds, dm) of the least cost; dm is 0 unless `two`."""
    ss, sm, mm, gs, gm = sums[0], sums[1], sums[2], sums[3], sums[4]
    determinant = ss * mm - sm * sm
    if two and determinant > SINGULAR * ss * mm:
        return (gs * mm - gm * sm) / determinant, (gs * sm - gm * ss) / determinant
    return (gs / ss if ss > ZERO else ZERO), ZERO


@jit
def cost_of(ds: Real, dm: Real, sums: Array) -> Real:
    """Of a change ds * scaled - dm * offsets of values:
    ds^2 sums[0] - 2 ds dm sums[1] + dm^2 sums[2] - 2 ds sums[3] + 2 dm sums[4]."""
    cost: Real = ds * (ds * sums[0] - TWO * (dm * sums[1] + sums[3])) + dm * (dm * sums[2] + TWO * sums[4])
    return cost


@jit
def move_scale(
    row: Row,
    tables: Tables,
    units: tuple[Real, Real],
    places: Array,
    levels: Array,
    first: int,
    room: Room,
    form: Array,
) -> bool:
    """Moves a sub-block's scale and minimum to the best stored ones near their optimum. Returns whether they moved.

    places: [2], in tables; levels: of the sub-block; form: as of Forms.
    """
    values, gradient, sums, deltas = row.values, row.gradient, room.sums, room.deltas
    scale_table, minimum_table = tables
    d, dmin = units
    two = minimum_table.size > 1 and dmin != ZERO
    if d == ZERO:
        return False
    if form[3] == STALE:
        take_form(row.matrix, levels, room.ones[: levels.size], two, first, room, form)
        form[3] = FRESH
    sums[:3] = form[:3]
    take_pulls(levels, room.ones[: levels.size], first, gradient, sums)
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
    change_four(deltas[: levels.size], row.matrix, first, gradient)
    return True


@jit
def move_units(
    row: Row, tables: Tables, units: Array, places: Array, levels: Array, first: int, room: Room, form: Array
) -> bool:
    """Moves a block's d and dmin to their least squares under H, as float16. Returns whether they moved.

    units: [2], divided by row.up; places: [2, n_sub]; levels: of the block; form: as of Forms.
    """
    scale_table, minimum_table = tables
    up, values, gradient = row.up, row.values, row.gradient
    sums, deltas = room.sums, room.deltas[: levels.size]
    scaled, offsets = room.scaled[: levels.size], room.offsets[: levels.size]
    two = units[1] != ZERO
    size = levels.size // places.shape[1]
    for j in range(levels.size):
        scaled[j] = scale_table[places[0, j // size]] * levels[j]
        offsets[j] = minimum_table[places[1, j // size]]
    if form[3] == STALE:
        take_form(row.matrix, scaled, offsets, two, first, room, form)
        form[3] = FRESH
    sums[:3] = form[:3]
    take_pulls(scaled, offsets, first, gradient, sums)
    ds, dm = optimum(sums, two)
    d, dmin = round_f16((units[0] + ds) * up) / up, round_f16((units[1] + dm) * up) / up
    if not (d * units[0] > ZERO and -cost_of(d - units[0], dmin - units[1], sums) > row.least_gain):
        return False
    units[0], units[1] = d, dmin
    for j in range(levels.size):
        value = d * scaled[j] - dmin * offsets[j]
        deltas[j] = value - values[first + j]
        values[first + j] = value
    change_four(deltas, row.matrix, first, gradient)
    return True


@jit
def visit(row: Row, first: int, r: int, keep: Array, search: Search, state: State, forms: Forms, room: Room) -> int:
    """Gives levels, scales and units of the columns of `row`, a part of row r from `first` on, their best values.

    keep: [n_blocks], of the whole row. Returns how much changed.
    """
    units, places, levels = state.units[r], state.places[r], state.levels[r]
    scale_table, minimum_table = search.tables
    n_blocks, n_sub = places.shape[0], places.shape[2]
    size, last = levels.size // (n_blocks * n_sub), first + row.values.size
    n_changed = 0
    for _ in range(search.n_sweeps):
        n_swept = 0
        start = first
        while start < last:
            b, i = start // (size * n_sub), start // size % n_sub
            stop = min(last, (start // size + 1) * size)
            if not keep[b]:
                grid = units[b, 0] * scale_table[places[b, 0, i]], -(units[b, 1] * minimum_table[places[b, 1, i]])
                span, part = (start - first, stop - first), levels[first:last]
                n_moved = sweep_levels(row, room.inverses, search.nearest, grid, span, part, room.wanted)
                n_swept += n_moved
                if n_moved > 0:
                    forms[r, b, i, 3] = forms[r, b, n_sub, 3] = STALE
            start = stop
        n_changed += n_swept
        if n_swept == 0:
            break
    movable = scale_table.size > 1 or minimum_table.size > 1
    for start in range(first, last if movable else first, size):
        b, i = start // (size * n_sub), start // size % n_sub
        if not keep[b]:
            unit, part = (units[b, 0], units[b, 1]), levels[start : start + size]
            if move_scale(row, search.tables, unit, places[b, :, i], part, start - first, room, forms[r, b, i]):
                n_changed += 1
                forms[r, b, n_sub, 3] = STALE
    for start in range(first, last if row.moves_units else first, size * n_sub):
        b = start // (size * n_sub)
        if not keep[b]:
            part, form = levels[start : start + size * n_sub], forms[r, b, n_sub]
            n_changed += move_units(row, search.tables, units[b], places[b], part, start - first, room, form)
    return n_changed


@jit
def refine(tile: Tile, matrix: Array, search: Search, span: int, state: State) -> None:
    """Changes levels, scales and units of rows, each to its best beside all others, until nothing changes.

    matrix: H; span: columns that are visited together, whole blocks where scales or units move. Changes there are told
    to all other columns when all rows have been visited. Writes tile.errors, what is left of e H e.
    """
    (n_rows, n), n_blocks, n_sub = tile.rows.shape, state.places.shape[1], state.places.shape[3]
    room, forms = allocate(min(span, n)), np.full((n_rows, n_blocks, n_sub + 1, 4), STALE, np.float32)
    active, n_changed, least_gain = np.ones(n_rows, np.bool_), np.empty(n_rows, np.int64), np.empty(n_rows, np.float32)
    for i in range(search.n_rounds):
        n_changed[:] = 0
        for r in range(n_rows):
            least_gain[r] = UNIT_GAIN * np.float32(row_error(tile.rows[r], state.values[r], state.gradients[r]))
            least_gain[r] /= np.float32(n_blocks)
        moves = i == 0 and not search.fixed_unit  # later on it hardly ever pays
        for first in range(0, n, span):
            last = min(first + span, n)
            corner = matrix[first:last, first:last].copy()
            for j in range(last - first):
                room.inverses[j] = ONE / corner[j, j]
            deltas = np.zeros((n_rows, last - first), np.float32)
            for r in range(n_rows):
                if active[r]:
                    values = state.values[r, first:last]
                    row = Row(corner, values, state.gradients[r, first:last].copy(), tile.ups[r], least_gain[r], moves)
                    deltas[r] = values
                    n_changed[r] += visit(row, first, r, tile.keep[r], search, state, forms, room)
                    for k in range(values.size):
                        deltas[r, k] = values[k] - deltas[r, k]
            tell(deltas, matrix, first, state.gradients)
        active &= n_changed > 0
        if not active.any():
            break
    for r in range(n_rows):
        tile.errors[r] = row_error(tile.rows[r], state.values[r], state.gradients[r])
