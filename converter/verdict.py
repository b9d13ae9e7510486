"""Whether the artifact is fit for use, in one word, and the command of a better recipe where it is not."""

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from converter.job import Job
from converter.recipe import IMPORTANCE_FILE
from converter.report import figure, loss_degree, loss_text
from formats.errors import ConvertError
from profiles.plan import Plan
from profiles.schema import QuantizationProfile, load_profile, preset_names

# From good to lost; the exit code with --strict is EXIT_CODE from SEVERE on.
COHERENT, NOTICEABLE, SEVERE, FAILED = "coherent", "noticeable", "severe", "failed"
_DEGREES = (COHERENT, NOTICEABLE, SEVERE, FAILED)
EXIT_CODE = 3
# Whether the true runtime computes what our evaluation of the same artifact does: in all that was looked at; but for
# what a runtime is known to do otherwise in places; or not.
AGREES, DIFFERS, DISAGREES = "agrees", "differs", "disagrees"

# How much larger a better recipe has to be, at least, to be worth the work.
_LARGER = {NOTICEABLE: 1.1, SEVERE: 1.25, FAILED: 1.5}
# What a loss of quality says of the model, see report.loss_degree.
_OF_LOSS = {None: COHERENT, "noticeable": NOTICEABLE, "broken": SEVERE, "lost": FAILED}
# What a runtime that computes something else makes of the artifact. What it is known to do otherwise in places (marks
# of some scripts, ends beyond the three that a file can state) is said with the plan or the report and spoils nothing.
_OF_AGREEMENT = {AGREES: COHERENT, DIFFERS: COHERENT, DISAGREES: SEVERE}
# Formats that only models trained for them survive, or that hardware asks for: nobody is sent there.
_SPECIAL = ("TQ1_0", "TQ2_0", "Q1_0", "Q2_0", "NVFP4", "MXFP4")


def overall(
    quality: dict[str, Any] | None, coherence: dict[str, Any] | None, agreement: dict[str, Any] | None
) -> str | None:
    """The worst of what the divergence says, of what was generated, and of what the runtime computes; None where
    nothing was measured."""
    found = [coherence["verdict"]] if coherence is not None else []
    if agreement is not None and agreement["verdict"] is not None:
        found.append(_OF_AGREEMENT[agreement["verdict"]])
    if quality is not None:
        found.append(_OF_LOSS[loss_degree(quality)])
    return max(found, key=_DEGREES.index, default=None)


def is_severe(verdict: str | None) -> bool:
    return verdict in (SEVERE, FAILED)


def not_judged(report: Mapping[str, Any]) -> bool:
    """Whether the system kept ending the runtime that a part of the verdict needs."""
    return report["quality"] is not None and None in (report["coherence"], report["agreement"])


def warning(report: Mapping[str, Any]) -> str | None:
    """What to tell about the verdict and what to do; None when there is nothing to tell."""
    verdict = report["verdict"]
    if verdict in (None, COHERENT):
        return None
    text = {
        NOTICEABLE: "the model has lost noticeably",
        SEVERE: "the model is severely damaged",
        FAILED: "the model has failed: it no longer writes text, or its predictions diverge",
    }[verdict]
    lines = [text, *(f"  {reason}" for reason in findings(report))]
    if report["better"]:
        lines.append(f"  a better recipe: {report['better']}")
    return "\n".join(lines)


def agreement_warning(agreement: Mapping[str, Any] | None) -> str | None:
    """What to tell of a runtime that differs from our evaluation; None when there is nothing to tell."""
    if agreement is None or not agreement["reasons"]:
        return None
    kind = "computes something else than this model" if agreement["verdict"] == DISAGREES else "differs in part"
    return f"{agreement['runtime']} {kind}: {'; '.join(agreement['reasons'])}"


def missed_target(report: Mapping[str, Any]) -> str | None:
    """What to tell of a divergence that was asked for and is exceeded; None when there is nothing to tell."""
    quality, target = report["quality"], report["target_kld"]
    if quality is None or target is None or (quality["mean_kld"] is not None and quality["mean_kld"] <= target):
        return None
    return (
        f"the mean KL divergence is {figure(quality['mean_kld'], '.4g')} as measured, above the {target:g} that was"
        f" asked for; {report['predicted_kld']:.4g} was predicted. Ask for a lower one, or correct the prediction:"
        " --refine 2"
    )


def findings(report: Mapping[str, Any]) -> list[str]:
    """A sentence for each thing that is wrong with the predictions, with what the runtime computes, and with what was
    generated."""
    quality, coherence, agreement = report["quality"], report["coherence"], report["agreement"]
    lines = [loss_text(quality)] if loss_degree(quality) is not None else []
    if warned := agreement_warning(agreement):
        lines.append(warned)
    if coherence is None:
        return lines
    note = coherence["runtime_note"]
    if "failed" in note:
        lines.append(f"llama.cpp does not run the artifact: {note['failed']}")
    if n := coherence["held_out_not_finite"]:
        total = coherence["greedy_prompts"]
        lines.append(f"{n} of {total} continuations of held-out text end where the predictions are not finite")
    troubled = [row for row in coherence["prompts"] if row["problems"]]
    kinds = sorted({problem["kind"] for row in troubled for problem in row["problems"]})
    if troubled:
        worst = max(troubled, key=lambda row: len(row["problems"]))
        shown = worst["text"] if len(worst["text"]) <= 60 else worst["text"][:57] + "..."
        lines.append(
            f"{len(troubled)} of {len(coherence['prompts'])} answers do not hold together ({', '.join(kinds)});"
            f" to {worst['prompt']!r} it writes {shown!r}"
        )
    return lines


def better_recipe(
    job: Job, plan_of: Callable[[QuantizationProfile], Plan], plan: Plan, work_dir: Path, verdict: str | None
) -> str | None:
    """The command of the smallest preset that is enough larger; None where there is no need or none such.

    plan_of: a profile's plan for the same model; raises ConvertError for one that needs more than the model."""
    if verdict not in _LARGER:
        return None
    finer = [
        (found.n_bytes, profile.name)
        for profile in map(load_profile, preset_names())
        if profile.target == job.profile.target and profile.base not in _SPECIAL
        if (found := _plan(profile, plan_of)) is not None and found.n_bytes >= _LARGER[verdict] * plan.n_bytes
    ]
    if not finer:
        return None
    _, name = min(finer)
    assert job.output is not None
    end = ".gguf" if job.profile.target == "gguf" else ""
    stem = job.output.name.removesuffix(end).removesuffix(_suffix(plan.profile))
    output = job.output.with_name(f"{stem}{_suffix(name)}{end}")
    importance = job.imatrix or work_dir / IMPORTANCE_FILE
    given = ["--imatrix", str(importance)] if importance.exists() else []
    stays = {
        "--calibration": job.calibration,
        "--pre-tokenizer": job.pre_tokenizer,
        "--split-size": job.shard_bytes,
    }
    for option, value in stays.items():
        given += [option, str(value)] if value is not None else []
    return shlex.join(["convert", "--profile", name, *given, "--output", str(output), job.model])


def _suffix(profile: str) -> str:
    """How the GGUF naming convention ends the name of a file with this profile."""
    return f"-{profile.replace('-', '_').upper()}"


def _plan(profile: QuantizationProfile, plan_of: Callable[[QuantizationProfile], Plan]) -> Plan | None:
    """The plan by this profile, where it needs nothing but the model."""
    try:
        return plan_of(profile)
    except ConvertError:
        return None  # it asks for a target or for a measurement
