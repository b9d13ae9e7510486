"""The recipe of an artifact: what made it, as plain data, and as the command that makes it again."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.converter.job.identity import tool_identity
from bitwright.converter.job.job import Job
from bitwright.converter.job.options import flag, negated, option_of
from bitwright.converter.job.spelling import profile_file
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.feedback.moment_factor import DAMPING, ORDER
from bitwright.formats.files.disk import file_sha256
from bitwright.profiles.planning.plan import Plan
from bitwright.profiles.reading.budget import Budget

PROTECTION_RESERVE = 4096
"""Bytes of a budget that are kept for what a recipe says of super weights, which are found after the plan is made."""

IMPORTANCE_FILE = "imatrix.gguf"  # llama.cpp takes a file for no model that has the word in its name
# Both hold JSON: tensor -> [row over all matrices, column, tolerance] of each pin, and tensor -> [axis, matrix, index,
# factor] of each rescaled row or column.
PINNED_KEY, RESCALED_KEY = "super_weights.pinned", "super_weights.rescaled"


def recipe(
    job: Job, checkpoint: Checkpoint, plan: Plan, importance: ImportanceMatrix | None
) -> dict[str, str | int | float]:
    """What the artifact says of its making, under `bitwright.`: nothing in it depends on paths, dates or threads.

    Its length does not depend on the formats that a budget chooses, so that a size is met to the byte."""
    entries: dict[str, str | int | float] = {
        "version": tool_identity(),
        "profile": job.profile.name,
        "profile_toml": job.profile.text,
        "profile_inherited_toml": "\n".join(job.profile.inherited),
        "overrides": "\n".join(rule.text for rule in job.overrides),
        "effort": plan.effort,
        "plan_sha256": plan.digest(),
        "source.model": checkpoint.model_id,
        "source.revision": checkpoint.revision or "",
    }
    if plan.error_feedback:
        entries |= {"error_feedback": plan.error_feedback, "error_feedback.damping": f"{DAMPING:g}"}
        entries["error_feedback.order"] = ORDER
        if job.in_sequence:
            entries["error_feedback.inputs"] = "the artifact's"
        if job.tune:
            entries["tuning.steps"] = job.tune
    if importance is not None:
        entries |= {
            "calibration.model": importance.model or "",
            "calibration.corpus": importance.corpus or "",
            "calibration.corpus_sha256": importance.corpus_sha256 or "",
            "calibration.samples": importance.samples or 0,
            "calibration.sequence_length": importance.sequence_length or 0,
            "calibration.seed": job.seed,
        }
    pinned = {p.tensor.name: [list(astuple(pin)) for pin in p.pins] for p in plan.tensors if p.pins}
    rescaled = {p.tensor.name: [list(astuple(r)) for r in p.tensor.rescaled] for p in plan.tensors if p.tensor.rescaled}
    entries |= {
        PINNED_KEY: json.dumps(pinned) if pinned else "",
        RESCALED_KEY: json.dumps(rescaled) if rescaled else "",
    }
    entries |= {f"sensitivity.{key}": value for key, value in plan.evidence.items()}
    if plan.spent is not None:
        entries |= _budget_entries(plan, plan.spent.budget)
    return {key: value for key, value in entries.items() if value != ""}


def _budget_entries(plan: Plan, budget: Budget) -> dict[str, str | int | float]:
    """The goal, what limited the choice, and what was promised."""
    goals = {"size": budget.size, "data_bytes": budget.data_bytes, "bits_per_weight": budget.bpw, "kld": budget.kld}
    assert plan.predicted_kld is not None
    return {
        **{f"budget.{key}": goal for key, goal in goals.items() if goal is not None},
        "budget.formats": " ".join(budget.formats),
        "budget.floors": "\n".join(floor.text for floor in budget.floors),
        "budget.alike": "\n".join(" ".join(roles) for roles in budget.alike),
        "budget.predicted_kld": plan.predicted_kld,
    }


def importance_name(job: Job) -> str:
    """The name under which an artifact knows its importance matrix."""
    return job.imatrix.name if job.imatrix else IMPORTANCE_FILE


def calibration_manifest(job: Job, importance: ImportanceMatrix | None, work_dir: Path) -> dict[str, Any] | None:
    """The importance matrix that was used, and the text it was computed from; None where none was used.

    Seed and split are known only where the matrix was computed here; of a text file there is no split.
    """
    if importance is None:
        return None
    path = job.imatrix or work_dir / IMPORTANCE_FILE
    split = None if job.calibration and Path(job.calibration).expanduser().is_file() else "train"
    return {
        "file": importance_name(job),
        "path": str(path),
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
        "computed": job.imatrix is None,
        "model": importance.model,
        "corpus": importance.corpus,
        "corpus_sha256": importance.corpus_sha256,
        "samples": importance.samples,
        "sequence_length": importance.sequence_length,
        "seed": job.seed if job.imatrix is None else None,
        "split": split if job.imatrix is None else None,
        "dtype": job.calibration_dtype if job.imatrix is None else None,
    }


def sensitivity_manifest(path: Path | None) -> dict[str, Any] | None:
    """The sensitivity table that was used; None where none was."""
    if path is None:
        return None
    return {"file": path.name, "path": str(path), "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def reproducing_arguments(job: Job, checkpoint: Checkpoint, reads_text: bool) -> list[str]:
    """What to write after `convert` to get the same bytes: options with their values, --option=value, and the model.
    Files go by their names, wherever they lie.

    reads_text: the job runs the model over the calibration text.
    """
    arguments = []
    for field in fields(job):
        option, value = option_of(field), getattr(job, field.name)
        if option.recipe == "never" or (option.of_text and not reads_text):
            continue
        if option.recipe == "changed" and value == field.default:
            continue
        if isinstance(value, bool):
            arguments.append(flag(field) if value else negated(flag(field)))
        else:
            items = value if isinstance(value, tuple) else (value,)
            arguments += [f"{flag(field)}={option.spell(item)}" for item in items]
    revision = f"@{checkpoint.revision}" if checkpoint.revision else ""
    return [*arguments, f"{checkpoint.model_id}{revision}"]


def with_option(arguments: Sequence[str], given: str) -> list[str]:
    """The same with this option, --option=value, in the place of the one of its name, where a job that was asked for it
    would have it."""
    order = [known for field in fields(Job) for known in (flag(field), negated(flag(field)))]
    *options, model = arguments
    name = given.partition("=")[0]
    others = [option for option in options if option.partition("=")[0] != name]
    return [*sorted([*others, given], key=lambda option: order.index(option.partition("=")[0])), model]


def from_files(arguments: list[str], directory: str, files: Mapping[str, str], reads_text: bool) -> list[str]:
    """The same with the profile taken from a directory, and what was measured of the model from files, instead of
    measuring it.

    files: their paths by option (imatrix, sensitivity). reads_text: the calibration text serves for something
    else, too.
    """
    *options, model = arguments
    flags = [flag(field) for field in fields(Job) if option_of(field).of_text]
    of_text = {*flags, *map(negated, flags)}
    replaced = []
    for option in options:
        name, _, value = option.partition("=")
        if name == "--profile":
            replaced.append(f"--profile={directory}/{profile_file(value.removesuffix('.toml'))}")
        elif name.removeprefix("--") not in files and (reads_text or name not in of_text):
            replaced.append(option)
    return [*replaced, *(f"--{name}={file}" for name, file in files.items()), model]


def command_text(arguments: list[str]) -> str:
    """The command as one would type it."""
    words = ["bitwright"]
    for argument in arguments:
        name, equals, value = argument.partition("=")
        words += [name, value] if equals and name.startswith("--") else [argument]
    return shlex.join(words)
