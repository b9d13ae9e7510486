"""What the tests of smoothing share: a tiny checkpoint observed and smoothed, and the logits of any weights."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from calibration.activations import ActivationStatistics, InputRows, compute_activations
from calibration.control import never, silent
from calibration.corpus import Corpus
from calibration.smoothing import Alpha, SmoothQuantConfig
from calibration.stream import LayerStream
from converter.checkpoint import Checkpoint
from converter.model_map import describe
from converter.smooth import activation_names
from converter.smooth_search import SmoothedGroup, Smoother
from converter.smoothed import SmoothedCheckpoint
from converter.smoothing_groups import smoothing_groups
from converter.source import open_checkpoint
from profiles.vocabulary import ModelMap


@dataclass
class Observed:
    """A checkpoint with the statistics of its activations."""

    checkpoint: Checkpoint
    model_map: ModelMap
    corpus: Corpus
    activations: ActivationStatistics
    rows: InputRows

    def smooth(self, alpha: Alpha) -> tuple[SmoothedCheckpoint, Smoother, list[SmoothedGroup]]:
        smoother = Smoother(self.checkpoint, self.activations, self.rows)
        groups = smoother.smooth(
            smoothing_groups(self.checkpoint, self.model_map), SmoothQuantConfig(alpha), silent, never
        )
        return SmoothedCheckpoint.of(self.checkpoint, smoother.foldings), smoother, groups


def observe(directory: Path, work_dir: Path, corpus: Corpus) -> Observed:
    checkpoint = open_checkpoint(str(directory))
    model_map = describe(checkpoint)
    rows = InputRows(work_dir / "rows")
    activations = compute_activations(
        checkpoint,
        directory,
        activation_names(model_map),
        corpus,
        work_dir=work_dir / "observed",
        rows=rows,
        device="cpu",
    )
    return Observed(checkpoint, model_map, corpus, activations, rows)


def logits(source, directory: Path, tokens: np.ndarray, work_dir: Path) -> np.ndarray:
    """float32 [n_samples, sequence_length, vocabulary]."""
    stream = LayerStream(source, directory, tokens, work_dir, device="cpu")
    stream.run()
    with torch.inference_mode(), stream.head() as head:
        return np.stack([head(stream.hidden_states(i, i + 1)[0]).numpy() for i in range(len(tokens))])
