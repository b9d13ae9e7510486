"""What searches with one trial a lane have in common."""

import numpy as np

from bitwright.formats.compiler import Array, Real, inlined


@inlined
def magnitude(blocks: Array, b: int) -> Real:
    """The largest magnitude of a block, among integers: bits order as magnitudes do, and vectorise in any order."""
    largest = np.int32(0)
    for j in range(blocks.shape[1]):
        bits = np.float32(abs(blocks[b, j])).view(np.int32)
        largest = bits if bits > largest else largest
    return np.int32(largest).view(np.float32)


@inlined
def lowest(error: Array) -> int:
    """The first lane with the least error; a multiple of four lanes. The least comes first, over four chains, for the
    index stalls the search."""
    e0, e1, e2, e3 = error[0], error[1], error[2], error[3]
    for t in range(4, error.size, 4):
        e0, e1 = min(e0, error[t]), min(e1, error[t + 1])
        e2, e3 = min(e2, error[t + 2]), min(e3, error[t + 3])
    least = min(e0, e1, e2, e3)
    best = 0
    for t in range(error.size):
        if error[t] == least:
            best = t
            break
    return best
