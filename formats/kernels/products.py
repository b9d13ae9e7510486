"""Dense products and a triangular factor whose bits depend on the numbers alone.

A BLAS may sum in another order on another number of threads, or for another number of rows at once; what is rounded to
codes afterwards must not. Here every element is summed in one order, whatever the rows beside it and whoever computes
them.
"""

from collections.abc import Callable, Iterable

import numpy as np

from bitwright.formats.compiler import Array, jit

# Columns that are worked on at a time, so that they stay in the cache while rows pass by.
PANEL = 512
# Columns of the factor that are eliminated together, and rows that one call works on.
STEP = 64
STRIPE = 256

Run = Callable[[Callable[[int], None], Iterable[int]], Iterable[None]]


@jit
def add_products(left: Array, right: Array, first: int, last: int, n_columns: int, out: Array) -> None:
    """out[:, :n_columns] += left[:, first:last] @ right[first:last, :n_columns].

    left, out: float32 [n_rows, n]; right: float32 [n, n]; last - first: a multiple of 4.
    """
    whole = first + (last - first) // 8 * 8
    for start in range(0, n_columns, PANEL):
        stop = min(start + PANEL, n_columns)
        for p in range(first, whole, 8):
            for r in range(left.shape[0]):
                _add_eight(left[r], right, p, start, out[r, start:stop])
        for p in range(whole, last, 4):
            for r in range(left.shape[0]):
                _add_four(left[r], right, p, start, out[r, start:stop])


# Loops over one-dimensional slices are what the compiler makes vector code of.
@jit
def _add_four(factors: Array, right: Array, p: int, start: int, out: Array) -> None:
    """out += factors[p : p + 4] @ right[p : p + 4, start:]."""
    stop = start + out.size
    a0, a1, a2, a3 = factors[p], factors[p + 1], factors[p + 2], factors[p + 3]
    b0, b1, b2, b3 = right[p, start:stop], right[p + 1, start:stop], right[p + 2, start:stop], right[p + 3, start:stop]
    for k in range(out.size):
        out[k] += (a0 * b0[k] + a1 * b1[k]) + (a2 * b2[k] + a3 * b3[k])


@jit
def _add_eight(factors: Array, right: Array, p: int, start: int, out: Array) -> None:
    """The sum of two times _add_four, in one go."""
    stop, q = start + out.size, p + 4
    a0, a1, a2, a3 = factors[p], factors[p + 1], factors[p + 2], factors[p + 3]
    b0, b1, b2, b3 = right[p, start:stop], right[p + 1, start:stop], right[p + 2, start:stop], right[p + 3, start:stop]
    c0, c1, c2, c3 = factors[q], factors[q + 1], factors[q + 2], factors[q + 3]
    d0, d1, d2, d3 = right[q, start:stop], right[q + 1, start:stop], right[q + 2, start:stop], right[q + 3, start:stop]
    for k in range(out.size):
        near = out[k] + ((a0 * b0[k] + a1 * b1[k]) + (a2 * b2[k] + a3 * b3[k]))
        out[k] = near + ((c0 * d0[k] + c1 * d1[k]) + (c2 * d2[k] + c3 * d3[k]))


def cholesky(matrix: np.ndarray, run: Run = map) -> bool:
    """Replaces the lower triangle of a symmetric float64 matrix by that of its Cholesky factor.

    run: applies a function to numbers, like the built-in map, perhaps on several threads. Returns whether the matrix is
    positive definite; if it is not, its content is lost.
    """
    n = len(matrix)
    for first in range(0, n, STEP):
        last = min(first + STEP, n)
        if not _factor_corner(matrix, first, last):
            return False

        def solve(row: int, first: int = first, last: int = last) -> None:
            _solve_rows(matrix, first, last, row, min(row + STRIPE, n))

        for _ in run(solve, range(last, n, STRIPE)):
            pass
        # Contiguous along the rows, which the update goes along.
        panel = np.ascontiguousarray(matrix[last:, first:last].T)

        def update(row: int, first: int = first, last: int = last, panel: np.ndarray = panel) -> None:
            _update_rows(matrix, panel, first, last, row, min(row + STRIPE, n))

        for _ in run(update, range(last, n, STRIPE)):
            pass
    return True


@jit
def _factor_corner(matrix: Array, first: int, last: int) -> bool:
    for i in range(first, last):
        for j in range(first, i + 1):
            total = matrix[i, j]
            for k in range(first, j):
                total -= matrix[i, k] * matrix[j, k]
            if i == j:
                if not total > 0.0:
                    return False
                matrix[i, i] = np.sqrt(total)
            else:
                matrix[i, j] = total / matrix[j, j]
    return True


@jit
def _solve_rows(matrix: Array, first: int, last: int, row: int, end: int) -> None:
    for i in range(row, end):
        for j in range(first, last):
            total = matrix[i, j]
            for k in range(first, j):
                total -= matrix[i, k] * matrix[j, k]
            matrix[i, j] = total / matrix[j, j]


@jit
def _update_rows(matrix: Array, panel: Array, first: int, last: int, row: int, end: int) -> None:
    """Subtracts what columns first .. last contribute to the lower triangle of these rows; panel[j, k - last]."""
    whole = (last - first) // 4 * 4
    for start in range(last, end, PANEL):
        for i in range(max(row, start), end):
            stop = min(start + PANEL, i + 1)
            target, factors, s0, s1 = matrix[i, start:stop], matrix[i, first:last], start - last, stop - last
            for j in range(0, whole, 4):
                a0, a1, a2, a3 = factors[j], factors[j + 1], factors[j + 2], factors[j + 3]
                b0, b1, b2, b3 = panel[j, s0:s1], panel[j + 1, s0:s1], panel[j + 2, s0:s1], panel[j + 3, s0:s1]
                for k in range(target.size):
                    target[k] -= (a0 * b0[k] + a1 * b1[k]) + (a2 * b2[k] + a3 * b3[k])
            for j in range(whole, last - first):
                a0, b0 = factors[j], panel[j, s0:s1]
                for k in range(target.size):
                    target[k] -= a0 * b0[k]
