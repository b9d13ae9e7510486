"""Encoding with sequential inputs: every layer under the second moments of what the artifact's layers before it make.

The layers are encoded on a pass of their own, before the artifact is written, as each needs the ones before it; what
becomes of a layer's tensors is kept in the work directory, a file a layer, until they are in the artifact.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from bitwright.calibration.passes.sequential_pass import SequentialStream
from bitwright.converter.artifact.feedback import Feedback
from bitwright.converter.artifact.run import Run
from bitwright.converter.artifact.target import Prepared
from bitwright.converter.gguf.encode import Encoder
from bitwright.converter.measure.calibrate import observed_names
from bitwright.converter.measure.running import calibration_text, load_tokenizer, runnable, streamable
from bitwright.converter.model.stored_rows import restore
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import make_directory, remove_tree
from bitwright.formats.files.seals import is_sound, write_sealed
from bitwright.profiles.planning.plan import Plan, PlannedTensor
from bitwright.profiles.vocabulary import ModelMap, TensorSpec

# In the work directory: the encoded layers, the checkpoints of the pass, and the moments of one layer.
_LAYERS, _PASS, _MOMENTS = "sequential", "sequential-pass", "sequential-moments"


class SequencedEncoder:
    """An encoder that gives the tensors of layers as they were encoded in sequence; others as the encoder does."""

    def __init__(self, encoder: Encoder, directory: Path):
        self.encoder, self.directory = encoder, directory
        self._layers = {name: path for path in _files(directory) for name in _names(path)}

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
        if name not in self._layers:
            return self.encoder.remarks(name)
        with np.load(self._layers[name], allow_pickle=False) as stored:
            remarks: dict[str, dict[str, object]] = json.loads(str(stored[_REMARKS]))
        return remarks.get(name, {})

    def finish(self) -> None:
        """Remove what is in the artifact now."""
        for name in (_LAYERS, _PASS, _MOMENTS):
            remove_tree(self.directory.with_name(name))


# What the journal will keep of a layer's tensors, in its file: the name of no tensor.
_REMARKS = "remarks of the encoder"


def encode_in_sequence(prepared: Prepared[Plan]) -> Path:
    """Encode all layers, each under the moments of its inputs in the artifact; returns the directory of what they have
    become. An interrupted pass continues after its last whole layer; a layer's encoded tensors are in memory at once.

    Raises Interrupted when the run is to stop, which is asked after every layer.
    """
    run, directory = prepared.run, prepared.run.work_dir / _LAYERS
    level = prepared.plan.error_feedback
    if level is None:
        raise ValueError("a plan without error feedback has no use for inputs")
    running, running_map = runnable(run.checkpoint, run.model_map, run.work_dir)
    corpus = calibration_text(run.job, load_tokenizer(running.location), run.model_map, run.job.samples)
    moments = run.work_dir / _MOMENTS
    encoded = _PartlyEncoded(running, running_map)

    def encode_layer(stored: frozenset[str]) -> None:
        feedback, specs = Feedback(moments, level, run.job.effort), encoded.made_of(stored)
        with Encoder(run.checkpoint, prepared.plan, prepared.importance, run.job.n_threads, feedback) as encoder:
            data = {spec.name: _whole(encoder, spec.name) for spec in specs}
            encoded.take({spec.name: encoder.decode(spec.name, [data[spec.name]]) for spec in specs})
            remarks = {name: encoder.remarks(name) for name in data}
        _save(directory / f"{len(_files(directory)):04d}.npz", data, remarks)

    stream = SequentialStream(
        streamable(run, running, run.job.calibration_dtype),
        encoded,
        corpus.tokens,
        run.control(_PASS),
        names=observed_names(running_map),
        moments_dir=moments,
        encode_layer=encode_layer,
        settings={"plan": prepared.plan.digest(), "feedback": level, "effort": run.job.effort},
    )
    _keep_whole(directory, stream.layers_done, run)
    stream.run("encode layers")
    stream.discard_hidden_states()
    return directory


def _keep_whole(directory: Path, n_layers: int, run: Run) -> None:
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
        path.unlink()


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("[0-9]*.npz"))


def _names(path: Path) -> Iterable[str]:
    with np.load(path, allow_pickle=False) as stored:
        return [name for name in stored.files if name != _REMARKS]


def _save(path: Path, data: dict[str, np.ndarray], remarks: dict[str, dict[str, object]]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{_REMARKS: np.array(json.dumps(remarks))}, **data)
    write_sealed(path, "encoded layer", buffer.getvalue())


def _whole(encoder: Encoder, name: str) -> np.ndarray:
    planned = next(planned for planned in encoder.rows if planned.tensor.name == name)
    return np.concatenate([chunk.reshape(-1) for chunk in encoder.encode(planned)])


class _PartlyEncoded:
    """The weights of one layer as they were encoded, and of all others as the checkpoint has them, under its names."""

    def __init__(self, checkpoint: Checkpoint, model_map: ModelMap):
        self.checkpoint, self.tensors = checkpoint, checkpoint.tensors
        self._specs = [spec for spec in model_map.tensors if spec.origin == "stored"]
        self._encoded: dict[str, np.ndarray] = {}

    def made_of(self, stored: frozenset[str]) -> list[TensorSpec]:
        """The tensors of the artifact that are made of these."""
        return [spec for spec in self._specs if not stored.isdisjoint(spec.sources)]

    def take(self, rows: Mapping[str, np.ndarray]) -> None:
        """rows: of every tensor of a layer by name, as they are decoded: float32 [n_rows, n_columns]."""
        self._encoded = {}
        for spec in self._specs:
            if spec.name in rows:
                restore(spec, rows[spec.name], self._encoded)

    def read(self, name: str) -> np.ndarray:
        return self._encoded[name] if name in self._encoded else self.checkpoint.read(name)
