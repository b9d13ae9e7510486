"""A layer of a GGUF, encoded when its turn comes."""

from collections.abc import Iterator, Mapping

import numpy as np

from bitwright.converter.artifact.feedback import Feedback
from bitwright.converter.artifact.target import Prepared
from bitwright.converter.gguf.encode import Encoder
from bitwright.converter.gguf.sequence.tunable_tensor import TunableTensor, is_tunable
from bitwright.converter.measure.running import runnable
from bitwright.converter.model.stored_rows import restore
from bitwright.converter.sequence.layers import EncodedLayer, LayerArithmetic, Tunable
from bitwright.profiles.planning.plan import Plan


class TensorLayers:
    """See sequence.layers.LayerEncoder."""

    arithmetic: LayerArithmetic | None = None

    def __init__(self, prepared: Prepared[Plan]):
        self.prepared, run = prepared, prepared.run
        self.checkpoint, self.model_map = runnable(run.checkpoint, run.model_map, run.work_dir)
        self._planned = {planned.tensor.name: planned for planned in prepared.plan.tensors}
        self._specs = [spec for spec in self.model_map.tensors if spec.origin == "stored"]

    def encode(self, stored: frozenset[str], feedback: Feedback) -> EncodedLayer:
        run, plan = self.prepared.run, self.prepared.plan
        specs = [spec for spec in self._specs if not stored.isdisjoint(spec.sources)]
        with Encoder(run.checkpoint, plan, self.prepared.importance, run.job.n_threads, feedback) as encoder:
            data = {s.name: _joined(encoder.encode(self._planned[s.name])) for s in specs}
            rows = {name: encoder.decode(name, [encoded]) for name, encoded in data.items()}
            remarks = {name: encoder.remarks(name) for name in data}
            scales = {name: encoder.scales(self._planned[name]) for name in data}
        tunable: dict[str, Tunable] = {
            spec.name: TunableTensor(spec, self._planned[spec.name], data[spec.name], scales[spec.name])
            for spec in specs
            if is_tunable(spec, self._planned[spec.name])
        }
        return EncodedLayer(data, rows, remarks, tunable)

    def restored(self, rows: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        decoded: dict[str, np.ndarray] = {}
        for spec in self._specs:
            if spec.name in rows:
                restore(spec, rows[spec.name], decoded)
        return decoded


def _joined(chunks: Iterator[np.ndarray]) -> np.ndarray:
    return np.concatenate([chunk.reshape(-1) for chunk in chunks])
