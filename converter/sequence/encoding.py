"""Encoding in sequence: every layer under the second moments of what the artifact's layers before it make, and tuned.

The layers are encoded on a pass of their own, before the artifact is written, as each needs the ones before it; what
becomes of a layer's tensors is kept in the work directory, a file a layer, until they are in the artifact.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np

from bitwright.calibration.passes.sequential_pass import SequentialStream, Tuning
from bitwright.converter.artifact.run import Run
from bitwright.converter.artifact.target import Prepared
from bitwright.converter.artifact.writer import PlanEncoder
from bitwright.converter.measure.calibrate import observed_names
from bitwright.converter.measure.evidence import measured_factors
from bitwright.converter.measure.running import calibration_text, load_tokenizer, streamable
from bitwright.converter.sequence.layer_files import LayerFiles, data_of
from bitwright.converter.sequence.layers import LayerEncoder, Layers
from bitwright.converter.source.smoothed import foldings_of, identity_of_foldings
from bitwright.formats.files.disk import remove_tree
from bitwright.profiles.planning.plan import PlannedTensor
from bitwright.profiles.vocabulary import Role

# In the work directory: the encoded layers, the checkpoints of the pass, and the moments of one layer.
_LAYERS, _PASS, _MOMENTS = "sequential", "sequential-pass", "sequential-moments"
# What is added to the hidden states last in a layer: an error of its outputs is one of the layer's output.
_ADDED_LAST = (Role.MLP_DOWN, Role.EXPERT_DOWN)

R = TypeVar("R", bound=PlannedTensor)
"""The rows of one kind of plan."""


class ReadyEncoder(PlanEncoder[R], Protocol):
    """One that is ready as long as a `with` block."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


class SequencedEncoder(Generic[R]):
    """An encoder that gives the tensors of layers as they were encoded in sequence; others as the encoder does."""

    def __init__(self, encoder: ReadyEncoder[R], files: LayerFiles):
        self.encoder, self.files = encoder, files
        self._places, self._remarks = files.places(), files.remarks()

    @property
    def rows(self) -> tuple[R, ...]:
        return self.encoder.rows

    def encode(self, planned: R) -> Iterator[np.ndarray]:
        """As the encoder's."""
        name = planned.tensor.name
        if name in self._places:
            yield data_of(self._places[name], name)
        else:
            yield from self.encoder.encode(planned)

    def remarks(self, name: str) -> dict[str, object]:
        """As the encoder's."""
        return self._remarks[name] if name in self._remarks else self.encoder.remarks(name)

    def was_copied(self, name: str) -> bool:
        """As PlanEncoder.was_copied."""
        return name in self._places

    def __enter__(self) -> Self:
        self.encoder.__enter__()
        return self

    def __exit__(self, error: object, *more: object) -> None:
        """What is in the artifact now is removed."""
        self.encoder.__exit__(error, *more)
        if error is None:
            for name in (_LAYERS, _PASS, _MOMENTS):
                remove_tree(self.files.directory.with_name(name))


def encode_in_sequence(prepared: Prepared[Any], encoder: LayerEncoder) -> LayerFiles:
    """Encode all layers, each under the moments of its inputs in the artifact, and tune them where the job asks for it;
    returns what they have become. An interrupted pass continues after its last whole layer; a layer's encoded tensors
    are in memory at once.

    Raises Interrupted when the run is to stop, which is asked after every layer.
    """
    run, plan, running = prepared.run, prepared.plan, encoder.checkpoint
    if plan.error_feedback is None:
        raise ValueError("a plan without error feedback has no use for inputs")
    files, moments = LayerFiles(run.work_dir / _LAYERS), run.work_dir / _MOMENTS
    corpus = calibration_text(run.job, load_tokenizer(running.location), run.model_map, run.job.samples)
    model = streamable(run, running, run.job.calibration_dtype, identity_of_foldings(foldings_of(running)))
    stream = SequentialStream(
        replace(model, arithmetic=encoder.arithmetic),
        corpus.tokens,
        run.control(_PASS),
        names=observed_names(encoder.model_map),
        moments_dir=moments,
        encoded=Layers(prepared, encoder, files, moments),
        settings={"plan": plan.digest(), "feedback": plan.error_feedback, "effort": run.job.effort},
        tuning=_tuning(run) if run.job.tune else None,
    )
    files.keep(stream.layers_done)
    stream.run("encode layers")
    stream.discard_hidden_states()
    return files


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
