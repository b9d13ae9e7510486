"""The stage `smooth`: activation statistics, SmoothQuant's factors from them, and the model that they make."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from calibration.activation_file import load_activations, save_activations
from calibration.activations import ActivationStatistics, InputRows, RowsLost, compute_activations
from calibration.control import ShouldStop
from calibration.corpus import Corpus
from calibration.smoothing import SmoothQuantConfig
from converter.calibrate import calibration_text, load_tokenizer, observed_names, runnable
from converter.checkpoint import Checkpoint
from converter.job import Job
from converter.kept import kept
from converter.kv_cache import smoothed_caches
from converter.progress import Progress
from converter.smooth_search import SmoothedGroup, Smoother
from converter.smoothed import SmoothedCheckpoint
from converter.smoothing_file import Smoothing, load_smoothing, save_smoothing
from converter.smoothing_groups import smoothing_groups, unsmoothed
from formats.files import remove, remove_tree
from profiles.vocabulary import ModelMap, Role

ACTIVATIONS_FILE = "activations.safetensors"
SMOOTHING_FILE = "smoothing.safetensors"
SMOOTHED_ACTIVATIONS_FILE = "activations-smoothed.safetensors"
# The checkpoints of the pass over the model as it is.
_PASS = "activations"

# The smoothed model is looked at again for its histograms alone, of which some million values and thousands of tokens
# tell enough: on so many tokens, of that many texts at least. What is known by channel comes from all samples.
_TOKENS_SEEN_AGAIN, _SAMPLES_SEEN_AGAIN = 4096, 8


@dataclass(frozen=True)
class Smoothed:
    """checkpoint, model_map: of the smoothed model, by the checkpoint's own tensor names; it reads as any checkpoint
    does. activations: of the smoothed model, whose `importance()` the encoders use. smoothing: factors and record.
    left: GGUF tensors whose inputs nothing makes up for. errors: GGUF tensor -> what INT8 weights and inputs, smoothed,
    leave in its output, see calibration.smoothing.output_error."""

    checkpoint: SmoothedCheckpoint
    model_map: ModelMap
    activations: ActivationStatistics
    smoothing: Smoothing
    left: tuple[str, ...]
    errors: Mapping[str, float]

    @property
    def groups(self) -> tuple[SmoothedGroup, ...]:
        return self.smoothing.groups


def smooth(
    job: Job,
    checkpoint: Checkpoint,
    model_map: ModelMap,
    config: SmoothQuantConfig,
    work_dir: Path,
    progress: Progress,
    should_stop: ShouldStop,
    static: Collection[str] = (),
) -> Smoothed:
    """The job's model, smoothed. Statistics, factors and the statistics of the smoothed model stay in the work
    directory and are not computed again; an interrupted pass over the model continues after its last layer. static: as
    of Smoother.

    Raises ConvertError for a model whose architecture says of no tensor what feeds it, and for a matrix without
    statistics.
    """
    running, running_map = runnable(checkpoint, model_map, work_dir)
    before = observe(job, checkpoint, model_map, work_dir, progress, should_stop)
    groups = smoothing_groups(running, running_map)

    def decide() -> Smoothing:
        smoother = Smoother(running, before, _rows(work_dir), static)
        decided = smoother.smooth(groups, config, progress, should_stop)
        return Smoothing(
            checkpoint.model_id, checkpoint.revision, config.alpha, tuple(decided), smoother.factors, smoother.foldings
        )

    def decide_on_sound_rows() -> Smoothing:
        try:
            return decide()
        except RowsLost as lost:
            progress.say(f"{lost.where}: {lost.what}: the model is run again")
            forget_activations(work_dir)
            observe(job, checkpoint, model_map, work_dir, progress, should_stop)
            return decide()

    path = work_dir / SMOOTHING_FILE
    smoothing = kept(path, "record of smoothing", progress, decide_on_sound_rows, save_smoothing, load_smoothing)
    view = SmoothedCheckpoint.of(running, smoothing.foldings)

    def see_again() -> ActivationStatistics:
        again = compute_activations(
            view,
            view.location,
            activation_names(running_map),
            _corpus(job, running, running_map, max(_SAMPLES_SEEN_AGAIN, _TOKENS_SEEN_AGAIN // job.sequence_length)),
            work_dir=work_dir / "calibration-smoothed",
            model=checkpoint.model_id,
            revision=checkpoint.revision,
            transform=smoothing.identity(),
            device=job.device,
            dtype=job.calibration_dtype,
            threads=job.n_threads,
            progress=progress,
            should_stop=should_stop,
            stage="calibrate smoothed",
        )
        caches = smoothed_caches(before.caches, running_map, smoothing.foldings)
        return replace(before.divided(smoothing.factors, again), caches=caches)

    path = work_dir / SMOOTHED_ACTIVATIONS_FILE
    seen = kept(path, "file of smoothed activations", progress, see_again, save_activations, load_activations)
    return Smoothed(
        view,
        running_map,
        seen,
        smoothing,
        tuple(unsmoothed(groups, running_map)),
        {
            consumer.statistics[0]: decided.error
            for group, decided in zip(groups, smoothing.groups, strict=True)
            if decided.error is not None
            for link in group.links
            for consumer in link.consumers
            if consumer.quantized
        },
    )


def observe(
    job: Job,
    checkpoint: Checkpoint,
    model_map: ModelMap,
    work_dir: Path,
    progress: Progress,
    should_stop: ShouldStop,
) -> ActivationStatistics:
    """The activation statistics of the job's model as it is, importance among them. They stay in the work directory and
    are not computed again."""

    def compute() -> ActivationStatistics:
        running, running_map = runnable(checkpoint, model_map, work_dir)
        corpus = _corpus(job, running, running_map, job.samples)
        if corpus.note:
            progress.say(corpus.note)
        return compute_activations(
            running,
            running.location,
            activation_names(running_map),
            corpus,
            work_dir=work_dir / _PASS,
            model=checkpoint.model_id,
            revision=checkpoint.revision,
            rows=_rows(work_dir),
            device=job.device,
            dtype=job.calibration_dtype,
            threads=job.n_threads,
            progress=progress,
            should_stop=should_stop,
        )

    path = work_dir / ACTIVATIONS_FILE
    return kept(path, "file of activation statistics", progress, compute, save_activations, load_activations)


def forget_activations(work_dir: Path) -> None:
    """What `observe` has left of the pass, so that it runs again."""
    remove(work_dir / ACTIVATIONS_FILE)
    remove_tree(work_dir / _PASS)
    remove_tree(_rows(work_dir).directory)


def activation_names(model_map: ModelMap) -> dict[str, tuple[str, int]]:
    """Checkpoint tensor -> (GGUF tensor, matrix index), for what is observed: the matrices that may be quantized, and
    the routers, whose inputs are those of all experts together."""
    routers = {t.sources[0]: (t.name, 0) for t in model_map.tensors if t.role is Role.ROUTER}
    return observed_names(model_map) | routers


def _rows(work_dir: Path) -> InputRows:
    return InputRows(work_dir / "activation-rows")


def _corpus(job: Job, checkpoint: Checkpoint, model_map: ModelMap, samples: int) -> Corpus:
    """The first of the job's samples."""
    corpus = calibration_text(job, load_tokenizer(checkpoint.location), model_map, job.samples)
    return replace(corpus, tokens=corpus.tokens[:samples])
