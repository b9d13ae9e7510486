"""A layer of a GGUF, encoded when its turn comes."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from bitwright.converter.artifact.feedback import Feedback
from bitwright.converter.artifact.target import Prepared
from bitwright.converter.gguf.encode import Encoder
from bitwright.converter.measure.running import runnable
from bitwright.converter.model.stored_rows import restore
from bitwright.converter.sequence.layers import EncodedLayer, LayerArithmetic, Tunable
from bitwright.converter.sequence.tunable_tensor import TunableTensor, are_coarse
from bitwright.formats.parts import ScalarBlocks
from bitwright.formats.registry import get_format
from bitwright.profiles.planning.plan import Plan, PlannedTensor
from bitwright.profiles.vocabulary import TensorSpec


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
            spec.name: tunable_tensor(spec, self._planned[spec.name], data[spec.name], scales[spec.name])
            for spec in specs
            if _is_tunable(spec, self._planned[spec.name])
        }
        return EncodedLayer(data, rows, remarks, tunable)

    def restored(self, rows: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        decoded: dict[str, np.ndarray] = {}
        for spec in self._specs:
            if spec.name in rows:
                restore(spec, rows[spec.name], decoded)
        return decoded


def tunable_tensor(
    spec: TensorSpec, planned: PlannedTensor, data: np.ndarray, scales: Sequence[float]
) -> TunableTensor:
    """planned: of the tensor; spec: as the model that runs stores it; data: uint8, all rows encoded; scales: of its
    matrices, the second-level ones, empty for none."""
    format_ = get_format(planned.format)
    blocks = format_.blocks
    if blocks is None:
        raise ValueError(f"{planned.format} has no blocks")
    n_rows, selection = spec.n_rows // len(spec.sources), spec.layout.rows
    rows = np.arange(n_rows) if selection is None else selection.indices()
    factors = np.array(scales if len(scales) else [1.0] * spec.n_matrices, np.float32)
    nearest = None if isinstance(blocks, ScalarBlocks) and blocks.fixed_unit else _nearest_float16
    return TunableTensor(spec.sources, rows, blocks, format_.decode, data.reshape(spec.n_rows, -1), factors, nearest)


def _is_tunable(spec: TensorSpec, planned: PlannedTensor) -> bool:
    """Whether the tensor's blocks can be tuned: of a matrix whose rows are stored as they are computed with, in any
    order, and that has no weight which is to be met."""
    layout = spec.layout
    as_computed = layout.columns is None and not layout.transposed and layout.values == "same"
    coarse = are_coarse(get_format(planned.format).blocks)
    return coarse and len(spec.shape) > 1 and as_computed and not planned.pins and not spec.rescaled


def _nearest_float16(values: np.ndarray) -> np.ndarray:
    """The nearest values that a block can store."""
    largest = np.finfo(np.float16).max
    rounded: np.ndarray = np.clip(values, -largest, largest).astype(np.float16).astype(np.float32)
    return rounded


def _joined(chunks: Iterator[np.ndarray]) -> np.ndarray:
    return np.concatenate([chunk.reshape(-1) for chunk in chunks])
