"""What a model loses with some of its weights at zero."""

import hashlib
import json
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from bitwright.calibration.control import PassControl, say
from bitwright.calibration.evaluation.quality import Baseline
from bitwright.formats.files.disk import make_directory, remove_tree
from bitwright.formats.files.journal import append_line, read_lines

if TYPE_CHECKING:
    from bitwright.calibration.stream.streamable import StreamableModel
    from bitwright.calibration.stream.weights import WeightSource
    from bitwright.calibration.text.corpus import Corpus

# A weight of the checkpoint: its tensor, the row over all matrices of the tensor, and the column.
Stored = tuple[str, int, int]


class WithoutWeights:
    """A source of weights in which some are zero."""

    def __init__(self, source: "WeightSource", removed: Iterable[Stored]):
        self._source, self._removed = source, sorted(removed)
        self.tensors = source.tensors

    def read(self, name: str) -> np.ndarray:
        weights = self._source.read(name)
        places = [(row, column) for tensor, row, column in self._removed if tensor == name]
        if places:
            weights = weights.copy()
            rows = weights.reshape(-1, weights.shape[-1])
            for row, column in places:
                rows[row, column] = 0
        return weights


class Removals:
    """Measures what it costs to set weights to zero, each set once: the journal in the work directory remembers.

    removals.jsonl: JSON lines {"removed", "source_loss", "loss", "divergence"}. What was measured of a model of another
    identity, or on another corpus, is not taken.
    """

    def __init__(self, streamable: "StreamableModel", corpus: "Corpus", control: PassControl):
        make_directory(control.work_dir)
        self._weights, self._control = streamable.weights, control.within("removals")
        self._journal = control.work_dir / "removals.jsonl"
        self._measures = f"{streamable.identity} {hashlib.sha256(corpus.tokens.tobytes()).hexdigest()}"
        lines = read_lines(self._journal, partial(say, control.progress))
        self._known: dict[str, dict[str, float]] = {entry.pop("removed"): entry for entry in lines}
        self._source_loss: float | None = None
        self._baseline = Baseline(streamable, corpus, self._control, keep=True)

    def stream_without(
        self, removed: Iterable[Stored], first_layer: int = 0, stage: str = "super weights: try a set"
    ) -> tuple[float, float]:
        """With all of these at zero, in nats per token: the increase of the cross-entropy of the text, and the KL
        divergence from the model as it is. first_layer: the first one that loses a weight. stage: of the progress. Runs
        the model unless the journal has it. Raises Interrupted when the control says so."""
        weights = sorted(removed)
        name = hashlib.sha256(json.dumps([self._measures, weights]).encode()).hexdigest()[:16]
        if name not in self._known:
            candidate = WithoutWeights(self._weights, weights)
            scores = self._baseline.stream_scores(candidate, name, first_layer=first_layer, stage=stage)
            source_loss, loss, divergence = scores[:3].mean(axis=1).tolist()
            entry = {"source_loss": source_loss, "loss": loss, "divergence": divergence}
            append_line(self._journal, {"removed": name, **entry})
            self._known[name] = entry
        entry = self._known[name]
        self._source_loss = entry["source_loss"]
        return entry["loss"] - entry["source_loss"], entry["divergence"]

    @property
    def perplexity(self) -> float | None:
        """The model's own over the text; None before the first removal."""
        return None if self._source_loss is None else float(np.exp(self._source_loss))

    def discard(self) -> None:
        """Delete what is large."""
        remove_tree(self._control.work_dir)
