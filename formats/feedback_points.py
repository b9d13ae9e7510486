"""Kernels of error feedback for formats whose groups of weights are points of a codebook; see formats/feedback.py.

Weights are chosen 8 at a time, one point of 8 dimensions or two of 4: for a target y and the quadratic form Q of these
8, in units of the scale, the points v and signs that leave the least (y - v) Q (y - v). Q is not diagonal, so the
points near y are only candidates: a codebook lists those that lie near the cell of y, and all of them are tried. Signs
are then turned over one at a time, or in pairs where their number must stay even, and the points tried again.

A row's gradient g = H (row - values) is kept up to date, as in formats/feedback_scalar.py. Helpers that both share are
written out in both files: numba's cache would not notice a change in an imported one.
"""

import numpy as np

from formats.compiler import njit

SIGNED, FREE, PARITY = 0, 1, 2  # as formats.iq_kernels has them
UNIT = 8
ZERO, ONE, TWO, FOUR, EIGHT, HALF = (np.float32(value) for value in (0, 1, 2, 4, 8, 0.5))
INFINITY = np.float32(np.inf)
F16_MAX, F16_MIN_NORMAL = np.float32(65504), np.float32(2**-14)
# A new d changes all weights of a block: only for this share of the row's error a block.
UNIT_GAIN = np.float32(1e-2)
# How often points are tried again after signs have turned.
MOST_TURNS = 3

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
def change_four(deltas, matrix, first, gradient):
    """The gradient after as many values as there are deltas, a multiple of four, have changed from `first` on."""
    for j in range(0, deltas.size, 4):
        d0, d1, d2, d3 = deltas[j], deltas[j + 1], deltas[j + 2], deltas[j + 3]
        if d0 == ZERO and d1 == ZERO and d2 == ZERO and d3 == ZERO:
            continue
        h0, h1, h2, h3 = matrix[first + j], matrix[first + j + 1], matrix[first + j + 2], matrix[first + j + 3]
        for k in range(gradient.size):
            gradient[k] -= (d0 * h0[k] + d1 * h1[k]) + (d2 * h2[k] + d3 * h3[k])


@_jit
def cell_of(y, signs, shift, first, n_dims, levels):
    """The number of the cell that the target lies in, its signs taken off."""
    bottom, spacing, top = levels
    cell, factor = 0, 1
    for j in range(first, first + n_dims):
        cell += factor * int(np.rint(min(max((y[j] * signs[j] - shift - bottom) / spacing, ZERO), top)))
        factor *= int(top) + 1
    return cell


@_jit
def try_candidates(form, linear, signs, first, coordinates, lanes):
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


@_jit
def lowest(cost):
    """The first lane with the least cost. The least comes first, for the index would stall the search."""
    least = cost[0]
    for k in range(1, cost.size):
        least = min(least, cost[k])
    for k in range(cost.size):
        if cost[k] == least:
            return k
    return 0


@_jit
def try_points(y, form, shift, fresh, levels, book, signs, v, points, work):
    """Replaces the points of v by the best candidates with these signs, where they are better; all of them if `fresh`.

    points: [2], the point behind each half of v, or of all of it.
    """
    candidates, indices = book
    linear, lanes = work
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
        cell = cell_of(y, signs, shift, first, n_dims, levels)
        try_candidates(form, linear, signs, first, candidates[cell], lanes)
        k = lowest(lanes[0])
        if fresh or lanes[0, k] + at_zero < present:
            points[half] = indices[cell, k]
            for i in range(n_dims):
                v[first + i] = signs[first + i] * np.float32(candidates[cell, i, k]) + shift


@_jit
def turn_signs(y, form, kind, signs, v, pulls):
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


@_jit
def choose(y, form, kind, shift, fresh, levels, book, signs, v, points, work, pulls):
    """Improves v, its points and signs until nothing changes, or turns too often."""
    for turn in range(MOST_TURNS):
        try_points(y, form, shift, fresh and turn == 0, levels, book, signs, v, points, work)
        if kind == SIGNED or not turn_signs(y, form, kind, signs, v, pulls):
            break


@_jit
def take_signs(y, form, kind, shift, levels, signs, v):
    """The signs of the target, the cheapest one turned where their number must be even; v: the nearest levels."""
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


