"""What the tests of smoothing share: a tiny checkpoint observed and smoothed, and the logits of any weights."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bitwright.calibration.choices import Alpha
from bitwright.calibration.control import PassControl, never, silent
from bitwright.calibration.passes.activation_pass import stream_activations
from bitwright.calibration.statistics.activations import ActivationStatistics, InputRows
from bitwright.calibration.statistics.smoothing import SmoothQuantConfig
from bitwright.calibration.stream.forward import LayerStream
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.text.corpus import Corpus
from bitwright.converter.measure.activations import activation_names
from bitwright.converter.model.model_map import describe
from bitwright.converter.smoothing.groups import smoothing_groups
from bitwright.converter.smoothing.search import SmoothedGroup, Smoother
from bitwright.converter.smoothing.view import SmoothedCheckpoint
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.converter.source.open import open_checkpoint
from bitwright.profiles.vocabulary import ModelMap


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
        return smoother.folder.view(), smoother, groups


def observe(directory: Path, work_dir: Path, corpus: Corpus) -> Observed:
    checkpoint = open_checkpoint(str(directory))
    model_map = describe(checkpoint)
    rows = InputRows(work_dir / "rows")
    activations = observe_again(checkpoint, model_map, corpus, work_dir / "observed", rows)
    return Observed(checkpoint, model_map, corpus, activations, rows)


def observe_again(source, model_map, corpus: Corpus, work_dir: Path, rows=None) -> ActivationStatistics:
    """The activation statistics of a checkpoint, or of a view of it."""
    model = StreamableModel(source, source.location, device="cpu")
    return stream_activations(model, activation_names(model_map), corpus, PassControl(work_dir), rows=rows)


def logits(source, directory: Path, tokens: np.ndarray, work_dir: Path) -> np.ndarray:
    """float32 [n_samples, sequence_length, vocabulary]."""
    stream = LayerStream(StreamableModel(source, directory, device="cpu"), tokens, PassControl(work_dir))
    stream.run()
    with torch.inference_mode(), stream.head() as head:
        return np.stack([head(stream.hidden_states(i, i + 1)[0]).numpy() for i in range(len(tokens))])
