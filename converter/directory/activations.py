"""The stage `adapt` of a safetensors directory: outliers of the activations are moved into the weights, schemes that
the inputs cannot bear fall back, and static scales get their ranges."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from bitwright.calibration.choices import RangeMethod
from bitwright.calibration.statistics.activation_ranges import static_range
from bitwright.calibration.statistics.activations import ActivationStatistics
from bitwright.calibration.statistics.smoothing import SmoothQuantConfig
from bitwright.converter.artifact.target import Prepared
from bitwright.converter.directory.encode import StoredScales
from bitwright.converter.directory.kv_cache import cache_notes, cache_scales
from bitwright.converter.job.job import Job
from bitwright.converter.measure.activations import streamed_activations
from bitwright.converter.measure.statistics_directory import given_activations
from bitwright.converter.model.module_map import gguf_names, stored_dtypes
from bitwright.converter.smoothing.stage import streamed_smoothing
from bitwright.profiles.planning.plan_modules import ModulePlan, fused_groups, given_schemes
from bitwright.profiles.planning.precision import Context, PrecisionChoice, choose_precisions
from bitwright.profiles.vocabulary import EXPERT_ROLES, TensorSpec

# The index of an expert in the name of its matrix.
_EXPERT = re.compile(r"\.\d+\.(?=[^.]+\.weight$)")


@dataclass(frozen=True)
class ActivationFindings:
    """scales: what is stored of the inputs and caches that calibration has seen. report: for report.json. notes: what
    should be said."""

    scales: StoredScales
    report: dict[str, Any]
    notes: tuple[str, ...] = ()


NOTHING = ActivationFindings(
    StoredScales({}, {}), {"smoothing": None, "activations": None, "precision": [], "kv_cache": []}
)


def smoothing_of(job: Job) -> SmoothQuantConfig | None:
    """What the job's options or its profile ask for."""
    if job.alpha is not None:
        return SmoothQuantConfig(job.alpha)
    rules = job.profile.activations
    return SmoothQuantConfig(rules.alpha) if rules.smooth else None


def uses_activations(job: Job, plan: ModulePlan) -> bool:
    """Whether the inputs of the matrices, or what goes into the caches, have to be looked at."""
    stores = any(row.stored_activations is not None or row.cache_scales for row in plan.tensors)
    return stores or smoothing_of(job) is not None


def looks_at_activations(job: Job, plan: ModulePlan) -> bool:
    """Whether the model runs for that; where they are given, it does so for the smoothed model's alone."""
    return uses_activations(job, plan) and (given_activations(job) is None or smoothing_of(job) is not None)


def adapt_activations(prepared: Prepared[ModulePlan]) -> tuple[Prepared[ModulePlan], ActivationFindings]:
    """The job with smoothed weights and schemes that its activations bear; and the ranges of static scales, and the
    scales of caches. Statistics and factors stay in the work directory."""
    run, job = prepared.run, prepared.run.job
    if not uses_activations(job, prepared.plan):
        return prepared, NOTHING
    config = smoothing_of(job)
    errors: Mapping[str, float] = {}
    smoothing: dict[str, Any] | None = None
    if config is None:
        statistics = streamed_activations(run)
    else:
        smoothed = streamed_smoothing(run, config, _static_tensors(prepared))
        statistics, errors = smoothed.activations, smoothed.errors
        given = prepared.importance if job.imatrix is not None else None
        importance = statistics.importance() if given is None else given.divided(smoothed.smoothing.factors)
        prepared = replace(prepared, run=replace(run, checkpoint=smoothed.checkpoint), importance=importance)
        smoothing = {
            "alpha": config.alpha,
            "groups": [group.to_dict() for group in smoothed.groups],
            "left": list(smoothed.unsmoothed),
        }
    plan, choices = _adapted_plan(prepared, statistics, errors)
    caches = cache_scales(plan, statistics)
    scales = StoredScales(_ranges(prepared, plan, statistics), {scale.name: scale.bits for scale in caches})
    inputs = sorted(statistics.inputs.items())
    report = {
        "smoothing": smoothing,
        "activations": [{"tensor": name, **asdict(of_tensor.figures())} for name, of_tensor in inputs],
        "precision": [asdict(choice) for choice in choices],
        "kv_cache": [scale.to_dict() for scale in caches],
    }
    notes = (
        *statistics.notes(),
        *(f"{c.tensor}: {c.scheme} instead of {c.wanted}: {c.reason}; {c.alternative} keeps it" for c in choices),
        *cache_notes(caches),
    )
    return replace(prepared, plan=plan), ActivationFindings(scales, report, notes)


