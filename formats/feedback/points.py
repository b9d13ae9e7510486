"""Kernels of error feedback for formats whose groups of weights are points of a codebook; see choose.py.

Weights are chosen 8 at a time, one point of 8 dimensions or two of 4: for a target y and the quadratic form Q of these
8, in units of the scale, the points v and signs that leave the least (y - v) Q (y - v). Q is not diagonal, so the
points near y are only candidates: a codebook lists those that lie near the cell of y, and all of them are tried. Signs
are then turned over one at a time, or in pairs where their number must stay even, and the points tried again.

A row's gradient g = H (row - values) is kept up to date, as in formats/feedback/scalar.py.
"""

from typing import NamedTuple

import numpy as np

from bitwright.formats.codebooks.kernels import FREE, PARITY, SIGNED, Levels
from bitwright.formats.compiler import Array, Real, jit
from bitwright.formats.feedback.lanes import add_one, carry_group
from bitwright.formats.feedback.row import UNIT_GAIN, Positions, Row, Tile, change_four, multiply, row_error, tell
from bitwright.formats.kernels.float16 import round_f16
from bitwright.formats.kernels.lanes import lowest
from bitwright.formats.parts import Layout

UNIT = 8
ZERO, ONE, TWO, FOUR, EIGHT, HALF = (np.float32(value) for value in (0, 1, 2, 4, 8, 0.5))
INFINITY = np.float32(np.inf)
# A target that has moved by less, in units of the scale, leaves the points as they are.
STILL = np.float32(0.02)
# How often points are tried again after signs have turned.
MOST_TURNS = 3


class Points(NamedTuple):
    """What a choice is made from. signs: SIGNED, FREE or PARITY; levels, candidates, indices: as of a codebook."""

    signs: int
    levels: Levels
    candidates: Array
    indices: Array


class Target(NamedTuple):
    """What 8 weights should be, in units of their scale: y float32 [8], under the quadratic form float32 [8, 8]; shift:
    what is added to every coordinate of a point."""

    y: Array
    form: Array
    shift: Real


class Choice(NamedTuple):
    """Of 8 weights: the vector v and its signs, float32 [8]; points: [2], the point behind each half of v, or of all of
    it."""

    v: Array
    signs: Array
    points: Array


class Search(NamedTuple):
    """n_rounds: how often every block is visited at the most, n_sweeps: over its points in each."""

    layout: Layout
    book: Points
    n_rounds: int
    n_sweeps: int


class Room(NamedTuple):
    """For numbers of 8 weights, float32 [8] each; lanes: float32 [10, n_candidates], of the candidates; blocks: float32
    [3, block_size]."""

    linear: Array
    pulls: Array
    y: Array
    before: Array
    deltas: Array
    lanes: Array
    blocks: Array


class Moments(NamedTuple):
    """H, float32 [n, n]; of each 8 columns the form, and its inverse: float32 [n / 8, 8, 8]."""

    matrix: Array
    forms: Array
    inverses: Array


class State(NamedTuple):
    """What the rows hold: d float32 [n_rows, n_blocks] divided by the rows' ups, codes uint8 [n_rows, n_blocks, n_sub];
    vectors, signs, values, gradients and tried float32 [n_rows, n]; shifts float32 [n_rows, n / 8], points uint16
    [n_rows, n / 8, 2]."""

    d: Array
    codes: Array
    vectors: Array
    signs: Array
    shifts: Array
    points: Array
    values: Array
    gradients: Array
    tried: Array


@jit
def allocate(n_candidates: int, block_size: int) -> Room:
    floats = np.empty((5, UNIT), np.float32)
    lanes = np.empty((2 + UNIT, n_candidates), np.float32)
    blocks = np.empty((3, block_size), np.float32)
    return Room(floats[0], floats[1], floats[2], floats[3], floats[4], lanes, blocks)


