"""Encoding in sequence: every layer under the second moments of what the artifact's layers before it make, and tuned.

The layers are encoded on a pass of their own, before the artifact is written, as each needs the ones before it; what
becomes of a layer's tensors is kept in the work directory, a file a layer, until they are in the artifact.
"""

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from bitwright.calibration.passes.layer_tuning import TunableBlocks, TunedBlocks
from bitwright.calibration.passes.sequential_pass import SequentialStream, Tuning
from bitwright.calibration.stream.weights import WeightSource
from bitwright.converter.artifact.feedback import Feedback
from bitwright.converter.artifact.run import Run
from bitwright.converter.artifact.target import Prepared
from bitwright.converter.gguf.encode import Encoder
from bitwright.converter.gguf.sequence.outcome import OutcomeOfTuning
from bitwright.converter.gguf.sequence.tunable_tensor import TunableTensor, is_tunable
from bitwright.converter.measure.calibrate import observed_names
from bitwright.converter.measure.evidence import measured_factors
from bitwright.converter.measure.running import calibration_text, load_tokenizer, runnable, streamable
from bitwright.converter.model.stored_rows import restore
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import make_directory, remove, remove_tree
from bitwright.formats.files.seals import is_sound, write_sealed
from bitwright.profiles.planning.plan import Plan, PlannedTensor
from bitwright.profiles.vocabulary import ModelMap, Role

# In the work directory: the encoded layers, the checkpoints of the pass, and the moments of one layer.
_LAYERS, _PASS, _MOMENTS = "sequential", "sequential-pass", "sequential-moments"
# What is added to the hidden states last in a layer: an error of its outputs is one of the layer's output.
_ADDED_LAST = (Role.MLP_DOWN, Role.EXPERT_DOWN)
# What the journal will keep of a layer's tensors, in the layer's file: the name of no tensor.
_REMARKS = "remarks of the encoder"


class SequencedEncoder:
    """An encoder that gives the tensors of layers as they were encoded in sequence; others as the encoder does."""

    def __init__(self, encoder: Encoder, directory: Path):
        self.encoder, self.directory = encoder, directory
        self._layers: dict[str, Path] = {}
        self._remarks: dict[str, dict[str, object]] = {}
        for path in _files(directory):
            with np.load(path, allow_pickle=False) as stored:
                self._layers |= {name: path for name in stored.files if name != _REMARKS}
                self._remarks |= json.loads(str(stored[_REMARKS]))

    @property
    def rows(self) -> tuple[PlannedTensor, ...]:
        return self.encoder.rows

    def encode(self, planned: PlannedTensor) -> Iterator[np.ndarray]:
        """As Encoder.encode."""
        path = self._layers.get(planned.tensor.name)
        if path is None:
            yield from self.encoder.encode(planned)
            return
        with np.load(path, allow_pickle=False) as stored:
            yield stored[planned.tensor.name]

    def remarks(self, name: str) -> dict[str, object]:
        """As Encoder.remarks."""
        return self._remarks[name] if name in self._remarks else self.encoder.remarks(name)

    def was_copied(self, name: str) -> bool:
        """As PlanEncoder.was_copied."""
        return name in self._layers

    def __enter__(self) -> Self:
        self.encoder.__enter__()
        return self

    def __exit__(self, error: object, *more: object) -> None:
        """What is in the artifact now is removed."""
        self.encoder.__exit__(error, *more)
        if error is None:
            for name in (_LAYERS, _PASS, _MOMENTS):
                remove_tree(self.directory.with_name(name))


def encode_in_sequence(prepared: Prepared[Plan]) -> Path:
    """Encode all layers, each under the moments of its inputs in the artifact, and tune them where the job asks for it;
    returns the directory of what they have become. An interrupted pass continues after its last whole layer; a layer's
    encoded tensors are in memory at once.

    Raises Interrupted when the run is to stop, which is asked after every layer.
    """
    run, plan = prepared.run, prepared.plan
    directory = run.work_dir / _LAYERS
    if plan.error_feedback is None:
        raise ValueError("a plan without error feedback has no use for inputs")
    running, running_map = runnable(run.checkpoint, run.model_map, run.work_dir)
    corpus = calibration_text(run.job, load_tokenizer(running.location), run.model_map, run.job.samples)
    stream = SequentialStream(
        streamable(run, running, run.job.calibration_dtype),
        corpus.tokens,
        run.control(_PASS),
        names=observed_names(running_map),
        moments_dir=run.work_dir / _MOMENTS,
        encoded=_Layers(prepared, running, running_map),
        settings={
            "plan": plan.digest(),
            "folding": plan.folding,
            "feedback": plan.error_feedback,
            "effort": run.job.effort,
        },
        tuning=_tuning(run) if run.job.tune else None,
    )
    _keep_whole(directory, stream.layers_done)
    stream.run("encode layers")
    stream.discard_hidden_states()
    return directory


def _tuning(run: Run) -> Tuning:
    """As the job asks for it; what a layer's output costs is taken from the Fisher factors where they are known."""
    factors = measured_factors(run.job, run.work_dir)
    by_tensor = {} if factors is None else factors.rows
    costs: dict[int, np.ndarray] = {}
    for tensor in run.model_map.tensors:
        if tensor.role not in _ADDED_LAST or tensor.layer is None or tensor.name not in by_tensor:
            continue
        rows = by_tensor[tensor.name].mean(0)
        if rows.any():
            costs[tensor.layer] = (rows / rows.mean()).astype(np.float32)
    return Tuning(run.job.tune, run.job.seed, costs)


