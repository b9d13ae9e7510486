"""What is known of a job before anything runs: the model surveyed, the plan as far as it rests on no measurement, a
forecast.
"""

from dataclasses import replace
from typing import Any

from bitwright.calibration.control import ShouldStop, never
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.calibration.text.corpus import resolve_corpus
from bitwright.converter.artifact.run import Run
from bitwright.converter.artifact.target import Prepared, Target
from bitwright.converter.directory.target import DirectoryTarget
from bitwright.converter.forecast.forecast import Foreseen, foresee
from bitwright.converter.forecast.rates import Rates
from bitwright.converter.gguf.bounds import Bounds, size_bounds
from bitwright.converter.gguf.target import GgufTarget
from bitwright.converter.job.identity import job_fingerprint
from bitwright.converter.job.job import Job
from bitwright.converter.job.progress import Progress
from bitwright.converter.job.work_directory import UNDECIDED, default_work_dir
from bitwright.converter.measure.calibrate import check_importance, planned_importance
from bitwright.converter.measure.evidence import analysis_is_needed, available_evidence, given_evidence
from bitwright.converter.measure.obstacles import Need, obstacle_to_analysis
from bitwright.converter.measure.published import with_published
from bitwright.converter.measure.statistics_directory import given_statistics, gives_importance
from bitwright.converter.preflight import check_samples
from bitwright.converter.source.open import open_checkpoint
from bitwright.profiles.evidence import Evidence
from bitwright.profiles.planning.labels import sized_like_its_mix
from bitwright.profiles.planning.plan import Plan

TARGETS: dict[str, Target[Any, Any]] = {"gguf": GgufTarget(), "safetensors": DirectoryTarget()}
"""What a profile's target makes."""

_EMBEDS = (
    "the model embeds texts and predicts no tokens: what is proved of the artifact is the error of every tensor, and no"
    " perplexity, divergence or generated text is measured"
)
_BEFORE_ANALYSIS = (
    "this is the plan of the rules alone: a run measures first what each format costs every tensor, and spends the same"
    " bytes, at most, where they save most; --no-analysis stays with the rules"
)
_BEFORE_REFINEMENT = "this is the plan that --refine begins with: it is measured as a whole first, and corrected"


def survey(job: Job, progress: Progress | None = None, should_stop: ShouldStop = never) -> Run:
    """source and describe: reads headers, configuration and tokenizer, and no weight. Quiet without a progress."""
    check_samples(job.samples, job.sequence_length)
    given_statistics(job)  # that there are some
    job = job.aimed()
    checkpoint = open_checkpoint(job.model, metadata_only=True, from_quantized=job.from_quantized, base=job.base)
    checkpoint = replace(checkpoint, by_content=job.extent != "whole")
    target = TARGETS[job.profile.target]
    model_map = target.describe(job, checkpoint)
    job = replace(job, profile=sized_like_its_mix(job.profile, model_map))
    output, notes = target.located(job, checkpoint, model_map)
    notes = (*_naming_notes(job), *notes)
    if job.judge != "off" and not model_map.predicts_tokens:
        job = replace(job, judge="off")
        notes = (*notes, _EMBEDS)
    would_measure = job.profile.has_rules_instead and job.sensitivity is None and not job.refine
    if would_measure and (why := obstacle_to_analysis(checkpoint, model_map.predicts_tokens)):
        job = replace(job, profile=job.profile.by_rules())
        notes = (*notes, f"the rules of {job.profile.name} decide, and no measurement: {why}")
    work_dir = job.work_dir or default_work_dir(output)
    job = replace(job, output=output, work_dir=work_dir)
    run = Run(job, output, work_dir, checkpoint, model_map, progress or Progress(quiet=True), should_stop, notes)
    run = with_published(run)
    job = run.job
    analyses = job.sensitivity is None or job.refine > 0
    return _with_corpus(run, even_with_imatrix=analyses) if job.profile.needs_sensitivity else run


def _naming_notes(job: Job) -> list[str]:
    """What a profile is that was asked for by a name that people have for it."""
    profile = job.profile
    notes = [f"--profile {profile.asked_as} is the profile {profile.name}"] if profile.asked_as else []
    if profile.budget is not None and profile.budget.mix is not None:
        notes.append(
            f"formats chosen by what they are measured to cost, at {profile.budget.bpw:.2f} bits per weight: as many as"
            f" llama.cpp's {profile.budget.mix} takes of this model"
        )
    return notes


def _with_corpus(run: Run, even_with_imatrix: bool = False) -> Run:
    """The same with the text of its calibration: decided once, as the network may come and go while the job runs.

    even_with_imatrix: sensitivity is measured on that text, super weights are looked for on it, and error feedback
    takes the moments of its inputs, even where the importance is given."""
    job = run.job
    if (job.imatrix is not None and not even_with_imatrix) or job.calibration is not None:
        return run
    corpus, reason = resolve_corpus(None)
    note = f"calibration on {corpus}: {reason}"
    return replace(run, job=replace(job, calibration=corpus), notes=(*run.notes, note))