@jit
def cell_of(y: Array, signs: Array, shift: Real, first: int, n_dims: int, levels: Levels) -> int:
    """The number of the cell that the target lies in, its signs taken off."""
    bottom, spacing, top = levels
    cell, factor = 0, 1
    for j in range(first, first + n_dims):
        cell += factor * int(np.rint(min(max((y[j] * signs[j] - shift - bottom) / spacing, ZERO), top)))
        factor *= int(top) + 1
    return cell


@jit
def try_candidates(form: Array, linear: Array, signs: Array, first: int, coordinates: Array, lanes: Array) -> None:
    """lanes[0, k]: x Q x - 2 linear x of every candidate x with these signs, Q being the form from `first` on."""
    n_dims, n = coordinates.shape
    cost, slope, floats = lanes[0], lanes[1], lanes[2:]
    cost[:] = ZERO
    for i in range(n_dims):
        own, twice = form[first + i, first + i], -TWO * (signs[first + i] * linear[i])
        x = floats[i]
        for k in range(n):
            x[k] = np.float32(coordinates[i, k])
            slope[k] = own * x[k] + twice
        for j in range(i):
            mixed = TWO * (signs[first + i] * signs[first + j] * form[first + i, first + j])
            x_j = floats[j]
            for k in range(n):
                slope[k] += mixed * x_j[k]
        for k in range(n):
            cost[k] += x[k] * slope[k]


