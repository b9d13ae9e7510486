"""Codebooks of the IQ formats: points of a grid in 4 or 8 dimensions, and which of them lie near a given place.

The points are those of the `gguf` package. From them come, at first use and within some tens of milliseconds, lists of
candidates: every coordinate of a group of weights is rounded to the codebook's levels on its own, which gives a cell,
and a cell's candidates are the points nearest to its centre.
"""

import functools
from dataclasses import dataclass

import gguf
import numpy as np

from bitwright.formats.compiler import Array, jit

# Lowest and highest level of a coordinate and how many there are; they are evenly spaced, or nearly so.
_LEVELS = {"IQ1_S": (-8, 8, 3), "IQ1_M": (-8, 8, 3), "IQ3_XXS": (4, 62, 8), "IQ3_S": (1, 15, 8)}
_LEVELS |= dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S"), (8, 43, 3))


@dataclass(frozen=True)
class Codebook:
    """points: int8 [n_points, n_dims]; coordinates are positive, or of both signs where the format stores no signs.
    levels: float32, the levels of a coordinate, taken as evenly spaced: lowest, spacing, and index of the highest.
    candidates: int8 [n_cells, n_dims, n_candidates], coordinates of the points nearest to each cell's centre.
    indices: uint16 [n_cells, n_candidates], which points they are.
    """

    points: np.ndarray
    levels: tuple[np.float32, np.float32, np.float32]
    candidates: np.ndarray
    indices: np.ndarray


@functools.cache
def points(name: str) -> np.ndarray:
    """The grid of gguf's decoder for that format, int8 [n_points, n_dims].

    IQ1's -1, 0, 1 come as -8, 0, 8, for its weights are shifted by an eighth: point k of IQ1_M's 4096 is point k % 2048
    of IQ1_S, shifted by +1 or, in the second half, by -1.
    """
    if name == "IQ1_M":
        return np.concatenate([points("IQ1_S") + np.int8(1), points("IQ1_S") - np.int8(1)])
    decoder = getattr(gguf.quants, name)
    decoder.init_grid()
    grid: np.ndarray = decoder.grid.reshape(decoder.grid_shape) * (8 if name == "IQ1_S" else 1)
    return grid.astype(np.int8)


@functools.cache
def codebook(name: str, n_candidates: int) -> Codebook:
    """The codebook of a format, with lists of n_candidates points a cell, at most all of them."""
    grid = points(name)
    bottom, top, n_levels = _LEVELS[name]
    levels = np.float32(bottom), np.float32((top - bottom) / (n_levels - 1)), np.float32(n_levels - 1)
    indices = np.empty((n_levels ** grid.shape[1], n_candidates), np.uint16)
    low, high = (_half_distances(half, n_levels) for half in np.split((grid - levels[0]) / levels[1], 2, axis=1))
    _list_nearest(low, high, indices)
    return Codebook(grid, levels, np.ascontiguousarray(grid[indices].transpose(0, 2, 1)), indices)


def _half_distances(coordinates: np.ndarray, n_levels: int) -> np.ndarray:
    """Squared distance of every point from every cell of n_dims coordinates, in quarters: int32 [n_cells, n_points].

    coordinates: float32 [n_points, n_dims], in levels. The first one is the cell number's lowest digit. Quarters of a
    level tell IQ1_M's two shifts of a point apart.
    """
    n_dims = coordinates.shape[1]
    cells = np.arange(n_levels**n_dims)[:, None, None] // n_levels ** np.arange(n_dims) % n_levels
    distances: np.ndarray = np.rint(16 * ((cells - coordinates) ** 2).sum(axis=2))
    return distances.astype(np.int32)


@jit
def _list_nearest(low: Array, high: Array, indices: Array) -> None:
    """indices[cell]: the points nearest to a cell's centre; low, high: distances of its lower and upper half.

    Points are sorted by squared distance with a counting sort; equals keep their order.
    """
    n_points, n_wanted = low.shape[1], indices.shape[1]
    distances, counts = np.empty(n_points, np.int32), np.empty(low.max() + high.max() + 2, np.int32)
    for cell in range(indices.shape[0]):
        lower, upper = low[cell % low.shape[0]], high[cell // low.shape[0]]
        counts[:] = 0
        for k in range(n_points):
            distances[k] = lower[k] + upper[k]
        for k in range(n_points):
            counts[distances[k] + 1] += 1
        for distance in range(counts.size - 1):
            counts[distance + 1] += counts[distance]
        for k in range(n_points):
            place = counts[distances[k]]
            counts[distances[k]] += 1
            if place < n_wanted:
                indices[cell, place] = k
