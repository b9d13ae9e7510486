"""A tile of rows whose codes are chosen together, for the kernels of error feedback; see formats/feedback.py."""

from abc import ABC, abstractmethod

import numpy as np

from formats import feedback_points, feedback_scalar
from formats.block_format import Effort
from formats.grids import codebook, points
from formats.moment_factor import Factor
from formats.parts import PointBlocks, PointParts, ScalarBlocks, ScalarParts
from formats.products import add_products

_PASSES: dict[Effort, int] = {"best": 2, "fast": 1}
_ROUNDS: dict[Effort, int] = {"best": 6, "fast": 2}
_CANDIDATES: dict[Effort, int] = {"best": 64, "fast": 32}
_SWEEPS = 2
# Positions that are rounded before what their errors call for is carried to all others.
_SPAN = 128


class _Rows(ABC):
    """rows: float32 [n_rows, n]; they are brought near one by a power of two for each row, so that no square of them
    leaves float32. keep: bool [n_rows, n_blocks], blocks that stay as they are. Subclasses add what the blocks hold."""

    def __init__(self, rows: np.ndarray, keep: np.ndarray, factor: Factor, effort: Effort):
        self.keep, self.factor, self.effort = keep, factor, effort
        exponents = np.frexp(np.abs(rows).max(axis=1))[1].clip(-100, 127)
        self.ups = np.ldexp(np.float32(1), exponents)
        self.rows = rows / self.ups[:, None]

    def choose(self) -> np.ndarray:
        """The rows' data, uint8 [n_rows, row_bytes]: of each row the best that was met, its own included."""
        values = self._values()
        errors = ((self.rows - values).astype(np.float64) * self._gradients(values)).sum(axis=1)
        best = [errors, *(array.copy() for array in self._chosen())]
        for _ in range(_PASSES[self.effort]):
            self._round()
            now = [self._refine(), *self._chosen()]
            worse = ~(now[0] < best[0])
            for array, before in zip(now, best, strict=True):
                array[worse] = before[worse]
            best = [array.copy() for array in now]
        return self._close().reshape(len(self.rows), -1)

    @abstractmethod
    def _chosen(self) -> list[np.ndarray]:
        """The arrays that hold the choice, a row at a time."""

    @abstractmethod
    def _round_span(self, first: int, last: int, positions: dict[str, np.ndarray]) -> None:
        """Round positions first to last of what _in_order returns."""

    @abstractmethod
    def _in_order(self) -> dict[str, np.ndarray]:
        """What rounding needs of every weight, [n_rows, n] in the order of the rounding."""

    @abstractmethod
    def _take(self, positions: dict[str, np.ndarray]) -> None:
        """Make the rounded positions the choice."""

    @abstractmethod
    def _values(self) -> np.ndarray:
        """What the choice decodes to, float32 [n_rows, n]."""

    @abstractmethod
    def _descend(self, values: np.ndarray, gradients: np.ndarray, errors: np.ndarray) -> None:
        """Improve the choice until nothing changes."""

    @abstractmethod
    def _close(self) -> np.ndarray:
        """The blocks of the choice."""

    def _round(self) -> None:
        positions = self._in_order()
        positions["rows"] = self._ordered(self.rows)
        positions["keep"] = self._ordered(np.repeat(self.keep, self.rows.shape[1] // self.keep.shape[1], axis=1))
        positions["targets"], positions["errors"] = positions["rows"].copy(), np.zeros_like(self.rows)
        for last in range(self.rows.shape[1], 0, -_SPAN):
            first = max(0, last - _SPAN)
            self._round_span(first, last, positions)
            add_products(positions["errors"], self.factor.lower, first, last, first, positions["targets"])
        self._take(positions)

    def _refine(self) -> np.ndarray:
        """Descends from the choice; what it leaves of e H e, float64 [n_rows]."""
        values, errors = self._values(), np.empty(len(self.rows))
        self._descend(values, self._gradients(values), errors)
        return errors

    def _gradients(self, values: np.ndarray) -> np.ndarray:
        """H e of each row."""
        matrix, gradients = self.factor.matrix, np.zeros_like(values)
        add_products(self.rows - values, matrix, 0, len(matrix), len(matrix), gradients)
        return gradients

    def _ordered(self, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array[:, self.factor.order])

    def _spread(self, sub_blocks: np.ndarray) -> np.ndarray:
        """Values of sub-blocks, [n_rows, n_blocks, n_sub], for every weight: [n_rows, n]."""
        flat = sub_blocks.reshape(len(self.rows), -1)
        return np.repeat(flat, self.rows.shape[1] // flat.shape[1], axis=1)


class ScalarRows(_Rows):
    """Rows of scaled levels."""

    def __init__(
        self,
        blocks: ScalarBlocks,
        rows: np.ndarray,
        data: np.ndarray,
        keep: np.ndarray,
        factor: Factor,
        effort: Effort,
    ):
        super().__init__(rows, keep, factor, effort)
        self.blocks, self.tables = blocks, (blocks.scale_table, blocks.minimum_table)
        self.nearest = _nearest_levels(blocks.levels)
        units, places, levels = blocks.open(data)
        self.units = units.reshape(*keep.shape, 2) / self.ups[:, None, None]
        self.places = places.reshape(*keep.shape, 2, -1)
        self.levels = levels.reshape(len(rows), -1).astype(np.float32)

    def _chosen(self) -> list[np.ndarray]:
        return [self.units, self.places, self.levels]

    def _steps(self) -> tuple[np.ndarray, np.ndarray]:
        """Scale and minimum of every weight, float32 [n_rows, n]."""
        stored = (self.units[:, :, i, None] * table[self.places[:, :, i]] for i, table in enumerate(self.tables))
        scales, minima = (self._spread(values) for values in stored)
        return scales, minima

    def _in_order(self) -> dict[str, np.ndarray]:
        steps, minima = self._steps()
        return {"steps": self._ordered(steps), "lows": self._ordered(-minima), "levels": self._ordered(self.levels)}

    def _round_span(self, first: int, last: int, positions: dict[str, np.ndarray]) -> None:
        p = positions
        feedback_scalar.round_span(
            p["rows"], p["steps"], p["lows"], p["keep"], self.nearest, self.factor.lower, first, last,
            p["targets"], p["errors"], p["levels"],
        )  # fmt: skip

    def _take(self, positions: dict[str, np.ndarray]) -> None:
        self.levels[:, self.factor.order] = positions["levels"]

    def _values(self) -> np.ndarray:
        steps, minima = self._steps()
        return steps * self.levels - minima

    def _descend(self, values: np.ndarray, gradients: np.ndarray, errors: np.ndarray) -> None:
        state = self.units, self.places, self.levels, values
        feedback_scalar.refine(
            self.rows, self.ups, self.keep, self.factor.matrix, self.nearest, self.tables, self.blocks.fixed_unit,
            _ROUNDS[self.effort], _SWEEPS, gradients, state, errors,
        )  # fmt: skip

    def _close(self) -> np.ndarray:
        n_blocks = self.keep.size
        units = (self.units * self.ups[:, None, None]).reshape(n_blocks, 2)
        levels = self.levels.astype(np.int8).reshape(n_blocks, -1)
        return self.blocks.close(ScalarParts(units, self.places.reshape(n_blocks, 2, -1), levels))


class PointRows(_Rows):
    """Rows of scaled points of a codebook."""

    def __init__(
        self,
        blocks: PointBlocks,
        rows: np.ndarray,
        data: np.ndarray,
        keep: np.ndarray,
        factor: Factor,
        effort: Effort,
    ):
        super().__init__(rows, keep, factor, effort)
        self.blocks, self.layout = blocks, blocks.layout
        book = codebook(blocks.codebook, _CANDIDATES[effort])
        self.levels = tuple(book.levels)
        self.book = book.candidates, book.indices
        d, codes, indices, signs = blocks.open(data)
        n_rows, n_dims, n_units = len(rows), book.points.shape[1], rows.shape[1] // feedback_points.UNIT
        self.d = d.reshape(keep.shape) / self.ups[:, None]
        self.codes = codes.reshape(*keep.shape, -1)
        self.points = np.zeros((n_rows, n_units, 2), np.uint16)
        self.points[:, :, : feedback_points.UNIT // n_dims] = indices.reshape(n_rows, n_units, -1)
        self.shifts, self.signs = np.zeros((n_rows, n_units), np.float32), np.ones(rows.shape, np.float32)
        if self.layout.signs != feedback_points.SIGNED:
            bits = np.unpackbits(signs.reshape(n_rows, -1, 1), axis=2, bitorder="little")[:, :, :n_dims]
            self.signs[bits.reshape(rows.shape) == 1] = -1
        elif self.layout.n_variants == 2:
            self.shifts = 1 - 2 * signs.reshape(n_rows, n_units).astype(np.float32)
        vectors = points(blocks.codebook)[indices].reshape(rows.shape).astype(np.float32)
        self.vectors = vectors * self.signs + np.repeat(self.shifts, feedback_points.UNIT, axis=1)

    def _chosen(self) -> list[np.ndarray]:
        return [self.d, self.codes, self.points, self.signs, self.shifts, self.vectors]

    def _steps(self) -> np.ndarray:
        """The scale of every weight, float32 [n_rows, n]."""
        return self._spread(self.d[:, :, None] * self.layout.unit * (2 * self.codes.astype(np.float32) + 1))

    def _in_order(self) -> dict[str, np.ndarray]:
        units = self.factor.order[:: feedback_points.UNIT] // feedback_points.UNIT
        return {
            "steps": self._ordered(self._steps()),
            "vectors": self._ordered(self.vectors),
            "signs": self._ordered(self.signs),
            "shifts": np.ascontiguousarray(self.shifts[:, units]),
            "points": np.ascontiguousarray(self.points[:, units]),
        }

    def _round_span(self, first: int, last: int, positions: dict[str, np.ndarray]) -> None:
        p = positions
        feedback_points.round_span(
            p["rows"], p["steps"], p["shifts"], p["keep"], self.layout.signs, self.levels, self.book,
            self.factor.position_forms, self.factor.lower, first, last, p["targets"], p["errors"], p["vectors"],
            p["signs"], p["points"],
        )  # fmt: skip

    def _take(self, positions: dict[str, np.ndarray]) -> None:
        units = self.factor.order[:: feedback_points.UNIT] // feedback_points.UNIT
        self.vectors[:, self.factor.order] = positions["vectors"]
        self.signs[:, self.factor.order] = positions["signs"]
        self.points[:, units] = positions["points"]

    def _values(self) -> np.ndarray:
        return self._steps() * self.vectors

    def _descend(self, values: np.ndarray, gradients: np.ndarray, errors: np.ndarray) -> None:
        forms, inverses = self.factor.column_forms
        state = self.d, self.codes, self.vectors, self.signs, self.shifts, self.points, values
        feedback_points.refine(
            self.rows, self.ups, self.keep, self.factor.matrix, forms, inverses, self.layout, self.levels, self.book,
            _ROUNDS[self.effort], _SWEEPS, gradients, state, errors,
        )  # fmt: skip

    def _close(self) -> np.ndarray:
        n_blocks, n_dims = self.keep.size, self.book[0].shape[1]
        indices = self.points[:, :, : feedback_points.UNIT // n_dims].reshape(n_blocks, -1)
        if self.layout.signs != feedback_points.SIGNED:
            bits = (self.signs < 0).reshape(n_blocks, -1, n_dims)
            signs = np.packbits(bits, axis=2, bitorder="little")[:, :, 0]
        else:
            signs = (self.shifts < 0).astype(np.uint8).reshape(n_blocks, -1)
        d = (self.d * self.ups[:, None]).reshape(n_blocks)
        return self.blocks.close(PointParts(d, self.codes.reshape(n_blocks, -1), indices, signs))


def _nearest_levels(levels: np.ndarray) -> np.ndarray:
    """The level nearest to every half unit, float32 [2 * HALF_STEPS]."""
    n = feedback_scalar.HALF_STEPS
    halves = (np.arange(-n, n) + 0.5) / 2
    return levels[np.abs(halves[:, None] - levels).argmin(axis=1)].astype(np.float32)
