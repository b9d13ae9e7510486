"""Whether the artifact is fit for use, in one word, and the command of a better recipe where it is not."""

import shlex
from collections.abc import Callable

from bitwright.calibration.evaluation.quality import QualityReport
from bitwright.converter.artifact.grades import DAMAGED, DISAGREES, GRADES, LOSSY, Grade, TextGrade
from bitwright.converter.artifact.run import Run
from bitwright.converter.job.recipe import IMPORTANCE_FILE
from bitwright.converter.report.data import Agreement, Coherence, Report
from bitwright.converter.report.text import figure, figures_text, loss_text
from bitwright.formats.errors import ConvertError
from bitwright.profiles.planning.plan import Plan
from bitwright.profiles.reading.schema import QuantizationProfile, load_profile, preset_names

EXIT_CODE = 3

# What an artifact of each grade keeps to, the last one but "damaged": mean KL divergence in nats a token, same top
# token, perplexity beside the source's. Of llama.cpp's mixes of Llama-3-8B, Q6_K is near-lossless by its divergence,
# Q4_K_M good, Q3_K_M fair, Q2_K lossy. The two others are beyond what goes with such a divergence, so that they decide
# where the mean hides something.
_LIMITS: dict[Grade, tuple[float, float, float]] = {
    "near-lossless": (0.01, 0.92, 1.03),
    "good": (0.05, 0.82, 1.1),
    "fair": (0.15, 0.72, 1.3),
    "lossy": (0.5, 0.5, 2.0),
}
# What is left to an artifact whose text does not hold together.
_OF_TEXT: dict[TextGrade, Grade] = {
    "coherent": "near-lossless",
    "noticeable": "lossy",
    "severe": "damaged",
    "failed": "damaged",
}
MEANINGS: dict[Grade, str] = {
    "near-lossless": "hardly to be told from the source",
    "good": "close to the source",
    "fair": "works, with a loss that benchmarks show",
    "lossy": "works, and whoever knows the source sees the difference",
    "damaged": "should not be used as it is",
}
# How much larger a better recipe has to be, at least, to be worth the work.
_LARGER: dict[Grade, float] = {LOSSY: 1.1, DAMAGED: 1.25}
# Formats that only models trained for them survive, or that hardware asks for: nobody is sent there.
_SPECIAL = ("TQ1_0", "TQ2_0", "Q1_0", "Q2_0", "NVFP4", "MXFP4")


def overall(quality: QualityReport | None, coherence: Coherence | None, agreement: Agreement | None) -> Grade | None:
    """The worst of what the divergence says, of what was generated, and of what the runtime computes; None where
    nothing was measured."""
    grades: list[Grade] = [grade_of_loss(quality)] if quality is not None else []
    if coherence is not None:
        grades.append(_OF_TEXT[coherence.verdict])
    if agreement is not None and agreement.verdict == DISAGREES:
        # Where a runtime is known to compute something else (marks of some scripts, ends beyond the three that a file
        # can state) spoils nothing: it is said with the plan or the report.
        grades.append(DAMAGED)
    return max(grades, key=GRADES.index, default=None)


def grade_of_loss(quality: QualityReport) -> Grade:
    """What divergence, top token and perplexity say of the artifact, the worst of the three; what is not finite is
    damaged."""
    kld, perplexity, of_source = quality.mean_kld, quality.perplexity, quality.source_perplexity
    if kld is None or perplexity is None or of_source is None:
        return DAMAGED
    for grade, (most_kld, least_top1, most_perplexity) in _LIMITS.items():
        within = kld < most_kld and quality.top1_agreement >= least_top1
        if within and perplexity < most_perplexity * of_source:
            return grade
    return DAMAGED


def is_damaged(verdict: Grade | None) -> bool:
    return verdict == DAMAGED


def needs_better(verdict: Grade | None) -> bool:
    """Whether what was lost is worth a warning and a larger artifact."""
    return verdict in _LARGER


def verdict_line(report: Report) -> str:
    """The verdict with what it rests on, in one line."""
    if report.verdict is None:
        return "Verdict: not measured (--judge off)"
    if report.quality is None:
        return f"Verdict: {report.verdict}, {MEANINGS[report.verdict]}"
    return f"Verdict: {report.verdict} ({figures_text(report.quality)})"


def warning(report: Report) -> str | None:
    """What to tell about the verdict and what to do; None when there is nothing to tell."""
    if report.verdict is None or not needs_better(report.verdict):
        return None
    lines = [f"the model is {report.verdict}: it {MEANINGS[report.verdict]}"]
    lines += [f"  {reason}" for reason in findings(report)]
    if report.better:
        lines.append(f"  a better recipe: {report.better}")
    return "\n".join(lines)


