"""What a model loses with some of its weights at zero."""

import hashlib
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibration.control import Progress, ShouldStop, say
from calibration.quality import Baseline
from formats.files import make_directory, remove_tree
from formats.journal import append_line, read_lines

if TYPE_CHECKING:
    from calibration.corpus import Corpus
    from calibration.weights import WeightSource

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

    removals.jsonl: JSON lines {"removed", "source_loss", "loss", "divergence"}. identity: of the source's weights;
    what was measured of others is not taken.
    """

    def __init__(
        self,
        source: "WeightSource",
        config_dir: Path,
        corpus: "Corpus",
        work_dir: Path,
        *,
        identity: str,
        device: str,
        threads: int | None,
        progress: Progress,
        should_stop: ShouldStop,
    ):
        make_directory(work_dir)
        self.source, self._directory, self._journal = source, work_dir / "removals", work_dir / "removals.jsonl"
        self._progress, self._should_stop = progress, should_stop
        self._measures = f"{identity} {hashlib.sha256(corpus.tokens.tobytes()).hexdigest()}"
        lines = read_lines(self._journal, partial(say, progress))
        self._known: dict[str, dict[str, float]] = {entry.pop("removed"): entry for entry in lines}
        self._source_loss: float | None = None
        self._baseline = Baseline(
            source,
            config_dir,
            corpus,
            work_dir=self._directory,
            identity=identity,
            device=device,
            threads=threads,
            keep=True,
        )

    def of(self, removed: Iterable[Stored], first_layer: int = 0) -> tuple[float, float]:
        """With all of these at zero, in nats per token: the increase of the cross-entropy of the text, and the KL
        divergence from the model as it is. first_layer: the first one that loses a weight.
        Raises Interrupted when should_stop says so."""
        weights = sorted(removed)
        name = hashlib.sha256(json.dumps([self._measures, weights]).encode()).hexdigest()[:16]
        if name not in self._known:
            scores = self._baseline.scores(
                WithoutWeights(self.source, weights),
                name,
                first_layer=first_layer,
                progress=self._progress,
                should_stop=self._should_stop,
            )
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
        remove_tree(self._directory)
