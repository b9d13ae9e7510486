"""Dense products and a triangular factor whose bits depend on the numbers alone.

A BLAS may sum in another order on another number of threads, or for another number of rows at once; what is rounded to
codes afterwards must not. Here every element is summed in one order, whatever the rows beside it and whoever computes
them.
"""

from collections.abc import Callable, Iterable

import numpy as np

from formats.compiler import njit

# Columns that are worked on at a time, so that they stay in the cache while rows pass by.
PANEL = 256
# Columns of the factor that are eliminated together, and rows that one call works on.
STEP = 64
STRIPE = 256

_jit = njit(nogil=True, cache=True, error_model="numpy")

Run = Callable[[Callable[[int], None], Iterable[int]], Iterable[None]]


@_jit
def add_products(left, right, first, last, n_columns, out):
    """out[:, :n_columns] += left[:, first:last] @ right[first:last, :n_columns].

    left, out: float32 [n_rows, n]; right: float32 [n, n]; last - first: a multiple of 4.
    """
    n_rows = left.shape[0]
    whole = n_rows // 4 * 4
    for start in range(0, n_columns, PANEL):
        stop = min(start + PANEL, n_columns)
        for p in range(first, last, 4):
            b0, b1, b2, b3 = right[p], right[p + 1], right[p + 2], right[p + 3]
            # Four rows share what is loaded of `right`.
            for r in range(0, whole, 4):
                s0, s1, s2, s3 = out[r], out[r + 1], out[r + 2], out[r + 3]
                a00, a01, a02, a03 = left[r, p], left[r, p + 1], left[r, p + 2], left[r, p + 3]
                a10, a11, a12, a13 = left[r + 1, p], left[r + 1, p + 1], left[r + 1, p + 2], left[r + 1, p + 3]
                a20, a21, a22, a23 = left[r + 2, p], left[r + 2, p + 1], left[r + 2, p + 2], left[r + 2, p + 3]
                a30, a31, a32, a33 = left[r + 3, p], left[r + 3, p + 1], left[r + 3, p + 2], left[r + 3, p + 3]
                for k in range(start, stop):
                    x0, x1, x2, x3 = b0[k], b1[k], b2[k], b3[k]
                    s0[k] += (a00 * x0 + a01 * x1) + (a02 * x2 + a03 * x3)
                    s1[k] += (a10 * x0 + a11 * x1) + (a12 * x2 + a13 * x3)
                    s2[k] += (a20 * x0 + a21 * x1) + (a22 * x2 + a23 * x3)
                    s3[k] += (a30 * x0 + a31 * x1) + (a32 * x2 + a33 * x3)
            for r in range(whole, n_rows):
                s0 = out[r]
                a00, a01, a02, a03 = left[r, p], left[r, p + 1], left[r, p + 2], left[r, p + 3]
                for k in range(start, stop):
                    s0[k] += (a00 * b0[k] + a01 * b1[k]) + (a02 * b2[k] + a03 * b3[k])


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


@_jit
def _factor_corner(matrix, first, last):
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


@_jit
def _solve_rows(matrix, first, last, row, end):
    for i in range(row, end):
        for j in range(first, last):
            total = matrix[i, j]
            for k in range(first, j):
                total -= matrix[i, k] * matrix[j, k]
            matrix[i, j] = total / matrix[j, j]


@_jit
def _update_rows(matrix, panel, first, last, row, end):
    """Subtracts what columns first .. last contribute to the lower triangle of these rows; panel[j, k - last]."""
    for start in range(last, end, PANEL):
        for i in range(row, end):
            target = matrix[i]
            stop = min(start + PANEL, i + 1)
            for j in range(0, last - first - 3, 4):
                a0, a1, a2, a3 = target[first + j], target[first + j + 1], target[first + j + 2], target[first + j + 3]
                b0, b1, b2, b3 = panel[j], panel[j + 1], panel[j + 2], panel[j + 3]
                for k in range(start, stop):
                    target[k] -= (a0 * b0[k - last] + a1 * b1[k - last]) + (a2 * b2[k - last] + a3 * b3[k - last])
            for j in range((last - first) // 4 * 4, last - first):
                a0, b0 = target[first + j], panel[j]
                for k in range(start, stop):
                    target[k] -= a0 * b0[k - last]