def quality_warning(quality: QualityReport, target: str) -> str | None:
    """What to tell about a quality loss, and what to do; None when there is nothing to tell. target: of the profile
    that made the artifact."""
    grade = grade_of_loss(quality)
    if not needs_better(grade):
        return None
    finer = "balanced-4bit, or raise one role: --set 'mlp_down=Q5_K'"
    if target == "safetensors":
        finer = "fp8, or keep one role: --set 'mlp_down=BF16'"
    loss = loss_text(quality)
    return f"the model is {grade}: {loss}; a finer profile costs more bytes and loses less: --profile {finer}"


def agreement_warning(agreement: Agreement | None) -> str | None:
    """What to tell of a runtime that differs from our evaluation; None when there is nothing to tell."""
    if agreement is None or not agreement.reasons:
        return None
    kind = "computes something else than this model" if agreement.verdict == DISAGREES else "differs in part"
    return f"{agreement.runtime} {kind}: {'; '.join(agreement.reasons)}"


def missed_target(report: Report) -> str | None:
    """What to tell of a divergence that was asked for and is exceeded; None when there is nothing to tell."""
    quality, target, predicted = report.quality, report.target_kld, report.predicted_kld
    if quality is None or target is None or predicted is None:
        return None
    if quality.mean_kld is not None and quality.mean_kld <= target:
        return None
    return (
        f"the mean KL divergence is {figure(quality.mean_kld, '.4g')} as measured, above the {target:g} that was"
        f" asked for; {predicted:.4g} was predicted. Ask for a lower one, or correct the prediction:"
        " --refine 2"
    )


def findings(report: Report) -> list[str]:
    """A sentence for each thing that is wrong with the predictions, with what the runtime computes, and with what was
    generated."""
    quality, coherence = report.quality, report.coherence
    lines = [loss_text(quality)] if quality is not None and needs_better(grade_of_loss(quality)) else []
    if warned := agreement_warning(report.agreement):
        lines.append(warned)
    if coherence is None:
        return lines
    if failed := coherence.runtime_note.get("failed"):
        lines.append(f"llama.cpp does not run the artifact: {failed}")
    if n := coherence.held_out_not_finite:
        total = coherence.greedy_prompts
        lines.append(f"{n} of {total} continuations of held-out text end where the predictions are not finite")
    troubled = [answer for answer in coherence.prompts if answer.problems]
    if troubled:
        if coherence.verdict == "failed":
            lines.append("it no longer writes text")
        kinds = sorted({problem.kind for answer in troubled for problem in answer.problems})
        worst = max(troubled, key=lambda answer: len(answer.problems))
        shown = worst.text if len(worst.text) <= 60 else worst.text[:57] + "..."
        lines.append(
            f"{len(troubled)} of {len(coherence.prompts)} answers do not hold together ({', '.join(kinds)});"
            f" to {worst.prompt!r} it writes {shown!r}"
        )
    return lines


def better_recipe(
    run: Run,
    plan_of: Callable[[QuantizationProfile], Plan],
    name_of: Callable[[QuantizationProfile], str],
    plan: Plan,
    verdict: Grade | None,
) -> str | None:
    """The command of the smallest preset that is enough larger; None where there is no need or none such.

    plan_of: a profile's plan for the same model; raises ConvertError for one that needs more than the model. name_of:
    the name of its artifact."""
    if verdict is None or not needs_better(verdict):
        return None
    job = run.job
    finer = [
        (candidate.n_bytes, profile.name, profile)
        for profile in map(load_profile, preset_names())
        if profile.target == job.profile.target and profile.base not in _SPECIAL
        if (candidate := _plan(profile, plan_of)) is not None and candidate.n_bytes >= _LARGER[verdict] * plan.n_bytes
    ]
    if not finer:
        return None
    _, name, profile = min(finer, key=lambda each: each[:2])
    output = run.output.with_name(name_of(profile))
    if output == run.output:  # two sizes that are called after one mix
        output = run.output.with_name(f"{name}-{output.name}")
    importance = job.imatrix or run.work_dir / IMPORTANCE_FILE
    given = ["--imatrix", str(importance)] if importance.exists() else []
    stays = {
        "--calibration": job.calibration,
        "--pre-tokenizer": job.pre_tokenizer,
        "--split-size": job.shard_bytes,
    }
    for option, value in stays.items():
        given += [option, str(value)] if value is not None else []
    return shlex.join(["bitwright", "--profile", name, *given, "--output", str(output), job.model])


def _plan(profile: QuantizationProfile, plan_of: Callable[[QuantizationProfile], Plan]) -> Plan | None:
    """The plan by this profile's rules, where it has any that need nothing but the model."""
    try:
        return plan_of(profile.by_rules())
    except ConvertError:
        return None  # it asks for a target or for a measurement
