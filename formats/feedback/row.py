"""What the kernels of error feedback for levels and for points have in common: a row and its gradient."""

from typing import NamedTuple

import numpy as np

from bitwright.formats.compiler import Array, Real, jit
from bitwright.formats.kernels.products import PANEL

ZERO = np.float32(0)
UNIT_GAIN = np.float32(1e-2)
"""A new unit changes all weights of a block: only for this share of the row's error a block."""


class Tile(NamedTuple):
    """rows: float32 [n_rows, n]; ups: float32 [n_rows], what each was divided by; keep: bool [n_rows, n_blocks], blocks
    that stay; errors: float64 [n_rows], for what is left of e H e."""

    rows: Array
    ups: Array
    keep: Array
    errors: Array


class Positions(NamedTuple):
    """Weights in the order of the rounding, a lane of rows each: float32 [n, n_rows].

    order: int64 [n], the column at each position. rows: what is rounded; targets: what the weights should be, given
    the errors of the positions behind them.
    """

    order: Array
    rows: Array
    targets: Array
    errors: Array


class Row(NamedTuple):
    """Columns of a row. matrix: H of them, float32 [n, n]; values: float32 [n]; gradient: H (row - values) of the whole
    row, float32 [n]; up: what the row was divided by; least_gain: for which a unit is moved, where
    moves_units."""

    matrix: Array
    values: Array
    gradient: Array
    up: Real
    least_gain: Real
    moves_units: bool


@jit
def change_four(deltas: Array, matrix: Array, first: int, gradient: Array) -> None:
    """The gradient after as many values as there are deltas, a multiple of four, have changed from `first` on."""
    for j in range(0, deltas.size, 4):
        d0, d1, d2, d3 = deltas[j], deltas[j + 1], deltas[j + 2], deltas[j + 3]
        if d0 == ZERO and d1 == ZERO and d2 == ZERO and d3 == ZERO:
            continue
        h0, h1, h2, h3 = matrix[first + j], matrix[first + j + 1], matrix[first + j + 2], matrix[first + j + 3]
        for k in range(gradient.size):
            gradient[k] -= (d0 * h0[k] + d1 * h1[k]) + (d2 * h2[k] + d3 * h3[k])


@jit
def multiply(x: Array, matrix: Array, first: int, out: Array) -> None:
    """out = H x on the columns of x, a multiple of four, from `first` on."""
    last, whole = first + x.size, x.size // 8 * 8
    out[:] = ZERO
    for j in range(0, whole, 8):
        i = first + j
        x0, x1, x2, x3, x4, x5, x6, x7 = x[j], x[j + 1], x[j + 2], x[j + 3], x[j + 4], x[j + 5], x[j + 6], x[j + 7]
        h0, h1, h2 = matrix[i, first:last], matrix[i + 1, first:last], matrix[i + 2, first:last]
        h3, h4, h5 = matrix[i + 3, first:last], matrix[i + 4, first:last], matrix[i + 5, first:last]
        h6, h7 = matrix[i + 6, first:last], matrix[i + 7, first:last]
        for k in range(out.size):
            near = (x0 * h0[k] + x1 * h1[k]) + (x2 * h2[k] + x3 * h3[k])
            out[k] += near + ((x4 * h4[k] + x5 * h5[k]) + (x6 * h6[k] + x7 * h7[k]))
    for j in range(whole, x.size):
        x0, h0 = x[j], matrix[first + j, first:last]
        for k in range(out.size):
            out[k] += x0 * h0[k]


@jit
def dot(x: Array, y: Array) -> Real:
    """Their product; as many as a multiple of four."""
    s0, s1, s2, s3 = ZERO, ZERO, ZERO, ZERO
    for k in range(0, x.size, 4):
        s0 += x[k] * y[k]
        s1 += x[k + 1] * y[k + 1]
        s2 += x[k + 2] * y[k + 2]
        s3 += x[k + 3] * y[k + 3]
    total: Real = (s0 + s1) + (s2 + s3)
    return total


@jit
def row_error(weights: Array, values: Array, gradient: Array) -> float:
    """e H e."""
    total = 0.0
    for j in range(weights.size):
        total += (weights[j] - values[j]) * gradient[j]
    return total


@jit
def tell(deltas: Array, matrix: Array, first: int, gradients: Array) -> None:
    """The gradients, float32 [n_rows, n], after values have changed by deltas, float32 [n_rows, n_changed], from column
    `first` on. Most deltas are zero."""
    n_rows, n = gradients.shape
    places, counts = np.empty(deltas.shape, np.int64), np.zeros(n_rows, np.int64)
    for r in range(n_rows):
        for j in range(deltas.shape[1]):
            if deltas[r, j] != ZERO:
                places[r, counts[r]] = j
                counts[r] += 1
    # Columns of H that stay in the cache while the rows pass by.
    for start in range(0, n, PANEL):
        stop = min(start + PANEL, n)
        for r in range(n_rows):
            gradient, delta, place, whole = gradients[r, start:stop], deltas[r], places[r], counts[r] // 4 * 4
            for m in range(0, whole, 4):
                i0, i1, i2, i3 = place[m], place[m + 1], place[m + 2], place[m + 3]
                d0, d1, d2, d3 = delta[i0], delta[i1], delta[i2], delta[i3]
                h0, h1 = matrix[first + i0, start:stop], matrix[first + i1, start:stop]
                h2, h3 = matrix[first + i2, start:stop], matrix[first + i3, start:stop]
                for k in range(gradient.size):
                    gradient[k] -= (d0 * h0[k] + d1 * h1[k]) + (d2 * h2[k] + d3 * h3[k])
            for m in range(whole, counts[r]):
                d0, h0 = delta[place[m]], matrix[first + place[m], start:stop]
                for k in range(gradient.size):
                    gradient[k] -= d0 * h0[k]
