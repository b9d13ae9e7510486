"""An encoded tensor taken apart into what its tuning moves, and put together again.

Blocks of every format but those whose scales are powers of two store a float16 `d`, and some a `dmin`; a weight is
linear in both, whatever its codes and sub-scales are.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from bitwright.calibration.passes.layer_tuning import TunableBlocks, TunedBlocks
from bitwright.formats.parts import ScalarBlocks, ScalarParts
from bitwright.formats.registry import get_format
from bitwright.profiles.planning.plan import PlannedTensor
from bitwright.profiles.vocabulary import TensorSpec


def is_tunable(spec: TensorSpec, planned: PlannedTensor) -> bool:
    """Whether the tensor's blocks have scales that can be moved: of a matrix whose rows are stored as they are computed
    with, in any order, and that has no weight which is to be met."""
    blocks, layout = get_format(planned.format).blocks, spec.layout
    movable = blocks is not None and not (isinstance(blocks, ScalarBlocks) and blocks.fixed_unit)
    as_computed = layout.columns is None and not layout.transposed and layout.values == "same"
    return movable and len(spec.shape) > 1 and as_computed and not planned.pins and not spec.rescaled


class TunableTensor:
    """planned: of the tensor; spec: as the model that runs stores it; data: uint8, all rows encoded; scales: of its
    matrices, the second-level ones, empty for none."""

    def __init__(self, spec: TensorSpec, planned: PlannedTensor, data: np.ndarray, scales: Sequence[float]):
        self.spec, self.format, self.scales = spec, get_format(planned.format), scales
        self.data = data.reshape(spec.n_rows, -1)
        if self.format.blocks is None:
            raise ValueError(f"{planned.format} has no blocks")
        self._parts = self.format.blocks.open(self.data)

    @property
    def sources(self) -> Sequence[str]:
        return self.spec.sources

    def tunable(self) -> list[TunableBlocks]:
        """Those of every source of the tensor, in order."""
        steps, minima = self._steps_and_minima
        n_rows = self.spec.n_rows // len(self.spec.sources)
        selection = self.spec.layout.rows
        rows = np.arange(n_rows) if selection is None else selection.indices()
        parts = [slice(i * n_rows, (i + 1) * n_rows) for i in range(len(self.spec.sources))]
        return [
            TunableBlocks(source, rows.astype(np.int64), steps[part], None if minima is None else minima[part])
            for source, part in zip(self.spec.sources, parts, strict=True)
        ]

    def tuned(self, results: Sequence[TunedBlocks]) -> tuple[np.ndarray, np.ndarray]:
        """The tensor with its scales multiplied, as results of `tunable` say: encoded, uint8, and decoded, float32
        [n_rows, n_columns]."""
        steps = np.concatenate([result.steps for result in results]).reshape(-1)
        minima = None
        if all(result.minima is not None for result in results):
            minima = np.concatenate([result.minima for result in results if result.minima is not None]).reshape(-1)
        data = self._packed(steps, minima)
        return data.reshape(-1), self._decoded(data)

    @cached_property
    def _steps_and_minima(self) -> tuple[np.ndarray, np.ndarray | None]:
        """float32 [n_rows, n_blocks, block_size] each."""
        ones, nothing = np.ones(len(self._units), np.float32), np.zeros(len(self._units), np.float32)
        shape = (self.spec.n_rows, -1, self.format.block_size)
        if not self._has_minima:
            return self._decoded(self.data).reshape(shape), None
        steps = self._decoded(self._packed(ones, nothing)).reshape(shape)
        return steps, -self._decoded(self._packed(nothing, ones)).reshape(shape)

    @property
    def _units(self) -> np.ndarray:
        return self._parts.units if isinstance(self._parts, ScalarParts) else self._parts.d

    @property
    def _has_minima(self) -> bool:
        return isinstance(self._parts, ScalarParts) and bool(self._parts.units[:, 1].any())

    def _packed(self, steps: np.ndarray, minima: np.ndarray | None) -> np.ndarray:
        """The rows encoded with d and dmin of every block multiplied by these, float32 [n_blocks of all rows]."""
        parts, blocks = self._parts, self.format.blocks
        if isinstance(parts, ScalarParts):
            units = parts.units.copy()
            units[:, 0] *= steps
            if minima is not None:
                units[:, 1] *= minima
            parts = parts._replace(units=_float16(units))
        else:
            parts = parts._replace(d=_float16(parts.d * steps))
        packed: np.ndarray = blocks.pack(parts)  # type: ignore[union-attr, arg-type]
        data: np.ndarray = packed.reshape(self.data.shape)
        return data

    def _decoded(self, data: np.ndarray) -> np.ndarray:
        rows = self.format.decode(data)
        if self.scales:
            rows.reshape(self.spec.n_matrices, -1)[:] *= np.array(self.scales, np.float32)[:, None]
        return rows


def _float16(values: np.ndarray) -> np.ndarray:
    """The nearest values that a block can store."""
    largest = np.finfo(np.float16).max
    rounded: np.ndarray = np.clip(values, -largest, largest).astype(np.float16).astype(np.float32)
    return rounded
