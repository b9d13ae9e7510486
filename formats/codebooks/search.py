"""What makes a format of scaled points of a codebook: the effort of its search, its encoder and its decoder."""

from enum import IntEnum

import numpy as np

from bitwright.formats.block_format import BlockFormat
from bitwright.formats.choices import Effort
from bitwright.formats.codebooks.grids import codebook, points
from bitwright.formats.codebooks.kernels import N_LANES, N_UNITS, SIGNED, Book, SearchEffort, Work, search
from bitwright.formats.encoding import to_blocks
from bitwright.formats.parts import Layout, PointBlocks, PointParts

BLOCK_SIZE = 256


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
    rows: np.ndarray, importance: np.ndarray | None, blocks: PointBlocks, effort: SearchEffort
) -> PointParts:
    """The parts of rows, checked and weighted as in to_blocks."""
    layout = blocks.layout
    weights_of_blocks, weights = to_blocks(rows, importance, BLOCK_SIZE)
    book = codebook(blocks.codebook, effort.n_candidates)
    n_blocks, n_groups = len(weights_of_blocks), BLOCK_SIZE // book.points.shape[1]
    d, scales = np.empty(n_blocks, np.float32), np.empty((n_blocks, layout.n_sub), np.uint8)
    indices, signs = np.empty((n_blocks, n_groups), np.uint16), np.empty((n_blocks, n_groups), np.uint8)
    parts, work = PointParts(d, scales, indices, signs), _allocate(layout, effort, n_groups, effort.n_candidates)
    fields = Book(book.points, book.levels, book.candidates, book.indices)
    search(weights_of_blocks, weights, layout, effort, fields, work, parts)
    return parts


def signs_and_shifts(blocks: PointBlocks, parts: PointParts) -> tuple[np.ndarray, np.ndarray]:
    """What a coordinate of a point is multiplied by, 1 or -1, and what is added to it then: float32, of every group and
    coordinate [n_blocks, n_groups, n_dims], and of every group [n_blocks, n_groups]."""
    n_dims, shifts = points(blocks.codebook).shape[1], np.zeros(parts.signs.shape, np.float32)
    if blocks.layout.signs == SIGNED:
        none = np.ones((*parts.signs.shape, n_dims), np.float32)
        return none, 1 - 2 * parts.signs.astype(np.float32) if blocks.layout.n_variants == 2 else shifts
    bits = np.unpackbits(parts.signs[:, :, None], axis=2, count=n_dims, bitorder="little")
    return 1 - 2 * bits.astype(np.float32), shifts


def point_format(
    ggml_type: IntEnum, blocks: PointBlocks, efforts: dict[Effort, SearchEffort], needs_importance: bool = True
) -> BlockFormat:
    """A format of scaled points, which is too coarse to do without an importance matrix or is not."""

    def encode(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
        return blocks.pack(search_rows(rows, importance, blocks, efforts[effort])).reshape(len(rows), -1)

    def decode(data: np.ndarray) -> np.ndarray:
        parts = blocks.open(data)
        signs, shifts = signs_and_shifts(blocks, parts)
        vectors = points(blocks.codebook)[parts.indices] * signs + shifts[:, :, None]
        scales = parts.d[:, None] * blocks.layout.unit * (2 * parts.scales.astype(np.float32) + 1)
        weights: np.ndarray = scales[:, :, None] * vectors.reshape(*scales.shape, -1)
        return weights.reshape(len(data), -1)

    size = blocks.block_size, blocks.type_size
    return BlockFormat(ggml_type, *size, encode, decode, needs_importance=needs_importance, blocks=blocks)
