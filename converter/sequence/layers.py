"""The layers of an artifact, encoded when their turn comes, whatever kind of artifact it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from bitwright.calibration.passes.layer_tuning import TunableBlocks, TunedBlocks
from bitwright.calibration.stream.arithmetic import Arithmetic
from bitwright.calibration.stream.weights import WeightSource
from bitwright.converter.artifact.feedback import Feedback
from bitwright.converter.artifact.target import Prepared
from bitwright.converter.sequence.layer_files import LayerFiles
from bitwright.converter.sequence.outcome import REMARK, OutcomeOfTuning
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.profiles.planning.plan import Plan
from bitwright.profiles.vocabulary import ModelMap


class Tunable(Protocol):
    """A tensor of an artifact that can be tuned. sources: the checkpoint's matrices that it is made of."""

    @property
    def sources(self) -> Sequence[str]: ...

    def tunable(self) -> Sequence[TunableBlocks]:
        """The blocks of every source, in order."""

    def tuned(self, results: Sequence[TunedBlocks]) -> tuple[np.ndarray, np.ndarray]:
        """The tensor as the results of `tunable` say: encoded, uint8, and decoded, float32 [n_rows, n_columns]."""


@dataclass(eq=False)
class EncodedLayer:
    """A layer that is being encoded, by the artifact's tensors. data: uint8; rows: the same decoded, float32; remarks:
    for the journal; tunable: those that can be tuned; tuned: data of what they would become."""

    data: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]
    remarks: dict[str, dict[str, object]]
    tunable: dict[str, Tunable]
    tuned: dict[str, np.ndarray] = field(default_factory=dict)


class LayerArithmetic(Arithmetic, Protocol):
    """How the artifact's layers are computed, where that is not as torch does it."""

    def take_over(self, data: Mapping[str, np.ndarray]) -> None:
        """The tensors that these are the data of, those of one layer, are from now on computed with as the artifact
        is; all others as torch does it."""


class LayerEncoder(Protocol):
    """Encodes the layers of one kind of artifact. checkpoint, model_map: of the model that runs, with whatever is
    folded into what is encoded. arithmetic: None for torch's."""

    @property
    def checkpoint(self) -> Checkpoint: ...
    @property
    def model_map(self) -> ModelMap: ...
    @property
    def arithmetic(self) -> LayerArithmetic | None: ...

    def encode(self, stored: frozenset[str], feedback: Feedback) -> EncodedLayer:
        """The layer that is made of these tensors of the checkpoint; feedback: of its inputs."""

    def restored(self, rows: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The checkpoint's tensors that are made of these rows of the artifact's, by name."""


class Layers:
    """Lets a plan's layers be encoded, and keeps what becomes of them; see EncodedLayers.

    moments: the directory in which those of a layer's inputs are.
    """

    def __init__(self, prepared: Prepared[Plan], encoder: LayerEncoder, files: LayerFiles, moments: Path):
        self.prepared, self.encoder, self.files, self.moments = prepared, encoder, files, moments
        self._layer: EncodedLayer | None = None

    @property
    def layer(self) -> EncodedLayer:
        if self._layer is None:
            raise ValueError("no layer has been encoded")
        return self._layer

    def encode(self, stored: frozenset[str]) -> WeightSource:
        level, effort = self.prepared.plan.error_feedback, self.prepared.run.job.effort
        self._layer = self.encoder.encode(stored, Feedback(self.moments, level or "quick", effort))
        return self._weights(self._layer.rows)

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
            for name in layer.tuned:
                layer.remarks[name] = {**layer.remarks[name], REMARK: outcome.to_dict()}
        self.files.append(data, layer.remarks)
        if self.encoder.arithmetic is not None:
            self.encoder.arithmetic.take_over(data)
        self._layer = None

    def _weights(self, rows: Mapping[str, np.ndarray]) -> "_Decoded":
        return _Decoded(self.encoder.checkpoint, self.encoder.restored(rows))


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
