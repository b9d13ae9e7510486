"""A layer of a directory, encoded when its turn comes: one module after the other, under the moments of its inputs."""

from collections.abc import Mapping

import numpy as np

from bitwright.converter.artifact.feedback import Feedback
from bitwright.converter.artifact.target import Prepared
from bitwright.converter.directory.encode import ModuleEncoder, StoredScales
from bitwright.converter.directory.sequence.arithmetic import LayerProducts, rounds_values
from bitwright.converter.directory.sequence.stored import kept_values
from bitwright.converter.directory.sequence.tunable_module import TunableModule
from bitwright.converter.model.module_map import gguf_names
from bitwright.converter.sequence.layers import EncodedLayer
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.profiles.planning.plan_modules import ModulePlan, PlannedModule
from bitwright.profiles.vocabulary import ModelMap


class ModuleLayers:
    """See sequence.layers.LayerEncoder. prepared: the job as it is encoded, whose checkpoint may be smoothed: it is
    this one that runs. scales: of its inputs and caches."""

    def __init__(self, prepared: Prepared[ModulePlan], scales: StoredScales):
        self.prepared, self.plan, self.scales = prepared, prepared.plan, scales
        self.names = gguf_names(self.model_map)
        self._arithmetic = LayerProducts(self.plan, scales.caches) if rounds_values(self.plan) else None

    @property
    def checkpoint(self) -> Checkpoint:
        return self.prepared.run.checkpoint

    @property
    def model_map(self) -> ModelMap:
        return self.prepared.run.model_map

    @property
    def arithmetic(self) -> LayerProducts | None:
        return self._arithmetic

    def encode(self, stored: frozenset[str], feedback: Feedback) -> EncodedLayer:
        layer = EncodedLayer({}, {}, {}, {})
        with self.encoder(feedback) as encoder:
            for row in self.plan.tensors:
                if row.tensor.name in stored:
                    _add(layer, encoder, row)
        return layer

    def encoder(self, feedback: Feedback | None = None) -> ModuleEncoder:
        prepared = self.prepared
        threads = prepared.run.job.n_threads
        return ModuleEncoder(
            self.checkpoint, self.plan, prepared.importance, self.names, self.scales, threads, feedback
        )

    def restored(self, rows: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return rows


def _add(layer: EncodedLayer, encoder: ModuleEncoder, row: PlannedModule) -> None:
    """Encode a module of the layer."""
    name, scheme = row.tensor.name, row.scheme
    tensors = None if scheme is None else encoder.tensors(row, scheme)
    layer.data[name] = np.concatenate(list(encoder.data(row, tensors)))
    layer.remarks[name] = encoder.remarks(name)
    if scheme is None or tensors is None:
        layer.rows[name] = kept_values(row, layer.data[name])
        return
    n_rows, n_columns = row.tensor.shape
    layer.rows[name] = scheme.decode(tensors, (n_rows, n_columns))
    if scheme.is_tunable and name not in encoder.copied:
        layer.tunable[name] = TunableModule(encoder, row, scheme, tensors)
