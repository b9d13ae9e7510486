"""A tile of rows whose codes are chosen together, for the kernels of error feedback; see formats/feedback/choose.py."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from bitwright.formats.choices import Effort, FeedbackLevel
from bitwright.formats.codebooks.grids import codebook
from bitwright.formats.codebooks.kernels import SIGNED
from bitwright.formats.codebooks.search import signs_and_shifts
from bitwright.formats.feedback import lanes
from bitwright.formats.feedback import points as feedback_points
from bitwright.formats.feedback import scalar as feedback_scalar
from bitwright.formats.feedback.moment_factor import Factor
from bitwright.formats.feedback.row import Positions, Tile
from bitwright.formats.kernels.half_steps import nearest_levels
from bitwright.formats.parts import PointBlocks, PointParts, ScalarBlocks, ScalarParts

# Positions that are rounded before what their errors call for is carried to all others.
_SPAN = 128
# Columns that are visited together, where blocks are not larger.
_VISITED = 256
_SWEEPS = 2
# Of a format with no more levels the codes alone leave much of the error.
_FEW_LEVELS = 8


class Search(NamedTuple):
    """n_rounds: of the descent at the most; n_candidates: points of a codebook that are tried; compares: a row that
    was better as it came stays."""

    n_rounds: int
    n_candidates: int
    compares: bool


def search_of(blocks: ScalarBlocks | PointBlocks, level: FeedbackLevel, effort: Effort) -> Search:
    n_candidates = 64 if effort == "best" else 32
    if level == "quick":
        coarse = isinstance(blocks, PointBlocks) or blocks.levels.size <= _FEW_LEVELS
        return Search(1 if coarse else 0, n_candidates, compares=False)
    return Search(4 if effort == "best" else 2, n_candidates, compares=True)


class _Rows(ABC):
    """rows: float32 [n_rows, n]; they are brought near one by a power of two for each row, so that no square of them
    leaves float32. keep: bool [n_rows, n_blocks], blocks that stay as they are. Subclasses add what the blocks hold."""

    def __init__(self, rows: np.ndarray, keep: np.ndarray, factor: Factor, search: Search):
        self.keep, self.factor, self.search = keep, factor, search
        exponents = np.frexp(np.abs(rows).max(axis=1))[1].clip(-100, 127)
        self.ups = np.ldexp(np.float32(1), exponents)
        self.rows = rows / self.ups[:, None]

    def choose(self) -> np.ndarray:
        """The rows' data, uint8 [n_rows, row_bytes]."""
        before: list[np.ndarray] = []
        if self.search.compares:
            before = [self._weigh(self._left()), *(array.copy() for array in self._chosen())]
        left = self.round()
        if self.search.n_rounds:
            errors = self._descend(left)
            if before:
                worse = ~(errors < before[0])
                for array, as_it_came in zip(self._chosen(), before[1:], strict=True):
                    array[worse] = as_it_came[worse]
        return self._close().reshape(len(self.rows), -1)

    @abstractmethod
    def _chosen(self) -> list[np.ndarray]:
        """The arrays that hold the choice, a row at a time."""

    @abstractmethod
    def _round_spans(self, positions: Positions) -> Iterator[tuple[int, int]]:
        """Round the positions, and make them the choice; yields (first, last) of each span done, the last one first."""

    @abstractmethod
    def values(self) -> np.ndarray:
        """What the choice decodes to, float32 [n_rows, n]."""

    @abstractmethod
    def _refine(self, tile: Tile, values: np.ndarray, gradients: np.ndarray) -> None:
        """Improve the choice until nothing changes."""

    @abstractmethod
    def _close(self) -> np.ndarray:
        """The blocks of the choice."""

    def round(self) -> np.ndarray:
        """Rounds in turn. Returns L' e, float32 [n, n_rows]."""
        rows = self._lanes(self.rows)
        positions = Positions(self.factor.order, rows, rows.copy(), np.empty_like(rows))
        for first, last in self._round_spans(positions):
            lanes.carry(self.factor.lower, positions.errors, first, last, positions.targets)
        left: np.ndarray = positions.targets - rows + positions.errors
        return left

    def _left(self) -> np.ndarray:
        """L' e of the choice."""
        errors = self._lanes(self.rows - self.values())
        left = errors.copy()
        lanes.carry_all(self.factor.lower, errors, _SPAN, left)
        return left

    def _weigh(self, left: np.ndarray) -> np.ndarray:
        """e H e, float64 [n_rows], of L' e, which becomes D L' e."""
        errors = np.empty(len(self.rows))
        lanes.weigh(self.factor.pivots, left, errors)
        return errors

    def _descend(self, left: np.ndarray) -> np.ndarray:
        """Descends from the choice, of which `left` is L' e; what then remains of e H e, float64 [n_rows]."""
        errors, products, by_column = self._weigh(left), np.empty_like(left), np.empty_like(left)
        lanes.multiply_lower(self.factor.lower, left, products)
        by_column[self.factor.order] = products
        gradients = np.ascontiguousarray(by_column.T)
        self._refine(Tile(self.rows, self.ups, self.keep, errors), self.values(), gradients)
        return errors

    def _lanes(self, array: np.ndarray) -> np.ndarray:
        """[n_rows, n] as lanes of rows, by position."""
        lanes: np.ndarray = np.ascontiguousarray(array.T)[self.factor.order]
        return lanes

    def _spread(self, sub_blocks: np.ndarray) -> np.ndarray:
        """Values of sub-blocks, [n_rows, n_blocks, n_sub], for every weight: [n_rows, n]."""
        flat = sub_blocks.reshape(len(self.rows), -1)
        return np.repeat(flat, self.rows.shape[1] // flat.shape[1], axis=1)


def _spans(n: int) -> Iterator[tuple[int, int]]:
    return ((max(0, last - _SPAN), last) for last in range(n, 0, -_SPAN))


class ScalarRows(_Rows):
    """Rows of scaled levels."""

    def __init__(
        self,
        blocks: ScalarBlocks,
        rows: np.ndarray,
        data: np.ndarray,
        keep: np.ndarray,
        factor: Factor,
        search: Search,
    ):
        super().__init__(rows, keep, factor, search)
        self.blocks, self.tables = blocks, (blocks.scale_table, blocks.minimum_table)
        self.nearest = blocks.levels[nearest_levels(blocks.levels)].astype(np.float32)
        units, places, levels = blocks.open(data)
        self.units = units.reshape(*keep.shape, 2) / self.ups[:, None, None]
        self.places = places.reshape(*keep.shape, 2, -1)
        self.levels = levels.reshape(len(rows), -1).astype(np.float32)

    def _chosen(self) -> list[np.ndarray]:
        return [self.units, self.places, self.levels]

    def _steps(self) -> tuple[np.ndarray, np.ndarray]:
        """Scale and minimum of every sub-block, float32 [n_rows, n_sub_blocks]."""
        scales, minima = (
            (self.units[:, :, i, None] * table[self.places[:, :, i]]).reshape(len(self.rows), -1)
            for i, table in enumerate(self.tables)
        )
        return scales, minima

    def _round_spans(self, positions: Positions) -> Iterator[tuple[int, int]]:
        steps, minima = self._steps()
        kept = np.repeat(self.keep, steps.shape[1] // self.keep.shape[1], axis=1)
        free = (steps != 0) & ~kept
        by_lane = [np.ascontiguousarray(array.T) for array in (steps, -minima, free, self.levels)]
        grid = feedback_scalar.Grid(*by_lane)
        for first, last in _spans(self.rows.shape[1]):
            feedback_scalar.round_span(positions, grid, self.nearest, self.factor.lower, first, last)
            yield first, last
        self.levels[:] = grid.levels.T

    def values(self) -> np.ndarray:
        steps, minima = map(self._spread, self._steps())
        values: np.ndarray = steps * self.levels - minima
        return values

    def _refine(self, tile: Tile, values: np.ndarray, gradients: np.ndarray) -> None:
        search = feedback_scalar.Search(
            self.nearest, self.tables, self.blocks.fixed_unit, self.search.n_rounds, _SWEEPS
        )
        size = self.blocks.block_size
        state = feedback_scalar.State(self.units, self.places, self.levels, values, gradients)
        moves = not self.blocks.fixed_unit or max(table.size for table in self.tables) > 1
        span = size * max(1, _VISITED // size) if moves else _VISITED
        feedback_scalar.refine(tile, self.factor.matrix, search, span, state)

    def _close(self) -> np.ndarray:
        n_blocks = self.keep.size
        units = (self.units * self.ups[:, None, None]).reshape(n_blocks, 2)
        levels = self.levels.astype(np.int8).reshape(n_blocks, -1)
        return self.blocks.pack(ScalarParts(units, self.places.reshape(n_blocks, 2, -1), levels))


class PointRows(_Rows):
    """Rows of scaled points of a codebook."""

    def __init__(
        self,
        blocks: PointBlocks,
        rows: np.ndarray,
        data: np.ndarray,
        keep: np.ndarray,
        factor: Factor,
        search: Search,
    ):
        super().__init__(rows, keep, factor, search)
        self.blocks, self.layout = blocks, blocks.layout
        book = codebook(blocks.codebook, search.n_candidates)
        self.book = feedback_points.Points(self.layout.signs, book.levels, book.candidates, book.indices)
        parts = blocks.open(data)
        n_rows, n_dims, n_units = len(rows), book.points.shape[1], rows.shape[1] // feedback_points.UNIT
        self.d = parts.d.reshape(keep.shape) / self.ups[:, None]
        self.codes = parts.scales.reshape(*keep.shape, -1)
        self.points = np.zeros((n_rows, n_units, 2), np.uint16)
        self.points[:, :, : feedback_points.UNIT // n_dims] = parts.indices.reshape(n_rows, n_units, -1)
        signs, shifts = signs_and_shifts(blocks, parts)
        self.vectors = (book.points[parts.indices] * signs + shifts[:, :, None]).reshape(rows.shape)
        self.signs, self.shifts = signs.reshape(rows.shape), np.zeros((n_rows, n_units), np.float32)
        if self.layout.signs == SIGNED:  # whose groups are units
            self.shifts = shifts.reshape(n_rows, n_units)

    def _chosen(self) -> list[np.ndarray]:
        return [self.d, self.codes, self.vectors, self.signs, self.shifts, self.points]

    def _steps(self) -> np.ndarray:
        """The scale of every weight, float32 [n_rows, n]."""
        return self._spread(self.d[:, :, None] * self.layout.unit * (2 * self.codes.astype(np.float32) + 1))

    def _round_spans(self, positions: Positions) -> Iterator[tuple[int, int]]:
        steps = self._steps() * ~self._spread(self.keep)
        state = self._state(self.values(), np.empty((0, 0), np.float32))
        for span in _spans(self.rows.shape[1]):
            forms, lower = self.factor.position_forms, self.factor.lower
            feedback_points.round_span(positions, self.book, forms, lower, span, steps, state)
            yield span

    def values(self) -> np.ndarray:
        values: np.ndarray = self._steps() * self.vectors
        return values

    def _refine(self, tile: Tile, values: np.ndarray, gradients: np.ndarray) -> None:
        moments = feedback_points.Moments(self.factor.matrix, *self.factor.column_forms)
        search = feedback_points.Search(self.layout, self.book, self.search.n_rounds, _SWEEPS)
        feedback_points.refine(tile, moments, search, self._state(values, gradients))

    def _state(self, values: np.ndarray, gradients: np.ndarray) -> feedback_points.State:
        tried = np.full_like(values, np.inf)
        d, codes, vectors, signs, shifts, points = self._chosen()
        return feedback_points.State(d, codes, vectors, signs, shifts, points, values, gradients, tried)

    def _close(self) -> np.ndarray:
        n_blocks, n_dims = self.keep.size, self.book.candidates.shape[1]
        indices = self.points[:, :, : feedback_points.UNIT // n_dims].reshape(n_blocks, -1)
        if self.layout.signs != SIGNED:
            bits = (self.signs < 0).reshape(n_blocks, -1, n_dims)
            signs = np.packbits(bits, axis=2, bitorder="little")[:, :, 0]
        else:
            signs = (self.shifts < 0).astype(np.uint8).reshape(n_blocks, -1)
        d = (self.d * self.ups[:, None]).reshape(n_blocks)
        return self.blocks.pack(PointParts(d, self.codes.reshape(n_blocks, -1), indices, signs))
