"""What IQ1, IQ2 and IQ3 tell the kernels that search their codes: layout and effort; and the search of rows."""

from typing import NamedTuple

import numpy as np

from formats.block_format import Effort
from formats.encoding import to_blocks
from formats.grids import codebook
from formats.iq_kernels import N_LANES, N_UNITS, search
from formats.parts import Layout

BLOCK_SIZE = 256


class SearchEffort(NamedTuple):
    """n_candidates: points that are looked at for a group, a multiple of 8.
    peaks: levels that a sub-block's largest weight may land on when its scale is guessed, float32 [n].
    refine: whether the guess is refined with the candidates' help, over scales that are `ratios` of it,
    float32 [N_LANES].
    unit_trials: what multiple of the unit the largest scale may be, float32 [N_UNITS * n].
    n_refits: how often the best d is refitted; n_rounds: how often all is done with candidates of the scales so far.
    """

    n_candidates: int
    peaks: np.ndarray
    refine: bool
    ratios: np.ndarray
    unit_trials: np.ndarray
    n_refits: int
    n_rounds: int


def search_efforts(
    layout: Layout, highest: float, reach: float, n_candidates: tuple[int, int], n_rounds: int
) -> dict[Effort, SearchEffort]:
    """The two levels of effort of a format.

    highest: its highest level; reach: how many times that the largest weight of a sub-block, then clipped, may be.
    n_candidates: of best and fast; n_rounds: of best.
    """
    largest_scale = 2 * float(layout.top_code) + 1

    def effort(n_candidates: int, n_trials: int, refine: bool, n_refits: int, n_rounds: int) -> SearchEffort:
        peaks = np.geomspace(0.5 * highest, reach * highest, n_trials, dtype=np.float32)
        ratios = np.geomspace(0.65, 1.9, N_LANES, dtype=np.float32)
        unit_trials = np.geomspace(1.4 * largest_scale, largest_scale / 4, 2 * n_trials, dtype=np.float32)
        return SearchEffort(n_candidates, peaks, refine, ratios, unit_trials, n_refits, n_rounds)

    best, fast = n_candidates
    return {"best": effort(best, 32, True, 1, n_rounds), "fast": effort(fast, 8, False, 0, 1)}


class Work(NamedTuple):
    """Where a search keeps what it knows of a super-block; a row is a variant of a group.

    x: the weights, or their magnitudes where the format has sign bits, brought near one; odd: parity of each group's
    signs; coarse: of each sub-block, what a scale costs over its square.
    cells, a2, b: cell, 2 A and B of the candidates of each row; cheapest: of each candidate, the cheapest wrong sign.
    minima: least errors [row, lane]; picks [group]: row and candidate.
    fits, curvature: of each sub-block, the best scale and the cost of a deviation over its square.
    d, unit, error: of each unit; chosen [3, unit, sub-block]: lane, code and scale.
    lanes, peak_lanes, unit_lanes: running values of the trials.
    """

    x: np.ndarray
    odd: np.ndarray
    coarse: np.ndarray
    cells: np.ndarray
    a2: np.ndarray
    b: np.ndarray
    cheapest: np.ndarray
    minima: np.ndarray
    picks: np.ndarray
    fits: np.ndarray
    curvature: np.ndarray
    d: np.ndarray
    unit: np.ndarray
    error: np.ndarray
    chosen: np.ndarray
    lanes: np.ndarray
    peak_lanes: np.ndarray
    unit_lanes: np.ndarray


def _allocate(layout: Layout, effort: SearchEffort, n_groups: int, n_candidates: int) -> Work:
    n_rows = n_groups * layout.n_variants

    def floats(*shape: int) -> np.ndarray:
        return np.empty(shape, np.float32)

    return Work(
        x=floats(BLOCK_SIZE),
        odd=np.empty(n_groups, np.int64),
        coarse=floats(layout.n_sub),
        cells=np.empty(n_rows, np.int64),
        a2=floats(n_rows, n_candidates),
        b=floats(n_rows, n_candidates),
        cheapest=floats(n_candidates),
        minima=floats(n_rows, N_LANES),
        picks=np.empty((n_groups, 2), np.int64),
        fits=floats(layout.n_sub),
        curvature=floats(layout.n_sub),
        d=floats(N_UNITS),
        unit=floats(N_UNITS),
        error=floats(N_UNITS),
        chosen=floats(3, N_UNITS, layout.n_sub),
        lanes=floats(5, N_LANES),
        peak_lanes=floats(3, len(effort.peaks)),
        unit_lanes=floats(2, len(effort.unit_trials)),
    )


def search_rows(
    rows: np.ndarray, importance: np.ndarray | None, grid: str, layout: Layout, effort: SearchEffort
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The codes of rows, checked and weighted as in to_blocks; grid: name of the codebook.

    Returns d float32 [n_blocks] (values of float16), scales uint8 [n_blocks, n_sub], point indices
    uint16 [n_blocks, n_groups] and signs uint8 [n_blocks, n_groups]: a bit a weight, lowest first, set where it is
    negative, or the variant of the group when layout.signs is SIGNED.
    """
    blocks, weights = to_blocks(rows, importance, BLOCK_SIZE)
    book = codebook(grid, effort.n_candidates)
    n_blocks, n_groups = len(blocks), BLOCK_SIZE // book.points.shape[1]
    d, scales = np.empty(n_blocks, np.float32), np.empty((n_blocks, layout.n_sub), np.uint8)
    indices, signs = np.empty((n_blocks, n_groups), np.uint16), np.empty((n_blocks, n_groups), np.uint8)
    work = _allocate(layout, effort, n_groups, effort.n_candidates)
    fields = book.points, book.levels, book.candidates, book.indices
    search(blocks, weights, layout, effort, fields, work, (d, scales, indices, signs))
    return d, scales, indices, signs
