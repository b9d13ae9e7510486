"""The stage `analyse`: what every format costs every tensor, measured where the profile decides by it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from calibration.control import ShouldStop
from calibration.fisher import FisherFactors, compute_fisher
from calibration.importance import ImportanceMatrix
from calibration.layer_score import ScoreWeights, layer_scores
from calibration.sensitivity import SensitivityTable, load_sensitivity, save_sensitivity
from converter.calibrate import calibration_text, load_tokenizer, runnable
from converter.checkpoint import Checkpoint
from converter.job import Job
from converter.kept import is_kept
from converter.progress import Progress
from converter.sensitivity import CANDIDATE_FORMATS, build_sensitivity, check_sensitivity
from formats.errors import ConvertError
from formats.registry import get_format
from formats.seals import is_sound, sealed
from profiles.evidence import Evidence
from profiles.schema import QuantizationProfile
from profiles.vocabulary import ModelMap

SENSITIVITY_FILE = "sensitivity.safetensors"
CORRECTIONS_FILE = "corrections.json"
# The place of what is measured until a refinement is done.
TRIALS = "refinement"
# Gradients need far fewer samples than importance: they are summed over rows and columns.
ANALYSIS_SAMPLES = 32
ANALYSIS_SEQUENCE_LENGTH = 256


def analyse(
    job: Job,
    checkpoint: Checkpoint,
    model_map: ModelMap,
    importance: ImportanceMatrix,
    work_dir: Path,
    progress: Progress,
    should_stop: ShouldStop,
) -> Evidence:
    """Measure what the job's profile decides by."""
    formats = formats_to_measure(job.profile, [rule.format for rule in job.overrides])
    path = measure_sensitivity(job, checkpoint, model_map, importance, formats, work_dir, progress, should_stop)
    return evidence_of(load_sensitivity(path), checkpoint, model_map, job.profile.score)


def measure_sensitivity(
    job: Job,
    checkpoint: Checkpoint,
    model_map: ModelMap,
    importance: ImportanceMatrix,
    formats: Sequence[str],
    work_dir: Path,
    progress: Progress,
    should_stop: ShouldStop,
) -> Path:
    """The table's file. It stays in the work directory and is not measured again; what is done of it when the job stops
    is not lost."""
    path = work_dir / SENSITIVITY_FILE
    if is_kept(path, "sensitivity table", progress):
        return path
    running, running_map = runnable(checkpoint, model_map, work_dir)
    tokenizer = load_tokenizer(running.location)
    corpus = calibration_text(job, tokenizer, model_map, ANALYSIS_SAMPLES, ANALYSIS_SEQUENCE_LENGTH)
    factors = compute_fisher(
        running,
        running.location,
        matrices_of(running_map),
        corpus,
        seed=job.seed,
        work_dir=work_dir / "analysis",
        model=checkpoint.model_id,
        revision=checkpoint.revision,
        device=job.device,
        dtype=job.calibration_dtype,
        threads=job.n_threads,
        progress=progress,
        should_stop=should_stop,
    )
    table = build_sensitivity(
        checkpoint,
        model_map,
        factors,
        importance.with_costs(factors.columns),
        formats=formats,
        journal=work_dir / "sensitivity.jsonl",
        threads=job.n_threads,
        progress=progress,
        should_stop=should_stop,
    )
    with sealed(path) as draft:
        save_sensitivity(draft, table)
    return path


def measured_factors(job: Job, work_dir: Path) -> FisherFactors | None:
    """The Fisher factors of a table that the job names or has measured, None without one."""
    path = job.sensitivity or work_dir / SENSITIVITY_FILE
    return load_sensitivity(path).factors if job.sensitivity or is_sound(path) else None


def matrices_of(model_map: ModelMap) -> dict[str, tuple[str, int]]:
    """Checkpoint tensor -> (GGUF tensor, matrix index), for every matrix that may be quantized."""
    return {
        source: (tensor.name, matrix)
        for tensor in model_map.tensors
        if tensor.quantizable
        for matrix, source in enumerate(tensor.sources)
    }


def formats_to_measure(profile: QuantizationProfile, overriding: list[str]) -> list[str]:
    """What the profile chooses among or names; of 16 and 32 bits nothing is worth measuring."""
    names = [] if profile.budget is None else [*CANDIDATE_FORMATS, *profile.budget.formats]
    names += [] if profile.base is None else [profile.base]
    names += [tier.format for tier in profile.tiers] + [rule.format for rule in profile.rules] + overriding
    return [name for name in dict.fromkeys(names) if get_format(name).block_size > 1]


def found_evidence(job: Job, checkpoint: Checkpoint, model_map: ModelMap, in_work_dir: bool = True) -> Evidence | None:
    """From the file that the job names, or from what an earlier run has left in the work directory; None when there is
    neither, or when it is still to be refined. Raises ConvertError for a file of another model."""
    evidence = given_evidence(job, checkpoint, model_map)
    if not job.profile.needs_sensitivity or not in_work_dir:
        return None if job.refine else evidence
    assert job.work_dir is not None
    path = job.work_dir / SENSITIVITY_FILE
    if evidence is None and is_sound(path):
        evidence = evidence_of(load_sensitivity(path), checkpoint, model_map, job.profile.score)
    if evidence is not None and job.refine:
        return _corrected(evidence, job.work_dir)
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


def given_evidence(job: Job, checkpoint: Checkpoint, model_map: ModelMap) -> Evidence | None:
    """From the file that the job names. Raises ConvertError for a file of another model."""
    if job.sensitivity is None:
        return None
    return evidence_of(load_sensitivity(job.sensitivity), checkpoint, model_map, job.profile.score)


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
    if job.refine and job.sensitivity is not None:
        return ConvertError(
            "a plan that is to be refined is measured first, and there is none before that",
            f"--refine {job.refine}",
            "convert without --dry-run; or plan without --refine to see where it starts",
        )
    return ConvertError(
        f"the profile {job.profile.name!r} decides by measured sensitivity, which has not been measured yet:"
        " there is no plan before the analysis",
        f"--profile {job.profile.name}",
        "convert without --dry-run, which measures first; or measure once with `convert imatrix --sensitivity --output"
        " FILE.gguf MODEL` and give what it writes: --imatrix FILE.gguf --sensitivity FILE.sensitivity.safetensors",
    )
