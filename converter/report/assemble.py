"""The report of a job, from what its stages have made and measured."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from bitwright.calibration.evaluation.quality import QualityReport
from bitwright.converter.artifact.feedback import feedback_report
from bitwright.converter.artifact.target import Adapted, Prepared
from bitwright.converter.artifact.tensor_errors import TensorError
from bitwright.converter.job.identity import tool_identity
from bitwright.converter.job.recipe import calibration_manifest, recipe, reproducing_arguments, sensitivity_manifest
from bitwright.converter.measure.evidence import sensitivity_path
from bitwright.converter.model.metadata import source_card
from bitwright.converter.report.data import Agreement, Artifact, ArtifactFile, Coherence, Layer, Report, Source
from bitwright.converter.report.verdict import better_recipe, overall
from bitwright.converter.sequence.outcome import tuning_report
from bitwright.formats.typed import from_plain
from bitwright.profiles.planning.plan import Plan, PlannedTensor
from bitwright.profiles.planning.summary import tensor_groups
from bitwright.profiles.reading.schema import QuantizationProfile

_TYPES = get_type_hints(Report)


@dataclass(frozen=True)
class Measured:
    """What the stages found of the finished artifact, as plain data of theirs. coverage: of super weights; it, quality,
    coherence, agreement and tasks are None for what was not asked for or could not be judged."""

    errors: Sequence[TensorError]
    coverage: Mapping[str, Any] | None
    quality: Mapping[str, Any] | None = None
    coherence: Mapping[str, Any] | None = None
    agreement: Mapping[str, Any] | None = None
    tasks: Mapping[str, Any] | None = None


def assemble(
    planned: Prepared[Any],
    adapted: Adapted[Any, Any],
    hashes: Mapping[Path, str],
    measured: Measured,
    seconds: Mapping[str, float],
) -> Report:
    """planned: the job before its model was looked at; adapted: as it was executed. hashes: SHA-256 of each file of the
    artifact, those with the weights first. seconds: of each stage."""
    run, job, target, source = planned.run, planned.run.job, planned.target, planned.run.checkpoint
    prepared, work_dir = adapted.prepared, adapted.prepared.run.work_dir
    plan, importance = prepared.plan, prepared.importance
    reads_text_later = job.refine > 0 or planned.reads_text_later
    reads_text = (
        (planned.importance is not None and job.imatrix is None)
        or (job.profile.needs_sensitivity and job.sensitivity is None)
        or reads_text_later
    )
    quality = from_plain(QualityReport | None, measured.quality, "quality")
    coherence = from_plain(Coherence | None, measured.coherence, "coherence")
    agreement = from_plain(Agreement | None, measured.agreement, "agreement")
    source_bytes = sum(
        stored.n_bytes for stored in {stored for tensor in source.tensors.values() for stored in tensor.stored}
    )
    artifact_bytes = prepared.files.n_bytes
    files = tuple(ArtifactFile(str(path), path.stat().st_size, sha256) for path, sha256 in hashes.items())

    def plan_of(profile: QuantizationProfile) -> Plan:
        alone = replace(job, profile=profile, overrides=(), sequential=False, tune=0)
        by_rules_alone = replace(prepared.run, job=alone)
        plan: Plan = target.plan(by_rules_alone, None, None).plan
        return plan

    def name_of(profile: QuantizationProfile) -> str:
        return target.located(
            replace(job, profile=profile, output=None, overrides=()), source, run.model_map
        ).output.name

    # A larger format cures no runtime that computes something else.
    better = better_recipe(prepared.run, plan_of, name_of, plan, overall(quality, coherence, None))
    plain = {
        "calibration": calibration_manifest(job, importance, work_dir),
        "sensitivity": sensitivity_manifest(sensitivity_path(job, work_dir)),
        "super_weight_coverage": measured.coverage,
        "protection": adapted.decisions,
        "feedback": feedback_report(prepared.run, plan),
        "uniform": target.uniform_sizes(prepared),
        "tasks": measured.tasks,
        **({} if (tuning := tuning_report(prepared.run, plan)) is None else {"tuning": tuning}),
        **adapted.report,
    }
    # As it was decided, wherever importance comes from the next time.
    decided = replace(job, error_feedback=plan.error_feedback or job.error_feedback)
    return Report(
        model=source.model_id,
        revision=source.revision,
        profile=plan.profile,
        plan_sha256=plan.digest(),
        tool=tool_identity(),
        recipe=recipe(job, source, plan, importance),
        arguments=tuple(reproducing_arguments(decided, source, reads_text)),
        reads_text_later=reads_text_later,
        source=Source(source_bytes, source_card(source)),
        artifact=Artifact(job.profile.target, artifact_bytes, files),
        compression_ratio=source_bytes / artifact_bytes,
        groups=tuple(tensor_groups(plan)),
        errors=tuple(measured.errors),
        layers=layers_of(plan, measured.errors),
        predicted_kld=plan.predicted_kld,
        target_kld=plan.spent.budget.kld if plan.spent is not None else None,
        quality=quality,
        coherence=coherence,
        agreement=agreement,
        verdict=overall(quality, coherence, agreement),
        better=better,
        seconds=dict(seconds),
        path=str(work_dir / "report.json"),
        page=str(work_dir / "report.html"),
        **{key: from_plain(_TYPES[key], value, key) for key, value in plain.items()},
    )


def layers_of(plan: Plan, errors: Sequence[TensorError]) -> tuple[Layer, ...]:
    """Every layer, and last what lies outside of them."""
    by_name = {error.tensor: error for error in errors}
    members: dict[int | None, list[PlannedTensor]] = {}
    for planned in plan.tensors:
        members.setdefault(planned.tensor.layer, []).append(planned)
    order = sorted(members, key=lambda layer: (layer is None, layer))
    return tuple(_layer(layer, members[layer], plan.n_bytes, by_name) for layer in order)


def _layer(
    layer: int | None, members: Sequence[PlannedTensor], total_bytes: int, errors: Mapping[str, TensorError]
) -> Layer:
    matrices = [planned for planned in members if planned.tensor.quantizable and planned.tensor.name in errors]
    total = sum(planned.tensor.n_weights for planned in matrices)
    formats: Counter[str] = Counter()
    for planned in matrices:
        formats[planned.format] += planned.tensor.n_weights

    def mean(kind: str) -> float:
        weighed = (getattr(errors[planned.tensor.name], kind) * planned.tensor.n_weights for planned in matrices)
        return sum(weighed) / total if total else 0.0

    n_bytes, n_weights = sum(p.n_bytes for p in members), sum(p.tensor.n_weights for p in members)
    return Layer(
        layer=layer,
        weights=n_weights,
        bytes=n_bytes,
        bits_per_weight=n_bytes * 8 / n_weights,
        share=n_bytes / total_bytes,
        formats={name: count / total for name, count in formats.most_common()},
        relative_error=mean("relative_error"),
        weighted_error=mean("weighted_error"),
    )