def decide(run: Run, evidence: Evidence | None) -> Prepared[Any]:
    """plan: by the profile, and by the evidence where the profile decides by any. A function of these alone: with
    corrected evidence it makes a corrected plan."""
    job, target = run.job, TARGETS[run.job.profile.target]
    importance = None
    if job.profile.needs_sensitivity or job.imatrix is not None:
        importance = _weighed_importance(run, evidence)
    planned = target.plan(run, evidence, importance)
    if importance is None and planned.needs_statistics:
        run = _with_corpus(run)
        importance = _weighed_importance(run, evidence)
    elif planned.reads_text_later:
        run = _with_corpus(run, even_with_imatrix=True)
    notes = (*run.notes, *planned.notes)
    if job.imatrix is not None and importance is not None:
        check_importance(importance, run.model_map, planned.plan, str(job.imatrix))
        if importance.model not in (None, run.checkpoint.model_id):
            notes += (f"{job.imatrix} was computed of {importance.model}, and this model is {run.checkpoint.model_id}",)
    prepared = Prepared(run, target, planned.plan, importance, notes, planned.reads_text_later)
    if job.shard_bytes is not None and not prepared.reads_text_later and len(prepared.files.layouts) == 1:
        # A limit that nothing reaches makes no other job.
        prepared = replace(prepared, run=replace(run, job=replace(run.job, shard_bytes=None)))
    return prepared


def _weighed_importance(run: Run, evidence: Evidence | None) -> ImportanceMatrix:
    """What is planned to be used, with the costs of columns where these were measured."""
    importance = planned_importance(run)
    return importance if evidence is None else importance.with_costs(evidence.columns)


def prepare(job: Job) -> Prepared[Any]:
    """The plan of a job before anything runs: a dry run. Where sensitivity is still to be measured, that of the rules
    which tell the size.

    Raises ConvertError for a profile that decides by measured sensitivity alone when that has not been measured yet.
    """
    run = survey(job)
    prepared, _ = prepared_or_ruled(run)
    if prepared is None:
        raise analysis_is_needed(run.job)
    return prepared


def prepared_or_ruled(run: Run) -> tuple[Prepared[Any] | None, bool]:
    """The plan that is known before anything runs; or the one that an analysis begins with, and True; or None."""
    if (prepared := known_beforehand(run)) is not None:
        return prepared, False
    if run.job.refine and (evidence := given_evidence(run)) is not None:
        return decide(replace(run, notes=(*run.notes, _BEFORE_REFINEMENT)), evidence), True
    return ruled(run), True


def bounds_of(run: Run) -> Bounds:
    """How small and how large the artifact can be, of a run whose budget has a goal that nothing is measured for.
    Raises ConvertError for a size that cannot be met."""
    budget = run.job.profile.budget
    if budget is None or budget.as_rules or not budget.has_goal:
        raise analysis_is_needed(run.job)
    return size_bounds(run, decide)


def ruled(run: Run) -> Prepared[Any] | None:
    """The plan of the rules alone, of a job whose profile has such; None for others. What is measured gives a plan of
    as many bytes at most, but for the header."""
    if not run.job.profile.has_rules_instead or run.job.refine:
        return None
    return decide(_by_rules(run, _BEFORE_ANALYSIS), None)


def _by_rules(run: Run, *notes: str) -> Run:
    return replace(run, job=replace(run.job, profile=run.job.profile.by_rules()), notes=(*run.notes, *notes))


def gain_of_analysis(run: Run, evidence: Evidence, chosen: Plan) -> str | None:
    """What the analysis has bought; None for a profile without rules to stand beside."""
    if not run.job.profile.has_rules_instead:
        return None
    by_rules, by_choice = decide(_by_rules(run), evidence).plan.predicted_kld, chosen.predicted_kld
    if by_rules is None or by_choice is None:
        return None
    return (
        f"predicted mean KL divergence: {by_rules:.4g} by the rules of {run.job.profile.name}, {by_choice:.4g} with the"
        " same bytes spent by what was measured"
    )


def known_beforehand(run: Run, in_work_dir: bool = True) -> Prepared[Any] | None:
    """What is known before anything runs; None where the plan rests on an analysis that is still to be made.

    in_work_dir: an earlier run's analysis in the work directory counts."""
    evidence = available_evidence(run, in_work_dir)
    if evidence is None and run.job.profile.needs_sensitivity:
        return None
    return decide(run, evidence)


def fingerprint(run: Run, prepared: Prepared[Any] | None) -> dict[str, Any]:
    """What decides the artifact's bytes: finished work is reused only where all of it is the same. prepared: None where
    the plan rests on an analysis that is still to be made."""
    job, checkpoint = run.job, run.checkpoint
    if prepared is not None:
        plan, importance = prepared.plan.digest(), prepared.importance
        moments_of = job.calibration if prepared.plan.error_feedback else None
    else:
        plan, importance = UNDECIDED, planned_importance(run)
        moments_of = UNDECIDED
    corpus = importance.corpus if importance else None
    decided = {"output": UNDECIDED} if job.extent == "beginning" else {}
    return job_fingerprint(job, checkpoint, plan=plan, calibration=corpus, moments=moments_of, **decided)


def forecast(run: Run, prepared: Prepared[Any] | None, rates: Rates | None = None) -> Foreseen:
    """What a job will take. prepared: as of fingerprint. rates: those of its machine, read where they are not given."""
    by_rules = ruled(run) if prepared is None else None
    return foresee(run, prepared, by_rules, bool(needs_of(run.job, prepared)), rates or Rates.of_job(run.job))


def needs_of(job: Job, prepared: Prepared[Any] | None) -> list[Need]:
    """What the model is run for. prepared: as of fingerprint."""
    analysed = prepared is None
    needs = {
        Need.IMPORTANCE: not gives_importance(job) and (prepared is None or prepared.importance is not None),
        Need.SENSITIVITY: analysed and job.sensitivity is None,
        Need.TEXT: prepared is not None and prepared.reads_text_later,
        Need.QUALITY: job.judge != "off",
    }
    return [need for need, needed in needs.items() if needed]
