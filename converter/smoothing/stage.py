"""The stage `smooth`: activation statistics, SmoothQuant's factors from them, and the model that they make."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from bitwright.calibration.choices import Device
from bitwright.calibration.statistics.activation_file import load_activations, save_activations
from bitwright.calibration.statistics.activations import (
    ActivationStatistics,
    CachedPeaks,
    RowsLost,
)
from bitwright.calibration.statistics.smoothing import SmoothQuantConfig
from bitwright.converter.artifact.run import Run
from bitwright.converter.job.kept import kept
from bitwright.converter.measure.activations import (
    activation_names,
    activation_text,
    forget_activations,
    input_rows,
    streamed_activations,
)
from bitwright.converter.measure.running import runnable, streamable
from bitwright.converter.smoothing.groups import smoothing_groups, unsmoothed
from bitwright.converter.smoothing.record import Smoothing, load_smoothing, save_smoothing
from bitwright.converter.smoothing.search import SmoothedGroup, Smoother
from bitwright.converter.smoothing.view import Folding, SmoothedCheckpoint
from bitwright.profiles.vocabulary import ModelMap, Role

if TYPE_CHECKING:
    import torch

SMOOTHING_FILE = "smoothing.safetensors"
SMOOTHED_ACTIVATIONS_FILE = "activations-smoothed.safetensors"

# The smoothed model is looked at again for its histograms alone, of which some million values and thousands of tokens
# tell enough: on so many tokens, of that many texts at least. What is known by channel comes from all samples.
_TOKENS_SEEN_AGAIN, _SAMPLES_SEEN_AGAIN = 4096, 8


@dataclass(frozen=True)
class Smoothed:
    """checkpoint, model_map: of the smoothed model, by the checkpoint's own tensor names; it reads as any checkpoint
    does. activations: of the smoothed model, whose `importance()` the encoders use. smoothing: factors and record.
    unsmoothed: GGUF tensors whose inputs nothing makes up for. errors: GGUF tensor -> what INT8 weights and inputs,
    smoothed, leave in its output, see calibration.statistics.smoothing.output_error."""

    checkpoint: SmoothedCheckpoint
    model_map: ModelMap
    activations: ActivationStatistics
    smoothing: Smoothing
    unsmoothed: tuple[str, ...]
    errors: Mapping[str, float]

    @property
    def groups(self) -> tuple[SmoothedGroup, ...]:
        return self.smoothing.groups


def streamed_smoothing(run: Run, config: SmoothQuantConfig, static: Collection[str] = ()) -> Smoothed:
    """The run's model, smoothed. Statistics, factors and the statistics of the smoothed model stay in the work
    directory and are not computed again; an interrupted pass over the model continues after its last layer. static: as
    of Smoother.

    Raises ConvertError for a model whose architecture says of no tensor what feeds it, and for a matrix without
    statistics.
    """
    job, checkpoint, progress = run.job, run.checkpoint, run.progress
    running, running_map = runnable(checkpoint, run.model_map, run.work_dir)
    before = streamed_activations(run)
    groups = smoothing_groups(running, running_map)

    def decide() -> Smoothing:
        from bitwright.calibration.stream.device.memory import memory_explained

        device = _measuring_device(job.device)
        smoother = Smoother(running, before, input_rows(run.work_dir), static, str(device))
        with memory_explained(device):
            decided = smoother.smooth(groups, config, progress, run.should_stop)
        factors = smoother.folder.all_factors({spec.name: spec.n_matrices for spec in running_map.tensors})
        foldings = smoother.folder.foldings
        return Smoothing(checkpoint.model_id, checkpoint.revision, config.alpha, tuple(decided), factors, foldings)

    def decide_on_sound_rows() -> Smoothing:
        try:
            return decide()
        except RowsLost as lost:
            progress.say(f"{lost.where}: {lost.what}: the model is run again")
            forget_activations(run.work_dir)
            streamed_activations(run)
            return decide()

    path = run.work_dir / SMOOTHING_FILE
    smoothing = kept(path, "record of smoothing", progress, decide_on_sound_rows, save_smoothing, load_smoothing)
    view = SmoothedCheckpoint.of(running, smoothing.foldings)

    def stream_again() -> ActivationStatistics:
        from bitwright.calibration.passes.activation_pass import stream_activations

        n_samples = max(_SAMPLES_SEEN_AGAIN, _TOKENS_SEEN_AGAIN // job.sequence_length)
        corpus = activation_text(run, running, running_map, n_samples)
        model = replace(streamable(run, running, job.calibration_dtype, smoothing.identity()), weights=view)
        control = run.control("calibration-smoothed")
        again = stream_activations(model, activation_names(running_map), corpus, control, stage="calibrate smoothed")
        caches = smoothed_caches(before.caches, running_map, smoothing.foldings)
        return replace(before.divided(smoothing.factors, again), caches=caches)

    path = run.work_dir / SMOOTHED_ACTIVATIONS_FILE
    what = "file of smoothed activations"
    activations = kept(path, what, progress, stream_again, save_activations, load_activations)
    errors = {
        consumer.statistics[0]: decided.error
        for group, decided in zip(groups, smoothing.groups, strict=True)
        if decided.error is not None
        for link in group.links
        for consumer in link.consumers
        if consumer.quantized
    }
    return Smoothed(view, running_map, activations, smoothing, tuple(unsmoothed(groups, running_map)), errors)


def _measuring_device(name: Device) -> "torch.device":
    """What the factors are chosen on: a GPU of CUDA, where the model runs on one. Metal has no float64."""
    import torch

    from bitwright.calibration.stream.build import choose_device, compute_exactly

    device = choose_device(name)
    compute_exactly(device, torch.float32)
    return torch.device("cpu") if device.type == "mps" else device


def smoothed_caches(
    caches: Mapping[int, CachedPeaks], model_map: ModelMap, foldings: Mapping[str, Folding]
) -> dict[int, CachedPeaks]:
    """The peaks of the smoothed model's caches, by layer: smoothing multiplies the rows that make the values with
    factors, and leaves the keys as they are."""
    smoothed = dict(caches)
    for tensor in model_map.tensors:
        if tensor.layer is None or tensor.role not in (Role.ATTENTION_VALUE, Role.ATTENTION_QKV):
            continue
        before = caches.get(tensor.layer)
        folding = foldings.get(tensor.sources[0]) if tensor.sources else None
        if before is not None and folding is not None and folding.rows is not None:
            rows = folding.rows[-before.values.size :].reshape(before.values.shape)
            smoothed[tensor.layer] = CachedPeaks(before.keys, before.values * np.abs(rows))
    return smoothed