@jit
def try_points(target: Target, fresh: bool, book: Points, choice: Choice, room: Room) -> None:
    """Replaces the points of v by the best candidates with its signs, where they are better; all of them if `fresh`."""
    (y, form, shift), (v, signs, points) = target, choice
    candidates, linear, lanes = book.candidates, room.linear, room.lanes
    n_dims = candidates.shape[1]
    for half in range(UNIT // n_dims):
        first = half * n_dims
        present, at_zero = ZERO, ZERO
        for i in range(n_dims):
            total, own, row_sum = ZERO, ZERO, ZERO
            for j in range(UNIT):
                total += form[first + i, j] * (y[j] - v[j])
            for j in range(first, first + n_dims):
                own += form[first + i, j] * v[j]
                row_sum += form[first + i, j]
            linear[i] = total + own
            present += v[first + i] * (own - TWO * linear[i])
            # Points are shifted: what is tried is x + shift.
            at_zero += shift * (shift * row_sum - TWO * linear[i])
            linear[i] -= shift * row_sum
        cell = cell_of(y, signs, shift, first, n_dims, book.levels)
        try_candidates(form, linear, signs, first, candidates[cell], lanes)
        k = lowest(lanes[0])
        if fresh or lanes[0, k] + at_zero < present:
            points[half] = book.indices[cell, k]
            for i in range(n_dims):
                v[first + i] = signs[first + i] * np.float32(candidates[cell, i, k]) + shift


@jit
def turn_signs(y: Array, form: Array, kind: int, signs: Array, v: Array, pulls: Array) -> bool:
    """Turns over the signs that are better turned, one by one or in pairs. Returns whether any was."""
    turned = False
    for _ in range(UNIT):
        for i in range(UNIT):
            pull = ZERO
            for j in range(UNIT):
                pull += form[i, j] * (y[j] - v[j])
            # What turning v[i] alone costs.
            pulls[i] = FOUR * (v[i] * (v[i] * form[i, i] + pull))
        least, first, second = ZERO, -1, -1
        for i in range(UNIT):
            if kind == FREE and pulls[i] < least:
                least, first, second = pulls[i], i, i
            for j in range(i if kind == PARITY else 0):
                cost = pulls[i] + pulls[j] + EIGHT * (v[i] * v[j] * form[i, j])
                if cost < least:
                    least, first, second = cost, i, j
        if first < 0:
            return turned
        turned = True
        signs[first], v[first] = -signs[first], -v[first]
        if second != first:
            signs[second], v[second] = -signs[second], -v[second]
    return turned


@jit
def choose(target: Target, fresh: bool, book: Points, choice: Choice, room: Room) -> None:
    """Improves v, its points and signs until nothing changes, or turns too often."""
    for turn in range(MOST_TURNS):
        try_points(target, fresh and turn == 0, book, choice, room)
        if book.signs == SIGNED:
            break
        if not turn_signs(target.y, target.form, book.signs, choice.signs, choice.v, room.pulls):
            break


@jit
def take_signs(target: Target, kind: int, levels: Levels, signs: Array, v: Array) -> None:
    """The signs of the target, the cheapest one turned where their number must be even; v: the nearest levels."""
    y, form, shift = target
    bottom, spacing, top = levels
    odd, cheapest, where = False, INFINITY, 0
    for j in range(UNIT):
        signs[j] = -ONE if kind != SIGNED and y[j] < ZERO else ONE
        odd ^= y[j] < ZERO
        cost = y[j] * y[j] * form[j, j]
        if cost < cheapest:
            cheapest, where = cost, j
    if kind == PARITY and odd:
        signs[where] = -signs[where]
    for j in range(UNIT):
        level = np.rint(min(max((y[j] * signs[j] - shift - bottom) / spacing, ZERO), top))
        v[j] = signs[j] * (bottom + spacing * level) + shift


@jit
def round_span(
    positions: Positions, book: Points, forms: Array, lower: Array, span: tuple[int, int], steps: Array, state: State
) -> None:
    """Rounds the positions of the span, first to last, from the last one down, 8 at a time, and carries each error to
    those before it, down to first.

    forms: of each 8 positions, float32 [n / 8, 8, 8]; steps: float32 [n_rows, n], the scale of every weight, zero where
    it keeps its point.
    """
    order, rows, targets, errors = positions
    room = allocate(book.candidates.shape[2], 0)
    y = room.y
    first, last = span
    for start in range(last - UNIT, first - 1, -UNIT):
        column, form = order[start], forms[start // UNIT]
        part = slice(column, column + UNIT)
        for r in range(rows.shape[1]):
            v, signs, step = state.vectors[r, part], state.signs[r, part], steps[r, column]
            if step != ZERO:
                # What the errors behind call for, and within the 8 the change that takes it up.
                for i in range(UNIT - 1, -1, -1):
                    y[i] = targets[start + i, r] - rows[start + i, r]
                    for j in range(i + 1, UNIT):
                        y[i] -= lower[start + j, start + i] * y[j]
                for i in range(UNIT):
                    y[i] = (y[i] + rows[start + i, r]) / step
                wanted = Target(y, form, state.shifts[r, column // UNIT])
                take_signs(wanted, book.signs, book.levels, signs, v)
                choose(wanted, True, book, Choice(v, signs, state.points[r, column // UNIT]), room)
                for i in range(UNIT):
                    errors[start + i, r] = rows[start + i, r] - step * v[i]
            else:
                for i in range(UNIT):
                    errors[start + i, r] = rows[start + i, r] - state.values[r, column + i]
        # Targets within the 8 hear of each other, too: the errors that count are made of them.
        for p in range(start + UNIT - 1, start - 1, -1):
            for k in range(start, p):
                add_one(lower[p, k], errors[p], targets[k])
        if start > first:
            carry_group(lower, errors, start, first, targets)


@jit
def sweep(
    row: Row,
    moments: Moments,
    scale: tuple[Real, Real],
    book: Points,
    first: int,
    choice: Choice,
    tried: Array,
    room: Room,
) -> bool:
    """Improves the 8 weights from column `first` on beside all others. Returns whether they changed.

    scale: step and shift. tried: [8], the target of the last time, in units of the step; for nearly the same nothing
    is tried again.
    """
    step, shift = scale
    v, values, gradient = choice.v, row.values, row.gradient
    y, before, deltas = room.y, room.before, room.deltas
    form, inverse = moments.forms[first // UNIT], moments.inverses[first // UNIT]
    moved = ZERO
    for i in range(UNIT):
        y[i], before[i] = v[i], v[i]
        for j in range(UNIT):
            y[i] += inverse[i, j] * (gradient[first + j] / step)
        moved = max(moved, abs(y[i] - tried[i]))
    if moved < STILL:
        return False
    tried[:] = y
    choose(Target(y, form, shift), False, book, choice, room)
    changed = False
    for i in range(UNIT):
        changed |= v[i] != before[i]
        deltas[i] = step * v[i] - values[first + i]
    if changed:
        for i in range(UNIT):
            values[first + i] = step * v[i]
        change_four(deltas, row.matrix, first, gradient)
    return changed


@jit
def move_scale(
    row: Row, d: Real, code: int, layout: Layout, shifted: Real, first: int, v: Array, blocks: Array
) -> tuple[int, bool]:
    """Moves a sub-block to the best scale near its optimum, and where points are shifted to the better shift.

    v: its points, which take the new shift; blocks: room for float32 [3, block_size]. Returns (code, shift is turned).
    """
    matrix, values, gradient = row.matrix, row.values, row.gradient
    n, unit, top_code = v.size, layout.unit, int(layout.top_code)
    trial, products, deltas = blocks[0, :n], blocks[1, :n], blocks[2]
    step = d * unit * (TWO * np.float32(code) + ONE)
    multiply(v, matrix, first, products[:n])
    present = ZERO
    for j in range(n):
        present += step * (step * products[j] * v[j]) + TWO * step * v[j] * gradient[first + j]
    least, best_code, best_turn = -present, code, False
    for turn in range(2 if shifted != ZERO else 1):
        for j in range(n):
            trial[j] = v[j] - TWO * shifted if turn else v[j]
        # A scale s of the trial leaves s^2 square - 2 s mixed, less what is left now.
        mixed = ZERO
        for j in range(n):
            mixed += trial[j] * (step * products[j] + gradient[first + j])
        square = ZERO
        if turn:
            multiply(trial, matrix, first, deltas[:n])
            for j in range(n):
                square += trial[j] * deltas[j]
        else:
            for j in range(n):
                square += trial[j] * products[j]
        if not square > ZERO:
            continue
        below = int(np.floor((mixed / square / (d * unit) - ONE) * HALF))
        for near in range(max(below, 0), min(below + 2, top_code + 1)):
            s = d * unit * (TWO * np.float32(near) + ONE)
            cost = s * (s * square - TWO * mixed)
            if cost < least:
                least, best_code, best_turn = cost, near, turn == 1
        if below < 0 or below >= top_code:
            near = 0 if below < 0 else top_code
            s = d * unit * (TWO * np.float32(near) + ONE)
            cost = s * (s * square - TWO * mixed)
            if cost < least:
                least, best_code, best_turn = cost, near, turn == 1
    if best_code == code and not best_turn:
        return code, False
    step = d * unit * (TWO * np.float32(best_code) + ONE)
    for j in range(n):
        v[j] -= TWO * shifted if best_turn else ZERO
        deltas[j] = step * v[j] - values[first + j]
        values[first + j] = step * v[j]
    change_four(deltas[:n], matrix, first, gradient)
    return best_code, best_turn


@jit
def move_unit(row: Row, d: Real, unit: Real, codes: Array, first: int, v: Array, blocks: Array) -> Real:
    """A block's d, divided by row.up, moved to its least squares under H as float16, or as it was."""
    matrix, values, gradient, up = row.matrix, row.values, row.gradient, row.up
    n = v.size
    trial, products, deltas = blocks[0], blocks[1], blocks[2]
    size = n // codes.size
    for j in range(n):
        trial[j] = unit * (TWO * np.float32(codes[j // size]) + ONE) * v[j]
    multiply(trial, matrix, first, products[:n])
    square, mixed = ZERO, ZERO
    for j in range(n):
        square += trial[j] * products[j]
        mixed += trial[j] * gradient[first + j]
    if not square > ZERO:
        return d
    new = round_f16((d + mixed / square) * up) / up
    change = new - d
    if not (new > ZERO and change * (TWO * mixed - change * square) > row.least_gain):
        return d
    for j in range(n):
        deltas[j] = new * trial[j] - values[first + j]
        values[first + j] = new * trial[j]
    change_four(deltas[:n], matrix, first, gradient)
    return new


@jit
def visit(row: Row, moments: Moments, first: int, r: int, search: Search, state: State, keep: Array, room: Room) -> int:
    """Gives points, scales and units of the columns of `row`, a part of row r from `first` on, their best values.

    moments: of these columns. Returns how much changed.
    """
    layout, book, codes, d = search.layout, search.book, state.codes[r], state.d[r]
    n_blocks, n_sub = codes.shape
    last, size = first + row.values.size, state.values.shape[1] // (n_blocks * n_sub)
    n_changed = 0
    for _ in range(search.n_sweeps):
        n_swept = 0
        for start in range(first, last, UNIT):
            b, i = start // (size * n_sub), start // size % n_sub
            step = d[b] * layout.unit * (TWO * np.float32(codes[b, i]) + ONE)
            if step == ZERO or keep[b]:
                continue
            part = slice(start, start + UNIT)
            choice = Choice(state.vectors[r, part], state.signs[r, part], state.points[r, start // UNIT])
            scale = step, state.shifts[r, start // UNIT]
            n_swept += sweep(row, moments, scale, book, start - first, choice, state.tried[r, part], room)
        n_changed += n_swept
        if n_swept == 0:
            break
    for start in range(first, last, size):
        b, i = start // (size * n_sub), start // size % n_sub
        if keep[b] or d[b] == ZERO:
            continue
        shift, before, v = state.shifts[r, start // UNIT], codes[b, i], state.vectors[r, start : start + size]
        code, turned = move_scale(row, d[b], int(before), layout, shift, start - first, v, room.blocks)
        if code != before or turned:
            n_changed += 1
            codes[b, i] = code
            for unit in range(start // UNIT, (start + size) // UNIT):
                state.shifts[r, unit] = -shift if turned else shift
    for start in range(first, last if row.moves_units else first, size * n_sub):
        b = start // (size * n_sub)
        if not keep[b] and d[b] != ZERO:
            v = state.vectors[r, start : start + size * n_sub]
            moved = move_unit(row, d[b], layout.unit, codes[b], start - first, v, room.blocks)
            n_changed += moved != d[b]
            d[b] = moved
    return n_changed


@jit
def refine(tile: Tile, moments: Moments, search: Search, state: State) -> None:
    """Changes points, scales and units of rows, each to its best beside all others, until nothing changes.

    A block is visited at a time; changes there are told to all other columns when all rows have been visited. Writes
    tile.errors, what is left of e H e.
    """
    (n_rows, n), n_blocks = tile.rows.shape, state.codes.shape[1]
    span = n // n_blocks
    room = allocate(search.book.candidates.shape[2], span)
    active, n_changed, least_gain = np.ones(n_rows, np.bool_), np.empty(n_rows, np.int64), np.empty(n_rows, np.float32)
    for i in range(search.n_rounds):
        n_changed[:] = 0
        for r in range(n_rows):
            least_gain[r] = UNIT_GAIN * np.float32(row_error(tile.rows[r], state.values[r], state.gradients[r]))
            least_gain[r] /= np.float32(n_blocks)
        for first in range(0, n, span):
            last, units = first + span, slice(first // UNIT, (first + span) // UNIT)
            corner = moments.matrix[first:last, first:last].copy()
            part = Moments(corner, moments.forms[units], moments.inverses[units])
            deltas = np.zeros((n_rows, span), np.float32)
            for r in range(n_rows):
                if active[r]:
                    values = state.values[r, first:last]
                    row = Row(corner, values, state.gradients[r, first:last].copy(), tile.ups[r], least_gain[r], i == 0)
                    deltas[r] = values
                    n_changed[r] += visit(row, part, first, r, search, state, tile.keep[r], room)
                    for k in range(span):
                        deltas[r, k] = values[k] - deltas[r, k]
            tell(deltas, moments.matrix, first, state.gradients)
        active &= n_changed > 0
        if not active.any():
            break
    for r in range(n_rows):
        tile.errors[r] = row_error(tile.rows[r], state.values[r], state.gradients[r])
