"""How small and how large a file can be whose formats are chosen by measurements that nobody has made: from headers."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from bitwright.converter.artifact.naming import default_imatrix_name
from bitwright.converter.artifact.run import Run
from bitwright.converter.artifact.target import Prepared
from bitwright.converter.job.options import flag, negated, option_of
from bitwright.converter.measure.sensitivity import measurable_tensors
from bitwright.formats.errors import ConvertError
from bitwright.formats.registry import FORMATS
from bitwright.profiles.evidence import Evidence
from bitwright.profiles.planning.allocate import Unmeetable
from bitwright.profiles.reading.budget import Budget
from bitwright.profiles.sizes import size_text

Decide = Callable[[Run, Evidence], Prepared[Any]]

# Goals that every plan meets.
_ANY_KLD, _ANY_SIZE = 1e300, 1 << 62
_IN_NO_RECIPE = ("work_dir", "cache", "cache_size", "threads", "events")


@dataclass(frozen=True)
class Bounds:
    """smallest_bytes, largest_bytes: of the whole artifact, with bits_per_weight of each. asked_bytes: what the goal
    comes to, None for a goal in divergence. missing: what is to be measured. command: that measures it; options: what
    then makes the plan."""

    smallest_bytes: int
    smallest_bits: float
    largest_bytes: int
    largest_bits: float
    asked_bytes: int | None
    missing: tuple[str, ...]
    command: str
    options: str

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {each.name: getattr(self, each.name) for each in fields(self)} | {"missing": list(self.missing)}


def size_bounds(run: Run, decide: Decide) -> Bounds:
    """Of a run whose budget has a goal of its own. decide: the plan of a run by evidence; here by what stands for it,
    in which a format of more bits costs less.

    Raises ConvertError for a size that no choice of formats meets.
    """
    budget = run.job.profile.budget
    assert budget is not None
    evidence = _by_headers(run)
    smallest = decide(_aiming(run, kld=_ANY_KLD), evidence)
    largest = decide(_aiming(run, size=_ANY_SIZE), evidence)
    if budget.limits_size:
        try:
            decide(_aiming(run, size=budget.size, bpw=budget.bpw), evidence)
        except Unmeetable:
            raise _too_small(budget, smallest) from None
    asked = budget.size
    if budget.bpw is not None:
        weights = smallest.plan.n_weights
        asked = int(budget.bpw * weights / 8) + smallest.files.n_bytes - smallest.plan.n_bytes
    return Bounds(
        smallest.files.n_bytes,
        smallest.plan.bits_per_weight,
        largest.files.n_bytes,
        largest.plan.bits_per_weight,
        asked,
        ("sensitivity",) if run.job.imatrix is not None else ("importance", "sensitivity"),
        *_commands(run),
    )


def _by_headers(run: Run) -> Evidence:
    """For every tensor that will be measured, losses that fall with the bits."""
    losses = {name: 1.0 / kind.bits_per_weight for name, kind in FORMATS.items()}
    layers = {tensor.layer for tensor in run.model_map.tensors if tensor.layer is not None}
    return Evidence(
        {tensor.name: losses for tensor in measurable_tensors(run.model_map)}, dict.fromkeys(layers, 0.0), "headers"
    )


def _aiming(run: Run, size: int | None = None, bpw: float | None = None, kld: float | None = None) -> Run:
    profile = run.job.profile
    assert profile.budget is not None
    budget = replace(profile.budget, size=size, bpw=bpw, kld=kld, mix=None)
    return replace(run, job=replace(run.job, profile=replace(profile, budget=budget)))


def _too_small(budget: Budget, smallest: Prepared[Any]) -> ConvertError:
    least, bits = smallest.files.n_bytes, smallest.plan.bits_per_weight
    goal = size_text(budget.size) if budget.size is not None else f"{budget.bpw:.4g} bits per weight"
    return ConvertError(
        f"no choice of formats is that small: {goal} is asked for, and the smallest file takes {size_text(least)}"
        f" ({bits:.2f} bits per weight)",
        budget.where,
        f"ask for more; or choose a smaller model; or let the profile {smallest.plan.profile!r} go lower (its floors,"
        " its formats, --set)",
    )


def _commands(run: Run) -> tuple[str, str]:
    """The command that measures what is missing, and the options that give it to the plan then."""
    job = run.job
    given = job.imatrix
    matrix = given or Path(default_imatrix_name(run.checkpoint, run.model_map))
    words = ["bitwright", "imatrix", "--sensitivity", "--output", str(matrix.with_suffix(".gguf"))]
    if given is not None:
        words[-1] = str(matrix.with_name(f"{matrix.stem}-measured.gguf"))
    for field in fields(job):
        option, value = option_of(field), getattr(job, field.name)
        if "imatrix" not in option.commands or value == field.default or field.name in _IN_NO_RECIPE:
            continue
        words += (
            [flag(field) if value else negated(flag(field))] if isinstance(value, bool) else [flag(field), str(value)]
        )
    measured = Path(words[4])
    options = [
        "--imatrix",
        str(given or measured),
        "--sensitivity",
        str(measured.with_suffix(".sensitivity.safetensors")),
    ]
    return shlex.join([*words, job.model]), shlex.join(options)