def _keep_whole(directory: Path, n_layers: int) -> None:
    """Leave the layers that the pass counts on; without one of them it has to start over."""
    make_directory(directory)
    files = _files(directory)
    if len(files) < n_layers or not all(map(is_sound, files[:n_layers])):
        raise ConvertError(
            "a layer that was encoded before is missing, or has changed since",
            str(directory),
            "start over with --fresh",
        )
    for path in files[n_layers:]:  # written before a kill, and not counted
        remove(path)


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("[0-9]*.npz"))


@dataclass(eq=False)
class _Layer:
    """A layer that is being encoded. data: of its tensors, uint8; rows: the same decoded, float32 [n_rows, n_columns];
    remarks: for the journal. tunable: the tensors that can be tuned; tuned: data of what they would become."""

    data: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]
    remarks: dict[str, dict[str, object]]
    tunable: dict[str, TunableTensor]
    tuned: dict[str, np.ndarray]


class _Layers:
    """Encodes a plan's layers; see EncodedLayers. checkpoint, model_map: of the model that runs."""

    def __init__(self, prepared: Prepared[Plan], checkpoint: Checkpoint, model_map: ModelMap):
        self.prepared, self.run, self.checkpoint = prepared, prepared.run, checkpoint
        self.directory = prepared.run.work_dir / _LAYERS
        self._planned = {planned.tensor.name: planned for planned in prepared.plan.tensors}
        self._specs = [spec for spec in model_map.tensors if spec.origin == "stored"]
        self._layer: _Layer | None = None

    @property
    def layer(self) -> _Layer:
        if self._layer is None:
            raise ValueError("no layer has been encoded")
        return self._layer

    def encode(self, stored: frozenset[str]) -> WeightSource:
        run, plan = self.run, self.prepared.plan
        feedback = Feedback(run.work_dir / _MOMENTS, plan.error_feedback or "quick", run.job.effort)
        specs = [spec for spec in self._specs if not stored.isdisjoint(spec.sources)]
        with Encoder(run.checkpoint, plan, self.prepared.importance, run.job.n_threads, feedback) as encoder:
            data = {s.name: _joined(encoder.encode(self._planned[s.name])) for s in specs}
            rows = {name: encoder.decode(name, [encoded]) for name, encoded in data.items()}
            remarks = {name: encoder.remarks(name) for name in data}
            scales = {name: encoder.scales(self._planned[name]) for name in data}
        tunable = {
            spec.name: TunableTensor.of_gguf(spec, self._planned[spec.name], data[spec.name], scales[spec.name])
            for spec in specs
            if is_tunable(spec, self._planned[spec.name])
        }
        self._layer = _Layer(data, rows, remarks, tunable, {})
        return self._weights(rows)

    def tunable(self) -> list[TunableBlocks]:
        return [blocks for tensor in self.layer.tunable.values() for blocks in tensor.tunable()]

    def tuned(self, result: Mapping[int, TunedBlocks]) -> WeightSource:
        layer, rows, first = self.layer, dict(self.layer.rows), 0
        for name, tensor in layer.tunable.items():
            indices = range(first, first := first + len(tensor.sources))
            if all(i in result for i in indices):
                data, rows[name] = tensor.tuned([result[i] for i in indices])
                layer.tuned[name] = data.reshape(-1)
        return self._weights(rows)

    def finish(self, errors: tuple[float, float] | None) -> None:
        layer = self.layer
        outcome = None if errors is None else OutcomeOfTuning(*errors, kept=errors[1] < errors[0])
        data = layer.data | (layer.tuned if outcome is not None and outcome.kept else {})
        if outcome is not None:
            layer.remarks = {name: {**of, "tuning": outcome.to_dict()} for name, of in layer.remarks.items()}
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **{_REMARKS: np.array(json.dumps(layer.remarks))}, **data)
        write_sealed(self.directory / f"{len(_files(self.directory)):04d}.npz", "encoded layer", buffer.getvalue())
        self._layer = None

    def _weights(self, rows: Mapping[str, np.ndarray]) -> "_Decoded":
        """The checkpoint's tensors that are made of these rows of the artifact's."""
        decoded: dict[str, np.ndarray] = {}
        for spec in self._specs:
            if spec.name in rows:
                restore(spec, rows[spec.name], decoded)
        return _Decoded(self.checkpoint, decoded)


@dataclass(frozen=True, eq=False)
class _Decoded:
    """Some weights decoded, and all others as the checkpoint has them."""

    checkpoint: Checkpoint
    decoded: Mapping[str, np.ndarray]

    @property
    def tensors(self) -> Mapping[str, object]:
        return self.checkpoint.tensors

    def read(self, name: str) -> np.ndarray:
        return self.decoded[name] if name in self.decoded else self.checkpoint.read(name)


def _joined(chunks: Iterator[np.ndarray]) -> np.ndarray:
    return np.concatenate([chunk.reshape(-1) for chunk in chunks])
