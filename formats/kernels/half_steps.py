"""The nearest of some levels, looked up: for levels between no two of which a midpoint falls inside half a unit."""

import numpy as np

from bitwright.formats.compiler import Real, jit

# Levels lie in -HALF_STEPS / 2 .. HALF_STEPS / 2.
HALF_STEPS = 256
LOWEST, HIGHEST = np.float32(-HALF_STEPS / 2), np.float32(HALF_STEPS / 2 - 0.5)


def nearest_levels(levels: np.ndarray) -> np.ndarray:
    """Which level is the nearest one in each half unit, int64 [2 * HALF_STEPS]; that of u is entry half_step(u)."""
    halves = (np.arange(-HALF_STEPS, HALF_STEPS) + 0.5) / 2
    nearest: np.ndarray = np.abs(halves[:, None] - levels).argmin(axis=1)
    return nearest


@jit
def half_step(u: Real) -> int:
    """The half unit that u lies in, counted from the lowest one."""
    return int(np.floor(np.float32(2) * min(max(u, LOWEST), HIGHEST))) + HALF_STEPS