@_jit
def round_span(rows, steps, shifts, keep, kind, levels, book, forms, lower, first, last, targets, errors, vectors,
               all_signs, all_points):  # fmt: skip
    """Rounds positions last - 1 down to first, 8 at a time, and carries each error to those before it, down to first.

    rows, steps, targets, errors, vectors, all_signs float32 and keep bool: [n_rows, n] in the order of the rounding;
    shifts float32 and all_points [n_rows, n / 8, 2]. forms: of each 8 positions, float32 [n / 8, 8, 8].
    """
    n_lanes = book[0].shape[2]
    work = np.empty(UNIT, np.float32), np.empty((2 + UNIT, n_lanes), np.float32)
    y, pulls = np.empty(UNIT, np.float32), np.empty(UNIT, np.float32)
    for r in range(rows.shape[0]):
        target, error = targets[r], errors[r]
        for start in range(last - UNIT, first - 1, -UNIT):
            step, form = steps[r, start], forms[start // UNIT]
            v, signs = vectors[r, start : start + UNIT], all_signs[r, start : start + UNIT]
            if step != ZERO and not keep[r, start]:
                # What the errors behind call for, and within the 8 the change that takes it up.
                for i in range(UNIT - 1, -1, -1):
                    y[i] = target[start + i] - rows[r, start + i]
                    for j in range(i + 1, UNIT):
                        y[i] -= lower[start + j, start + i] * y[j]
                for i in range(UNIT):
                    y[i] = (y[i] + rows[r, start + i]) / step
                shift = shifts[r, start // UNIT]
                take_signs(y, form, kind, shift, levels, signs, v)
                choose(y, form, kind, shift, True, levels, book, signs, v, all_points[r, start // UNIT], work, pulls)
            for i in range(UNIT):
                e, weights = rows[r, start + i] - step * v[i], lower[start + i]
                error[start + i] = e
                for k in range(first, start):
                    target[k] += e * weights[k]


@_jit
def sweep(matrix, forms, inverses, kind, step, shift, levels, book, first, gradient, v, signs, points, values, work,
          room):  # fmt: skip
    """Improves the 8 weights from column `first` on beside all others. Returns whether they changed."""
    y, before, pulls, deltas = room
    form, inverse = forms[first // UNIT], inverses[first // UNIT]
    for i in range(UNIT):
        y[i], before[i] = v[i], v[i]
        for j in range(UNIT):
            y[i] += inverse[i, j] * (gradient[first + j] / step)
    choose(y, form, kind, shift, False, levels, book, signs, v, points, work, pulls)
    changed = False
    for i in range(UNIT):
        changed |= v[i] != before[i]
        deltas[i] = step * v[i] - values[first + i]
    if changed:
        for i in range(UNIT):
            values[first + i] = step * v[i]
        change_four(deltas, matrix, first, gradient)
    return changed


@_jit
def products_with(matrix, first, x, out):
    """out = H x on the columns of x, from `first` on."""
    out[:] = ZERO
    for j in range(x.size):
        row = matrix[first + j]
        for k in range(x.size):
            out[k] += x[j] * row[first + k]


@_jit
def move_scale(matrix, d, code, top_code, unit, shifted, first, gradient, v, values, trial, products, deltas):
    """Moves a sub-block to the best scale near its optimum, and where points are shifted to the better shift.

    v: its points, which take the new shift. Returns (code, shift is turned).
    """
    n = v.size
    step = d * unit * (TWO * np.float32(code) + ONE)
    products_with(matrix, first, v, products)
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
            products_with(matrix, first, trial, deltas[:n])
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


@_jit
def move_unit(matrix, d, up, unit, codes, first, gradient, v, values, trial, products, deltas, least_gain):
    """A block's d, divided by `up`, moved to its least squares under H as float16, or as it was."""
    n = v.size
    size = n // codes.size
    for j in range(n):
        trial[j] = unit * (TWO * np.float32(codes[j // size]) + ONE) * v[j]
    products_with(matrix, first, trial, products)
    square, mixed = ZERO, ZERO
    for j in range(n):
        square += trial[j] * products[j]
        mixed += trial[j] * gradient[first + j]
    if not square > ZERO:
        return d
    new = round_f16((d + mixed / square) * up) / up
    change = new - d
    if not (new > ZERO and change * (TWO * mixed - change * square) > least_gain):
        return d
    for j in range(n):
        deltas[j] = new * trial[j] - values[first + j]
        values[first + j] = new * trial[j]
    change_four(deltas[:n], matrix, first, gradient)
    return new


@_jit
def row_error(row, values, gradient):
    total = 0.0
    for j in range(row.size):
        total += (row[j] - values[j]) * gradient[j]
    return total


@_jit
def refine(rows, ups, keep, matrix, forms, inverses, layout, levels, book, n_rounds, n_sweeps, gradients, state,
           errors):  # fmt: skip
    """Changes points, scales and units of rows in turn, each to its best beside all others, until nothing changes.

    rows, gradients float32 [n_rows, n]; ups float32 [n_rows], what a row was divided by; keep bool [n_rows, n_blocks].
    forms, inverses: H of each 8 columns and its inverse, float32 [n / 8, 8, 8].
    state: d float32 [n_rows, n_blocks] divided by ups, codes uint8 [n_rows, n_blocks, n_sub]; vectors, signs and values
    float32 [n_rows, n]; shifts float32 [n_rows, n / 8], points [n_rows, n / 8, 2].
    errors float64 [n_rows]: what is left of e H e.
    """
    all_d, all_codes, all_vectors, all_signs, all_shifts, all_points, all_values = state
    n_blocks, n_sub = all_codes.shape[1], all_codes.shape[2]
    block_size = rows.shape[1] // n_blocks
    size = block_size // n_sub
    work = np.empty(UNIT, np.float32), np.empty((2 + UNIT, book[0].shape[2]), np.float32)
    floats = np.empty((4, UNIT), np.float32)
    room = floats[0], floats[1], floats[2], floats[3]
    blocks = np.empty((3, block_size), np.float32)
    kind = layout.signs
    for r in range(rows.shape[0]):
        gradient, values = gradients[r], all_values[r]
        for _ in range(n_rounds):
            n_changed = 0
            for _ in range(n_sweeps):
                n_swept = 0
                for start in range(0, rows.shape[1], UNIT):
                    b, i = start // block_size, start % block_size // size
                    step = all_d[r, b] * layout.unit * (TWO * np.float32(all_codes[r, b, i]) + ONE)
                    if step == ZERO or keep[r, b]:
                        continue
                    v, signs = all_vectors[r, start : start + UNIT], all_signs[r, start : start + UNIT]
                    unit = start // UNIT
                    n_swept += sweep(
                        matrix, forms, inverses, kind, step, all_shifts[r, unit], levels, book, start, gradient, v,
                        signs, all_points[r, unit], values, work, room,
                    )  # fmt: skip
                n_changed += n_swept
                if n_swept == 0:
                    break
            for b in range(n_blocks):
                for i in range(0 if keep[r, b] or all_d[r, b] == ZERO else n_sub):
                    first = b * block_size + i * size
                    shift, before = all_shifts[r, first // UNIT], all_codes[r, b, i]
                    code, turned = move_scale(
                        matrix, all_d[r, b], int(before), int(layout.top_code), layout.unit, shift, first, gradient,
                        all_vectors[r, first : first + size], values, blocks[0, :size], blocks[1, :size], blocks[2],
                    )  # fmt: skip
                    if code != before or turned:
                        n_changed += 1
                        all_codes[r, b, i] = code
                        for unit in range(first // UNIT, (first + size) // UNIT):
                            all_shifts[r, unit] = -shift if turned else shift
            least_gain = UNIT_GAIN * np.float32(row_error(rows[r], values, gradient)) / np.float32(n_blocks)
            for b in range(n_blocks):
                if keep[r, b] or all_d[r, b] == ZERO:
                    continue
                first = b * block_size
                d = move_unit(
                    matrix, all_d[r, b], ups[r], layout.unit, all_codes[r, b], first, gradient,
                    all_vectors[r, first : first + block_size], values, blocks[0], blocks[1], blocks[2], least_gain,
                )  # fmt: skip
                n_changed += d != all_d[r, b]
                all_d[r, b] = d
            if n_changed == 0:
                break
        errors[r] = row_error(rows[r], values, gradient)
