"""The stage `super weights`: looks for them in a model, and keeps the report."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bitwright.calibration.sensitivity.fisher import FisherFactors
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.calibration.statistics.super_weights import SuperWeightReport
from bitwright.calibration.text.corpus import Corpus, load_corpus
from bitwright.converter.artifact.run import Run
from bitwright.converter.job.cache import arrays_identity, text_identity
from bitwright.converter.job.job import Job
from bitwright.converter.job.kept import kept
from bitwright.converter.measure.evidence import measured_factors
from bitwright.converter.measure.running import calibration_text, load_tokenizer, runnable, streamable
from bitwright.converter.measure.statistics_directory import given_trials
from bitwright.converter.model.module_map import places_of
from bitwright.converter.model.stored_rows import read_rows
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.whole import whole_file
from bitwright.profiles.vocabulary import DOWN_ROLES, ModelMap

if TYPE_CHECKING:
    from bitwright.calibration.stream.streamable import StreamableModel
    from bitwright.calibration.super_weights.spikes import DownProjection

RESULT = "super_weights.json"
# The checkpoints of the search.
_PASS = "super-weights"
_WHAT = "record of super weights"

# Samples of the calibration text that are looked at beside the fixed prompts, and the text on which removals are
# measured: a thousand positions tell 0.01 nats from nothing.
_LOOKED_AT = 8
_MEASURED_SAMPLES, _MEASURED_LENGTH = 8, 256


def streamed_super_weights(run: Run, factors: FisherFactors | None = None) -> SuperWeightReport:
    """What the run's model has of super weights, by spikes and, where the Fisher factors are known, by gradients. It
    stays in the work directory and is not looked for again by the same criteria."""
    from bitwright.calibration.super_weights.search import stream_super_weights

    def compute() -> SuperWeightReport:
        subject = _subject_of(run)

        def search() -> SuperWeightReport:
            return stream_super_weights(*subject, run.control(_PASS), factors, given_trials(run.job))

        cached = run.cache.entry(
            "super weights",
            looked_at=arrays_identity({"tokens": subject.looked_at}),
            text=text_identity(subject.measured_on),
            factors=None if factors is None else arrays_identity(factors.rows, factors.columns),
        )
        return cached.result(search, _save_super_weights, load_super_weights)

    def has_criteria(report: SuperWeightReport) -> bool:
        return factors is None or "gradients" in report.criteria

    return kept(
        run.work_dir / RESULT,
        _WHAT,
        run.progress,
        compute,
        _save_super_weights,
        load_super_weights,
        answers=has_criteria,
    )


def streamed_trials(run: Run, share: slice) -> list[dict[str, Any]]:
    """What a share of the search's trials gives, for `given_trials` of a job whose search is shared. share: of the
    candidates, the strongest first."""
    from bitwright.calibration.super_weights.search import stream_trials

    return [dict(line) for line in stream_trials(*_subject_of(run), run.control(_PASS), share)]


class _Subject(NamedTuple):
    """What a search runs. projections: every down projection. looked_at: tokens int [n, length]; measured_on: the text
    that removals are tried on."""

    model: "StreamableModel"
    projections: "list[DownProjection]"
    looked_at: np.ndarray
    measured_on: Corpus


def _subject_of(run: Run) -> _Subject:
    from bitwright.calibration.super_weights.spikes import PROMPT_LENGTH, DownProjection, prompt_tokens

    running, running_map = runnable(run.checkpoint, run.model_map, run.work_dir)
    tokenizer = load_tokenizer(running.location)
    samples = calibration_text(run.job, tokenizer, run.model_map, _LOOKED_AT, PROMPT_LENGTH + 1)
    projections = [
        DownProjection(source, tensor.layer, tensor.name, place.matrix, place.n_matrices, tensor.layout.transposed)
        for tensor in running_map.tensors
        if tensor.role in DOWN_ROLES and tensor.layer is not None
        for source, places in places_of([tensor]).items()
        for place in places
    ]
    looked_at = prompt_tokens(tokenizer, samples.tokens, samples.tokens.shape[1] - 1)
    return _Subject(streamable(run, running), projections, looked_at, measuring_text(run.job, tokenizer))


def _save_super_weights(path: Path, report: SuperWeightReport) -> None:
    with whole_file(path, _WHAT) as file:
        file.write(report.to_json().encode())


def load_super_weights(path: Path) -> SuperWeightReport:
    """What an earlier search has left."""
    return SuperWeightReport.from_json(path.read_text(encoding="utf-8"), str(path))


def given_or_streamed_super_weights(run: Run, importance: ImportanceMatrix | None) -> SuperWeightReport:
    """What the importance says of them, or else what a search finds. Raises ConvertError for a report of another
    model."""
    if importance is not None and importance.super_weights is not None:
        check_super_weights(importance.super_weights, run.checkpoint, run.model_map)
        return importance.super_weights
    return streamed_super_weights(run, measured_factors(run.job, run.work_dir))


def measuring_text(job: Job, tokenizer: Any) -> Corpus:
    """The text on which it is measured what super weights and their protection are worth."""
    length = min(_MEASURED_LENGTH, job.sequence_length)
    return load_corpus(job.calibration, tokenizer, _MEASURED_SAMPLES, length, job.seed, split="test")


def check_super_weights(report: SuperWeightReport, checkpoint: Checkpoint, model_map: ModelMap) -> None:
    """Refuse a report of another model: its weights are not where the report says.

    Raises ConvertError naming the first that contradicts.
    """
    specs = {tensor.name: tensor for tensor in model_map.tensors if tensor.role in DOWN_ROLES}
    for weight in report.weights:
        spec, has = specs.get(weight.tensor), None
        if spec is not None:
            n_rows = spec.n_rows // spec.n_matrices
            if weight.matrix < spec.n_matrices and weight.row < n_rows and weight.column < spec.n_columns:
                row = weight.matrix * n_rows + weight.row
                has = float(read_rows(checkpoint, spec, row, row + 1)[0, weight.column])
        if has != weight.value:
            raise ConvertError(
                f"the super weights are of another model: {weight.tensor}[{weight.row},{weight.column}] is"
                f" {weight.value:g} there and {'absent' if has is None else f'{has:g}'} here",
                report.where,
                "look for them in this model: bitwright imatrix --super-weights MODEL",
            )
