"""The stage `analyse`: what every format costs every tensor, measured where the profile decides by it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from bitwright.calibration.places import Place
from bitwright.calibration.sensitivity.fisher import FisherFactors, stream_fisher
from bitwright.calibration.sensitivity.layer_score import ScoreWeights, layer_scores
from bitwright.calibration.sensitivity.table import SensitivityTable, load_sensitivity, save_sensitivity
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.converter.artifact.run import Run
from bitwright.converter.job.cache import arrays_identity, text_identity
from bitwright.converter.job.job import Job
from bitwright.converter.job.kept import kept
from bitwright.converter.measure.running import calibration_text, load_tokenizer, runnable, streamable
from bitwright.converter.measure.sensitivity import CANDIDATE_FORMATS, Trials, build_sensitivity, check_sensitivity
from bitwright.converter.model.module_map import places_of
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.seals import is_sound
from bitwright.formats.registry import get_format
from bitwright.profiles.evidence import Evidence
from bitwright.profiles.reading.schema import QuantizationProfile
from bitwright.profiles.vocabulary import ModelMap, Role

SENSITIVITY_FILE = "sensitivity.safetensors"
CORRECTIONS_FILE = "corrections.json"
# The directory of what is measured until a refinement is done.
TRIALS = "refinement"
# Gradients need far fewer samples than importance: they are summed over rows and columns.
ANALYSIS_SAMPLES = 32
ANALYSIS_SEQUENCE_LENGTH = 256


def streamed_evidence(run: Run, importance: ImportanceMatrix) -> Evidence:
    """What the job's profile decides by, measured on the run's model."""
    formats = formats_to_measure(run.job.profile, [rule.format for rule in run.job.overrides])
    table = streamed_sensitivity(run, importance, formats)
    return evidence_of(table, run.checkpoint, run.model_map, run.job.profile.score)


def streamed_sensitivity(run: Run, importance: ImportanceMatrix, formats: Sequence[str]) -> SensitivityTable:
    """What each of the formats costs every tensor: gradients by running the model, then encoded rows. The table stays
    in the work directory and is not measured again; what is done of it when the run stops is not lost."""
    job = run.job

    def compute() -> SensitivityTable:
        running, running_map = runnable(run.checkpoint, run.model_map, run.work_dir)
        tokenizer = load_tokenizer(running.location)
        corpus = calibration_text(job, tokenizer, run.model_map, ANALYSIS_SAMPLES, ANALYSIS_SEQUENCE_LENGTH)
        model = streamable(run, running, job.calibration_dtype)

        def measure() -> SensitivityTable:
            factors = stream_fisher(model, matrices_of(running_map), corpus, run.control("analysis"), seed=job.seed)
            return build_sensitivity(run, factors, importance.with_costs(factors.columns), Trials(formats))

        cached = run.cache.entry(
            "sensitivity",
            text=text_identity(corpus),
            dtype=job.calibration_dtype,
            seed=job.seed,
            formats=list(formats),
            importance=arrays_identity(importance.sums, importance.counts),
        )
        return cached.result(measure, save_sensitivity, load_sensitivity)

    path = run.work_dir / SENSITIVITY_FILE
    return kept(path, "sensitivity table", run.progress, compute, save_sensitivity, load_sensitivity)


def measured_factors(job: Job, work_dir: Path) -> FisherFactors | None:
    """The Fisher factors of a table that the job names or has measured, None without one."""
    path = job.sensitivity or work_dir / SENSITIVITY_FILE
    return load_sensitivity(path).factors if job.sensitivity or is_sound(path) else None


def matrices_of(model_map: ModelMap) -> dict[str, tuple[Place, ...]]:
    """Checkpoint tensor -> its places in the GGUF, for every matrix that may be quantized and that the model computes
    with."""
    return places_of(tensor for tensor in model_map.tensors if tensor.quantizable and tensor.role is not Role.MTP)


def formats_to_measure(profile: QuantizationProfile, overriding: list[str]) -> list[str]:
    """What the profile chooses among or names; of 16 and 32 bits nothing is worth measuring."""
    names = [] if profile.budget is None else [*CANDIDATE_FORMATS, *profile.budget.formats]
    names += [] if profile.base is None else [profile.base]
    names += [tier.format for tier in profile.tiers] + [rule.format for rule in profile.rules] + overriding
    return [name for name in dict.fromkeys(names) if get_format(name).block_size > 1]


def available_evidence(run: Run, in_work_dir: bool = True) -> Evidence | None:
    """From the file that the job names, or from what an earlier run has left in the work directory; None when there is
    neither, or when it is still to be refined. Raises ConvertError for a file of another model."""
    job = run.job
    evidence = given_evidence(run)
    if not job.profile.needs_sensitivity or not in_work_dir:
        return None if job.refine else evidence
    path = run.work_dir / SENSITIVITY_FILE
    if evidence is None and is_sound(path):
        evidence = evidence_of(load_sensitivity(path), run.checkpoint, run.model_map, job.profile.score)
    if evidence is not None and job.refine:
        return _corrected(evidence, run.work_dir)
    return evidence


def _corrected(evidence: Evidence, work_dir: Path) -> Evidence | None:
    """The evidence with the corrections that a finished refinement has left in the work directory; None without."""
    path = work_dir / CORRECTIONS_FILE
    if not is_sound(path):
        return None
    return evidence.corrected(json.loads(path.read_bytes())["factors"])


def sensitivity_path(job: Job, work_dir: Path) -> Path | None:
    """The table that the job uses: the one it names, or the one it measures; None where it needs none."""
    return job.sensitivity or (work_dir / SENSITIVITY_FILE if job.profile.needs_sensitivity else None)


def given_evidence(run: Run) -> Evidence | None:
    """From the file that the job names. Raises ConvertError for a file of another model."""
    if run.job.sensitivity is None:
        return None
    return evidence_of(load_sensitivity(run.job.sensitivity), run.checkpoint, run.model_map, run.job.profile.score)


def evidence_of(
    table: SensitivityTable, checkpoint: Checkpoint, model_map: ModelMap, score: Mapping[str, float] | None = None
) -> Evidence:
    """What decisions take from a table; score: fields of ScoreWeights that are not the usual ones. Raises ConvertError
    for a table of another model, and for shares of a score that are all zero."""
    check_sensitivity(table, checkpoint, model_map)
    factors = table.factors
    layers = {tensor.name: tensor.layer for tensor in model_map.tensors if tensor.layer is not None}
    return Evidence(
        table.losses,
        layer_scores(factors, layers, ScoreWeights(**(score or {}))),
        table.where,
        factors.columns,
        {
            "corpus": factors.corpus,
            "corpus_sha256": factors.corpus_sha256,
            "samples": factors.samples,
            "sequence_length": factors.sequence_length,
            "labels": factors.labels,
            "weights": "Fisher columns",
            "effort": table.effort,
            "tool": table.tool,
        },
    )


def analysis_is_needed(job: Job) -> ConvertError:
    """What a dry run says of a plan that rests on measurements which are still to be made."""
    return ConvertError(
        f"the profile {job.profile.name!r} decides by measured sensitivity, which has not been measured yet:"
        " there is no plan before the analysis",
        f"--profile {job.profile.name}",
        "convert without --dry-run, which measures first; or measure once with `bitwright imatrix --sensitivity"
        " --output FILE.gguf MODEL` and give what it writes: --imatrix FILE.gguf --sensitivity"
        " FILE.sensitivity.safetensors",
    )
