"""A module of a directory whose blocks can be tuned."""

from collections.abc import Sequence

import numpy as np

from bitwright.calibration.passes.layer_tuning import TunableBlocks, TunedBlocks
from bitwright.converter.directory.encode import ModuleEncoder
from bitwright.converter.sequence.tunable_tensor import TunableTensor
from bitwright.formats.schemes.registry import Scheme
from bitwright.formats.schemes.scheme import Tensors
from bitwright.profiles.planning.plan_modules import PlannedModule


class TunableModule:
    """See sequence.layers.Tunable. scheme: one that is tunable; tensors: what is stored of the matrix, by suffix."""

    def __init__(self, encoder: ModuleEncoder, planned: PlannedModule, scheme: Scheme, tensors: Tensors):
        self.encoder, self.planned, self.scheme, self.tensors = encoder, planned, scheme, tensors
        n_rows, n_columns = planned.tensor.shape
        self.shape = n_rows, n_columns
        rows = scheme.tunable(tensors, self.shape)
        self._tensor = TunableTensor(
            self.sources,
            np.arange(n_rows),
            rows.blocks,
            rows.blocks.decode,
            rows.data,
            np.array([1 / rows.factor], np.float32),
            rows.nearest_units,
            rows.places,
        )

    @property
    def sources(self) -> Sequence[str]:
        return (self.planned.tensor.name,)

    def tunable(self) -> list[TunableBlocks]:
        return self._tensor.tunable()

    def tuned(self, results: Sequence[TunedBlocks]) -> tuple[np.ndarray, np.ndarray]:
        """As of Tunable: what is decoded is decoded from what is stored."""
        tensors = self.scheme.tuned(self._tensor.encoded(results), self.tensors)
        data = np.concatenate(list(self.encoder.data(self.planned, tensors)))
        return data, self.scheme.decode(tensors, self.shape)
