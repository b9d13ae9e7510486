"""The stage `adapt` of a safetensors directory: outliers of the activations are moved into the weights, schemes that
the inputs cannot bear fall back, and static scales get their ranges."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from calibration.activation_ranges import RangeMethod, static_range
from calibration.activations import ActivationStatistics
from calibration.control import ShouldStop
from calibration.importance import ImportanceMatrix
from calibration.smoothing import SmoothQuantConfig
from converter.job import Job
from converter.kv_cache import CacheScale, cache_notes, cache_scales
from converter.modules import gguf_names, stored_dtypes
from converter.progress import Progress
from converter.smooth import observe, smooth
from converter.target import Adapted, Prepared
from profiles.modules import EXPERT_ROLES, PlannedModule, fused_groups, given_schemes
from profiles.plan import Plan
from profiles.precision import Context, PrecisionChoice, choose_precisions
from profiles.vocabulary import TensorSpec

# The index of an expert in the name of its matrix.
_EXPERT = re.compile(r"\.\d+\.(?=[^.]+\.weight$)")


@dataclass(frozen=True)
class ActivationFindings:
    """ranges: tensor -> least and largest input that is represented, for static scales. caches: the scales of caches.
    report: for report.json."""

    ranges: Mapping[str, tuple[float, float]]
    caches: tuple[CacheScale, ...]
    report: dict[str, Any]


NOTHING = ActivationFindings({}, (), {"smoothing": None, "activations": None, "precision": [], "kv_cache": []})


def smoothing_of(job: Job) -> SmoothQuantConfig | None:
    """What the job's options or its profile ask for."""
    if job.alpha is not None:
        return SmoothQuantConfig(job.alpha)
    rules = job.profile.activations
    return SmoothQuantConfig(rules.alpha) if rules.smooth else None


def uses_activations(job: Job, plan: Plan) -> bool:
    """Whether the inputs of the matrices, or what goes into the caches, have to be looked at."""
    static = any(isinstance(row, PlannedModule) and row.uses_activations for row in plan.tensors)
    return static or any(row.cache_scales for row in plan.tensors) or smoothing_of(job) is not None


def adapt_activations(
    prepared: Prepared,
    importance: ImportanceMatrix | None,
    work_dir: Path,
    progress: Progress,
    should_stop: ShouldStop,
) -> Adapted:
    """The job with smoothed weights, schemes that its activations bear, the ranges of static scales, and the scales of
    caches. Statistics and factors stay in the work directory."""
    job, plan = prepared.job, prepared.plan
    if not uses_activations(job, plan):
        return Adapted(prepared, importance, NOTHING)
    report: dict[str, Any] = {"smoothing": None}
    config = smoothing_of(job)
    errors: Mapping[str, float] = {}
    if config is None:
        seen = observe(job, prepared.checkpoint, prepared.model_map, work_dir, progress, should_stop)
    else:
        static = _static_tensors(prepared)
        smoothed = smooth(job, prepared.checkpoint, prepared.model_map, config, work_dir, progress, should_stop, static)
        seen, given = smoothed.activations, importance if job.imatrix is not None else None
        importance = seen.importance() if given is None else given.divided(smoothed.smoothing.factors)
        errors = smoothed.errors
        prepared = replace(prepared, checkpoint=smoothed.checkpoint)
        report["smoothing"] = {
            "alpha": config.alpha,
            "groups": [group.to_dict() for group in smoothed.groups],
            "left": list(smoothed.left),
        }
    plan, choices = _adapted_plan(prepared, seen, errors)
    names = gguf_names(prepared.model_map)
    ranges = {
        row.tensor.name: _range(job, row, seen, names)
        for row in plan.tensors
        if isinstance(row, PlannedModule) and row.uses_activations
    }
    report["activations"] = [
        {"tensor": name, **asdict(inputs.figures())} for name, inputs in sorted(seen.inputs.items())
    ]
    report["precision"] = [asdict(choice) for choice in choices]
    caches = cache_scales(plan, seen)
    report["kv_cache"] = [scale.to_dict() for scale in caches]
    notes = (
        *seen.notes(),
        *(f"{c.tensor}: {c.scheme} instead of {c.wanted}: {c.reason}; {c.alternative} keeps it" for c in choices),
        *cache_notes(caches),
    )
    return Adapted(replace(prepared, plan=plan), importance, ActivationFindings(ranges, tuple(caches), report), notes)


