"""The recipe of an artifact: what made it, as plain data, and as the command that makes it again."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from calibration.importance import ImportanceMatrix
from converter.checkpoint import Checkpoint
from converter.job import Job, file_sha256, tool_identity
from formats.moment_factor import DAMPING, ORDER
from profiles.budget import Budget
from profiles.plan import Plan
from profiles.schema import load_profile, profile_names

PROTECTION_RESERVE = 4096
"""Bytes of a budget that are kept for what a recipe says of super weights, which are found after the plan is made."""

IMPORTANCE_FILE = "importance.gguf"
# JSON: tensor -> [row over all matrices, column, tolerance] of each pin, and tensor -> [axis, matrix, index, factor] of
# each rescaled row or column.
PINNED_KEY, RESCALED_KEY = "super_weights.pinned", "super_weights.rescaled"
# Fields of a Job that count only where it calibrates, and those of the command that are said even where they are the
# default.
_CALIBRATION_FIELDS = ("calibration", "chat", "samples", "sequence_length", "calibration_dtype")
_CALIBRATION_OPTIONS = [field.replace("_", "-") for field in _CALIBRATION_FIELDS]
_STATED_FIELDS = ("calibration", "samples", "sequence_length", "seed")
# Fields of a Job that do not decide a byte, and those that the command spells in a way of their own.
_LOCAL_FIELDS = ("output", "work_dir", "quality", "lm_eval", "lm_eval_limit", "threads", "command")
_SPELT_FIELDS = ("model", "profile", "overrides", "imatrix", "sensitivity", "shard_bytes")


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
        entries |= {"error_feedback": "rounding in turn and descent", "error_feedback.damping": f"{DAMPING:g}"}
        entries["error_feedback.order"] = ORDER
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
    goals = {"size": budget.size, "bits_per_weight": budget.bpw, "kld": budget.kld}
    assert plan.predicted_kld is not None
    return {
        **{f"budget.{key}": goal for key, goal in goals.items() if goal is not None},
        "budget.formats": " ".join(budget.formats),
        "budget.floors": "\n".join(f"{floor.roles}={floor.format}" for floor in budget.floors),
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
    }


def sensitivity_manifest(path: Path | None) -> dict[str, Any] | None:
    """The sensitivity table that was used; None where none was."""
    if path is None:
        return None
    return {"file": path.name, "path": str(path), "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def reproducing_arguments(job: Job, checkpoint: Checkpoint, reads_text: bool) -> list[str]:
    """What to write after `convert` to get the same bytes: options with their values, --option=value, and the model.
    Files go by their names, wherever they lie. Every field of Job that decides bytes is an option of its own name.

    reads_text: the job runs the model over the calibration text.
    """
    preset = job.profile.name in profile_names() and load_profile(job.profile.name).text == job.profile.text
    arguments = [f"--profile={job.profile.name if preset else profile_file(job.profile.name)}"]
    arguments += [f"--set={(rule.roles or rule.tensors)[0]}={rule.format}" for rule in job.overrides]
    for name, file in (("imatrix", job.imatrix), ("sensitivity", job.sensitivity)):
        if file is not None:
            arguments.append(f"--{name}={file.name}")
    for field in fields(job):
        value = getattr(job, field.name)
        if field.name in (*_LOCAL_FIELDS, *_SPELT_FIELDS) or (field.name in _CALIBRATION_FIELDS and not reads_text):
            continue
        if value == field.default and field.name not in _STATED_FIELDS:
            continue
        option = field.name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        else:
            is_file = field.name == "calibration" and Path(value).expanduser().is_file()
            arguments.append(f"--{option}={Path(value).name if is_file else value}")
    if job.shard_bytes:
        arguments.append(f"--split-size={job.shard_bytes}")
    revision = f"@{checkpoint.revision}" if checkpoint.revision else ""
    return [*arguments, f"{checkpoint.model_id}{revision}"]


def from_files(arguments: list[str], directory: str, files: Mapping[str, str], reads_text: bool) -> list[str]:
    """The same with the profile taken from a directory, and what was measured of the model, instead of measuring it.

    files: by option (imatrix, sensitivity), their names there. reads_text: the calibration text serves for something
    else, too.
    """
    *options, model = arguments
    replaced = []
    for option in options:
        name, _, value = option.partition("=")
        name = name.removeprefix("--")
        if name == "profile":
            replaced.append(f"--profile={directory}/{profile_file(value.removesuffix('.toml'))}")
        elif name not in files and (reads_text or name.removeprefix("no-") not in _CALIBRATION_OPTIONS):
            replaced.append(option)
    return [*replaced, *(f"--{name}={directory}/{file}" for name, file in files.items()), model]


def command_text(arguments: list[str]) -> str:
    """The command as one would type it."""
    words = ["convert"]
    for argument in arguments:
        name, equals, value = argument.partition("=")
        words += [name, value] if equals and name.startswith("--") else [argument]
    return shlex.join(words)


def profile_file(name: str) -> str:
    return f"{name}.toml"
