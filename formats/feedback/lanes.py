"""Products with the triangular factor L of many rows at once: a lane is a row, an array [n, n_rows].

So errors of a position, and what they call for elsewhere, lie beside each other for all rows, and a row's numbers are
summed in one order whatever rows are beside it.
"""

import numpy as np

from bitwright.formats.compiler import Array, Real, jit

ZERO = np.float32(0)
GROUP = 8
"""Positions that are summed in one go."""
Group = tuple[Real, Real, Real, Real, Real, Real, Real, Real]
# Positions whose lanes stay in the cache while those that they are made of pass by.
_NEAR = 32


@jit
def add_group(factors: Group, lanes: Array, p: int, out: Array) -> None:
    """out += factors @ lanes[p : p + 8]."""
    f0, f1, f2, f3, f4, f5, f6, f7 = factors
    x0, x1, x2, x3 = lanes[p], lanes[p + 1], lanes[p + 2], lanes[p + 3]
    x4, x5, x6, x7 = lanes[p + 4], lanes[p + 5], lanes[p + 6], lanes[p + 7]
    for r in range(out.size):
        near = (f0 * x0[r] + f1 * x1[r]) + (f2 * x2[r] + f3 * x3[r])
        far = (f4 * x4[r] + f5 * x5[r]) + (f6 * x6[r] + f7 * x7[r])
        out[r] += near + far


@jit
def add_one(factor: Real, lane: Array, out: Array) -> None:
    for r in range(out.size):
        out[r] += factor * lane[r]


@jit
def column_of(lower: Array, p: int, k: int) -> Group:
    """lower[p : p + 8, k]."""
    return (
        lower[p, k],
        lower[p + 1, k],
        lower[p + 2, k],
        lower[p + 3, k],
        lower[p + 4, k],
        lower[p + 5, k],
        lower[p + 6, k],
        lower[p + 7, k],
    )


@jit
def carry_group(lower: Array, lanes: Array, p: int, first: int, out: Array) -> None:
    """What lanes[p : p + 8] call for at the positions first to p: out[k] += lower[p : p + 8, k] @ lanes[p : p + 8]."""
    for k in range(first, p):
        add_group(column_of(lower, p, k), lanes, p, out[k])


@jit
def carry(lower: Array, lanes: Array, first: int, last: int, out: Array) -> None:
    """What lanes[first:last], groups of 8, call for at all positions before them."""
    for start in range(0, first, _NEAR):
        stop = min(start + _NEAR, first)
        for p in range(first, last, GROUP):
            for k in range(start, stop):
                add_group(column_of(lower, p, k), lanes, p, out[k])


@jit
def carry_all(lower: Array, lanes: Array, span: int, out: Array) -> None:
    """out += L' lanes, but for the diagonal."""
    n = lanes.shape[0]
    for last in range(n, 0, -span):
        first = max(0, last - span)
        for end in range(last, first, -GROUP):
            start = max(first, end - GROUP)
            for p in range(end - 1, start - 1, -1):
                for k in range(start, p):
                    add_one(lower[p, k], lanes[p], out[k])
            if start > first:
                carry_group(lower, lanes, start, first, out)
        if first > 0:
            carry(lower, lanes, first, last, out)


@jit
def weigh(pivots: Array, lanes: Array, errors: Array) -> None:
    """lanes = D lanes, and errors, float64 [n_rows], the sums of the products of both."""
    errors[:] = 0.0
    for p in range(lanes.shape[0]):
        lane, pivot = lanes[p], pivots[p]
        for r in range(lane.size):
            weighed = pivot * lane[r]
            errors[r] += np.float64(weighed) * np.float64(lane[r])
            lane[r] = weighed


@jit
def multiply_lower(lower: Array, lanes: Array, out: Array) -> None:
    """out = L lanes; the diagonal of L is 1."""
    n = lanes.shape[0]
    out[:] = lanes
    for start in range(0, n, _NEAR):
        stop = min(start + _NEAR, n)
        whole = start // GROUP * GROUP
        for p in range(0, whole, GROUP):
            for k in range(start, stop):
                f = lower[k]
                factors = f[p], f[p + 1], f[p + 2], f[p + 3], f[p + 4], f[p + 5], f[p + 6], f[p + 7]
                add_group(factors, lanes, p, out[k])
        for k in range(start, stop):
            for p in range(whole, k):
                add_one(lower[k, p], lanes[p], out[k])