def _static_tensors(prepared: Prepared[ModulePlan]) -> set[str]:
    """GGUF tensors whose inputs the plan rounds to INT8 under a stored scale."""
    names = gguf_names(prepared.run.model_map)
    return {
        names[row.tensor.name][0].tensor
        for row in prepared.plan.tensors
        if row.tensor.name in names and (activations := row.stored_activations) is not None
        if activations.type == "int" and activations.dynamic is False
    }


def _adapted_plan(
    prepared: Prepared[ModulePlan], statistics: ActivationStatistics, errors: Mapping[str, float]
) -> tuple[ModulePlan, list[PrecisionChoice]]:
    """The plan after fallbacks, what fell back, and what went along, under the names by which `--set` finds it.
    errors: GGUF tensor -> error of its output in INT8, of those that were measured."""
    job, model_map, plan = prepared.run.job, prepared.run.model_map, prepared.plan
    rules = job.profile.activations
    if not rules.adapt:
        return plan, []
    rows = {row.tensor.name: row for row in plan.tensors if row.scheme is not None}
    wanted: dict[str, str] = {}
    sources: dict[str, list[str]] = {}
    tensors: dict[str, TensorSpec] = {}
    for tensor in model_map.tensors:
        matrices = [name for name in tensor.sources if name in rows]
        if matrices and tensor.layer is not None:
            pattern = matrices[0] if len(matrices) == 1 else _EXPERT.sub(".*.", matrices[0])
            wanted[pattern], sources[pattern], tensors[pattern] = rows[matrices[0]].format, matrices, tensor
    overridden = [
        pattern
        for pattern, matrices in sources.items()
        if any(rule.matches(rows[matrices[0]].tensor, model_map.n_layers) for rule in job.overrides)
    ]
    choices = choose_precisions(
        wanted,
        {pattern: tensor.role for pattern, tensor in tensors.items()},
        {pattern: statistics.inputs[t.name].figures() for pattern, t in tensors.items() if t.name in statistics.inputs},
        Context(rules.phase, rules.prompt_tokens, statistics.sequence_length, rules.kv_cache == "FP8"),
        overridden,
        {pattern: errors[tensor.name] for pattern, tensor in tensors.items() if tensor.name in errors},
    )
    fallen = [choice for choice in choices if choice.fell_back]
    changed = {name: (choice.scheme, choice.reason) for choice in fallen for name in sources[choice.tensor]}
    adapted = given_schemes(plan, changed, stored_dtypes(prepared.run.checkpoint))
    return adapted, [*fallen, *_gone_along(plan, adapted, sources, fallen)]


def _gone_along(
    plan: ModulePlan, adapted: ModulePlan, sources: Mapping[str, list[str]], fallen: list[PrecisionChoice]
) -> list[PrecisionChoice]:
    """What changed because it is multiplied as one with what fell back, be it that the user has named its scheme."""
    before = {row.tensor.name: row for row in plan.tensors}
    after = {row.tensor.name: row for row in adapted.tensors}
    fused = {name: group for group in fused_groups(plan) for name in group}
    fell = {name: choice for choice in fallen for name in sources[choice.tensor]}
    along = []
    for pattern, (name, *_) in sources.items():
        row, wanted = after[name], before[name].format
        if name in fell or row.format == wanted:
            continue
        with_it = [
            choice
            for other, choice in fell.items()
            if other in fused.get(name, ())
            or (
                before[other].tensor.layer == row.tensor.layer
                and {row.tensor.role, before[other].tensor.role} <= EXPERT_ROLES
            )
        ]
        alternative = " ".join(dict.fromkeys(choice.alternative for choice in with_it))
        along.append(PrecisionChoice(pattern, row.format, wanted, row.reason.rpartition("; ")[2], alternative))
    return along


def _ranges(
    prepared: Prepared[ModulePlan], plan: ModulePlan, statistics: ActivationStatistics
) -> dict[str, tuple[float, float]]:
    """Tensor -> least and largest input that is represented, of every matrix whose scheme stores a scale of them."""
    names, job = gguf_names(prepared.run.model_map), prepared.run.job
    method: RangeMethod = job.activation_scales or job.profile.activations.scales
    ranges = {}
    for row in plan.tensors:
        if (activations := row.stored_activations) is not None:
            place = names[row.tensor.name][0]
            ranges[row.tensor.name] = static_range(
                statistics.of(place.tensor),
                place.matrix,
                "absmax" if activations.dynamic == "local" else method,  # there it only places the groups' scales
                grid="int8" if activations.type == "int" else "fp8",
                symmetric=activations.symmetric,
            )
    return ranges