def _static_tensors(prepared: Prepared) -> set[str]:
    """GGUF tensors whose inputs the plan rounds to INT8 under a stored scale."""
    names = gguf_names(prepared.model_map)
    return {
        names[row.tensor.name][0]
        for row in prepared.plan.tensors
        if isinstance(row, PlannedModule) and row.scheme is not None and row.tensor.name in names
        if row.scheme.activations is not None
        if row.scheme.activations.type == "int" and row.scheme.activations.dynamic is False
    }


def _adapted_plan(
    prepared: Prepared, seen: ActivationStatistics, errors: Mapping[str, float]
) -> tuple[Plan, list[PrecisionChoice]]:
    """The plan after fallbacks, what fell back, and what went along, under the names by which `--set` finds it.
    errors: GGUF tensor -> error of its output in INT8, of those that were measured."""
    job, plan = prepared.job, prepared.plan
    rules = job.profile.activations
    if not rules.adapt:
        return plan, []
    rows = {row.tensor.name: row for row in plan.tensors if isinstance(row, PlannedModule) and row.scheme is not None}
    wanted: dict[str, str] = {}
    sources: dict[str, list[str]] = {}
    tensors: dict[str, TensorSpec] = {}
    for tensor in prepared.model_map.tensors:
        mine = [name for name in tensor.sources if name in rows]
        if mine and tensor.layer is not None:
            pattern = mine[0] if len(mine) == 1 else _EXPERT.sub(".*.", mine[0])
            wanted[pattern], sources[pattern], tensors[pattern] = rows[mine[0]].format, mine, tensor
    overridden = [
        pattern
        for pattern, mine in sources.items()
        if any(rule.matches(rows[mine[0]].tensor, prepared.model_map.n_layers) for rule in job.overrides)
    ]
    choices = choose_precisions(
        wanted,
        {pattern: tensor.role for pattern, tensor in tensors.items()},
        {pattern: seen.inputs[t.name].figures() for pattern, t in tensors.items() if t.name in seen.inputs},
        Context(rules.phase, rules.prompt_tokens, seen.sequence_length, rules.kv_cache == "FP8"),
        overridden,
        {pattern: errors[tensor.name] for pattern, tensor in tensors.items() if tensor.name in errors},
    )
    fallen = [choice for choice in choices if choice.fell_back]
    changed = {name: (choice.scheme, choice.reason) for choice in fallen for name in sources[choice.tensor]}
    adapted = given_schemes(plan, changed, stored_dtypes(prepared.checkpoint))
    return adapted, [*fallen, *_gone_along(plan, adapted, sources, fallen)]


def _gone_along(
    plan: Plan, adapted: Plan, sources: Mapping[str, list[str]], fallen: list[PrecisionChoice]
) -> list[PrecisionChoice]:
    """What changed because it is multiplied as one with what fell back, be it that the user has named its scheme."""
    before = {row.tensor.name: row for row in plan.tensors}
    after = {row.tensor.name: row for row in adapted.tensors}
    fused = {name: group for group in fused_groups(plan) for name in group}
    fell = {name: choice for choice in fallen for name in sources[choice.tensor]}
    found = []
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
        found.append(PrecisionChoice(pattern, row.format, wanted, row.reason.rpartition("; ")[2], alternative))
    return found


def _range(
    job: Job, row: PlannedModule, seen: ActivationStatistics, names: Mapping[str, tuple[str, int]]
) -> tuple[float, float]:
    tensor, matrix = names[row.tensor.name]
    scheme = row.scheme
    assert scheme is not None and scheme.activations is not None
    method: RangeMethod = job.activation_scales or job.profile.activations.scales
    if scheme.activations.dynamic == "local":
        method = "absmax"  # the stored scale only places those of the groups
    return static_range(
        seen.of(tensor),
        matrix,
        method,
        grid="int8" if scheme.activations.type == "int" else "fp8",
        symmetric=scheme.activations.symmetric,
    )
