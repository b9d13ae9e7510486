"""An encoded tensor taken apart into what its tuning moves, and put together again.

The scale of a block, where it is a float, and its minimum; the scales and minima of its sub-blocks; and of formats with
levels, the levels. Points of a codebook stay.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bitwright.calibration.passes.layer_tuning import TunableBlocks, TunedBlocks
from bitwright.formats.parts import PointBlocks, PointParts, ScalarBlocks, ScalarParts

_MOST_LEVELS = 64


def are_coarse(blocks: ScalarBlocks | PointBlocks | None) -> bool:
    """Whether tuning gains: levels of 8 bits lie nearer to one another than the noise of its gradients moves them."""
    return blocks is not None and not (isinstance(blocks, ScalarBlocks) and len(blocks.levels) > _MOST_LEVELS)


@dataclass(frozen=True, eq=False)
class TunableTensor:
    """Rows of blocks.

    sources: the matrices that they are, one after the other, by stored names; rows: int64 [n], which row of its matrix
    each row is. blocks, decode: of the format. data: uint8 [n_rows, row_bytes]. factors: by which the weights of each
    matrix are multiplied beside the format, float32 [n_matrices], all that the sources have. nearest_units: of scales
    and minima of blocks, float32, the nearest that can be stored; None where they stay. places: as of TunableBlocks, of
    all rows.
    """

    sources: Sequence[str]
    rows: np.ndarray
    blocks: ScalarBlocks | PointBlocks
    decode: Callable[[np.ndarray], np.ndarray]
    data: np.ndarray
    factors: np.ndarray
    nearest_units: Callable[[np.ndarray], np.ndarray] | None
    places: np.ndarray | None = None

    def tunable(self) -> list[TunableBlocks]:
        """Those of every source of the tensor, in order."""
        units, scales, levels = self._in_rows
        level_table = self.blocks.levels.astype(np.float32) if isinstance(self.blocks, ScalarBlocks) else None
        return [
            TunableBlocks(
                source,
                self.rows.astype(np.int64),
                units[part],
                self.nearest_units is not None,
                scales[part],
                *self._tables,
                levels[part],
                level_table,
                None if self.places is None else self.places[part],
            )
            for source, part in zip(self.sources, self._row_parts, strict=True)
        ]

    def tuned(self, results: Sequence[TunedBlocks]) -> tuple[np.ndarray, np.ndarray]:
        """The tensor as results of `tunable` say: encoded, uint8 [n_rows, row_bytes], and decoded, float32
        [n_rows, n_columns]."""
        data = self.encoded(results)
        return data, self._decoded(data)

    def encoded(self, results: Sequence[TunedBlocks]) -> np.ndarray:
        """The first of these."""
        n_blocks = self._n_blocks
        factors = np.concatenate([result.factors for result in results]).reshape(n_blocks, 2)
        scales = np.concatenate([result.scales for result in results]).reshape(n_blocks, 2, -1)
        parts = self._parts
        if isinstance(parts, ScalarParts) and isinstance(self.blocks, ScalarBlocks):
            levels = np.concatenate([result.levels for result in results if result.levels is not None])
            chosen = self.blocks.levels[levels.reshape(n_blocks, -1)]
            packed = self.blocks.pack(ScalarParts(self._stored(parts.units * factors, parts.units), scales, chosen))
        elif isinstance(parts, PointParts) and isinstance(self.blocks, PointBlocks):
            codes = scales[:, 0].astype(np.uint8)
            d = self._stored(parts.d * factors[:, 0], parts.d)
            packed = self.blocks.pack(parts._replace(d=d, scales=codes))
        else:
            raise TypeError(f"{type(parts).__name__} are no parts of {type(self.blocks).__name__}")
        data: np.ndarray = packed.reshape(self.data.shape)
        return data

    def _stored(self, units: np.ndarray, before: np.ndarray) -> np.ndarray:
        """What becomes of units that were to become these."""
        return before if self.nearest_units is None else self.nearest_units(units)

    @cached_property
    def _parts(self) -> ScalarParts | PointParts:
        return self.blocks.open(self.data)

    @property
    def _n_blocks(self) -> int:
        return len(self._parts[0])

    @property
    def _row_parts(self) -> list[slice]:
        n_rows = len(self.data) // len(self.sources)
        return [slice(i * n_rows, (i + 1) * n_rows) for i in range(len(self.sources))]

    @property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """The values of sub-blocks' scales and minima."""
        if isinstance(self.blocks, ScalarBlocks):
            return self.blocks.scale_table.astype(np.float32), self.blocks.minimum_table.astype(np.float32)
        layout = self.blocks.layout
        codes = np.arange(int(layout.top_code) + 1, dtype=np.float32)
        return layout.unit * (2 * codes + 1), np.zeros(1, np.float32)

    @property
    def _in_rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Units, scales and levels as of TunableBlocks, of all rows; the factor of each matrix is in the units."""
        parts, shape = self._parts, (len(self.data), -1)
        if isinstance(parts, ScalarParts) and isinstance(self.blocks, ScalarBlocks):
            units, scales = parts.units, parts.scales
            levels = np.searchsorted(self.blocks.levels, parts.levels).astype(np.int16)
        else:
            units, scales, levels = self._points()
        of_rows = np.repeat(self.factors, len(self.data) // len(self.factors)).astype(np.float32)
        units = units.reshape(*shape, 2) * of_rows[:, None, None]
        return units, scales.reshape(*shape, 2, scales.shape[-1]), levels.reshape(*shape, self.blocks.block_size)

    def _points(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of parts with points: units [n_blocks, 2], scales [n_blocks, 2, n_sub], and coordinates, float32
        [n_blocks, block_size]."""
        parts, blocks = self._parts, self.blocks
        if not isinstance(parts, PointParts) or not isinstance(blocks, PointBlocks):
            raise TypeError(f"{type(parts).__name__} are no points")
        units = np.zeros((len(parts.d), 2), np.float32)
        units[:, 0] = parts.d
        scales = np.zeros((len(parts.d), 2, parts.scales.shape[1]), np.int16)
        scales[:, 0] = parts.scales
        ones = blocks.pack(parts._replace(d=np.ones_like(parts.d)))
        scaled = self.decode(ones.reshape(self.data.shape)).reshape(*parts.scales.shape, -1)
        points = scaled / self._tables[0][parts.scales][..., None]
        return units, scales, points.reshape(len(parts.d), -1)

    def _decoded(self, data: np.ndarray) -> np.ndarray:
        rows = self.decode(data)
        rows.reshape(len(self.factors), -1)[:] *= self.factors[:, None]
        return rows
