"""The whole conversion: the stages in the order they run, each of which leaves its result in the work directory.

source -> describe -> plan -> preflight -> calibrate -> adapt -> encode -> write
       -> verify -> quality -> agreement -> guard -> report

What the stages do to a GGUF and to a safetensors directory is behind the seam of artifact/target.py: `adapt` protects
the super weights of a GGUF, and moves outliers of a directory's activations into its weights.

Where the profile decides by measured sensitivity, the order is calibrate -> analyse -> plan.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bitwright.calibration.control import ShouldStop, never
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.calibration.statistics.second_moments import MomentsLost
from bitwright.calibration.text.corpus import resolve_corpus
from bitwright.converter.artifact.layout import Files
from bitwright.converter.artifact.ownership import (
    Replaceable,
    check_places,
    check_places_free,
    forget_outputs,
    inputs_of,
    locked_output,
)
from bitwright.converter.artifact.run import EarlierArtifact, Run
from bitwright.converter.artifact.target import Adapted, Encoders, Prepared, Target
from bitwright.converter.artifact.writer import JOURNAL
from bitwright.converter.directory.target import DirectoryTarget
from bitwright.converter.finished import describe_job, finished
from bitwright.converter.gguf.target import GgufTarget
from bitwright.converter.job.identity import job_fingerprint
from bitwright.converter.job.job import Job
from bitwright.converter.job.progress import Clock, Progress
from bitwright.converter.job.recipe import IMPORTANCE_FILE
from bitwright.converter.job.work_directory import (
    REPLACEABLE,
    UNDECIDED,
    WorkDirectory,
    default_work_dir,
    stops_cleanly,
)
from bitwright.converter.measure.calibrate import MOMENTS, check_importance, forget_calibration, planned_importance
from bitwright.converter.measure.evidence import (
    analysis_is_needed,
    available_evidence,
    given_evidence,
    streamed_evidence,
)
from bitwright.converter.measure.moments import collects_moments
from bitwright.converter.measure.obstacles import Need, obstacle_to_analysis
from bitwright.converter.measure.published import with_published
from bitwright.converter.preflight import check_samples, preflight, ternary_warning
from bitwright.converter.report.assemble import Measured, assemble
from bitwright.converter.report.data import OnMachine, Report
from bitwright.converter.report.verdict import missed_target, warning
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.files.disk import remove_tree
from bitwright.formats.files.seals import write_sealed
from bitwright.formats.typed import ABSENT, Absent
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


def survey(job: Job, progress: Progress | None = None, should_stop: ShouldStop = never) -> Run:
    """source and describe: reads headers, configuration and tokenizer, and no weight. Quiet without a progress."""
    check_samples(job.samples, job.sequence_length)
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
    prepared = _prepared(run) or _ruled(run)
    if prepared is None:
        raise analysis_is_needed(run.job)
    return prepared


def _ruled(run: Run) -> Prepared[Any] | None:
    """The plan of the rules alone, of a job whose profile has such; None for others. What is measured gives a plan of
    as many bytes at most, but for the header."""
    if not run.job.profile.has_rules_instead or run.job.refine:
        return None
    return decide(_by_rules(run, _BEFORE_ANALYSIS), None)


def _by_rules(run: Run, *notes: str) -> Run:
    return replace(run, job=replace(run.job, profile=run.job.profile.by_rules()), notes=(*run.notes, *notes))


def _gain(run: Run, evidence: Evidence, chosen: Plan) -> str | None:
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


def _prepared(run: Run, in_work_dir: bool = True) -> Prepared[Any] | None:
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


def run(
    job: Job,
    progress: Progress,
    should_stop: ShouldStop = never,
    fresh: bool = False,
    machine: OnMachine | Absent = ABSENT,
    earlier: tuple[EarlierArtifact, ...] = (),
    encoders: Encoders | None = None,
) -> tuple[Prepared[Any], Report]:
    """Do the job, or what is left of it. Returns what was prepared and the report. machine: what the report is to say
    of the machine that the profile was chosen for. earlier: as of Run. encoders: what encodes the tensors, if not this
    process.

    Raises ConvertError (Stopped when should_stop() asked for it); running the same job again continues.
    """
    clock = Clock()
    with _begun(job, progress, should_stop, fresh, clock) as (begun, known, work):
        if known is not None and (done := finished(known)) is not None:
            return done
        prepared = known or _analyse(begun, work, clock)
        prepared = replace(prepared, run=replace(prepared.run, earlier=earlier))
        prepared, report = _run_stages(prepared, clock, machine, encoders or prepared.target.encoder)
    for text in filter(None, (missed_target(report), warning(report))):
        progress.say(f"warning: {text}")
    return prepared, report


def measure(job: Job, progress: Progress, should_stop: ShouldStop = never, fresh: bool = False) -> Prepared[Any]:
    """Do what of the job comes before its tensors are encoded, or what is left of that. Its results stay in the work
    directory, where `measured` finds them. Raises as `run` does."""
    clock = Clock()
    with _begun(job, progress, should_stop, fresh, clock) as (begun, known, work):
        prepared = known or _analyse(begun, work, clock)
        _adapted(prepared, clock)
    return prepared


def measured(job: Job, progress: Progress, should_stop: ShouldStop = never) -> tuple[Prepared[Any], Adapted[Any, Any]]:
    """What `measure` has prepared of the job, and with what is to be encoded of it: read from the work directory, which
    nothing is written to."""
    begun = survey(job, progress, should_stop)
    begun = replace(begun, checkpoint=begun.checkpoint.with_weights())
    prepared = _prepared(begun)
    if prepared is None:
        raise analysis_is_needed(begun.job)
    return prepared, _adapted(prepared, Clock())


@contextmanager
def _begun(
    job: Job, progress: Progress, should_stop: ShouldStop, fresh: bool, clock: Clock
) -> Iterator[tuple[Run, Prepared[Any] | None, WorkDirectory]]:
    """The job surveyed, its work directory and its output held and taken; what is known before anything runs."""
    with clock("plan"):
        if job.lm_eval:
            from bitwright.converter.judge.tasks import check_tasks

            check_tasks(job.lm_eval)
        begun = survey(job, progress, should_stop)
        check_places(inputs_of(begun), [begun.output], begun.work_dir)
        prepared = _prepared(begun, in_work_dir=not fresh)
        if prepared is not None:
            begun = prepared.run
        files = _checked_files(begun, prepared)
    for note in begun.notes if prepared is None else prepared.notes:
        progress.say(note)
    work = WorkDirectory(begun.work_dir)
    with work.locked(), locked_output(begun.output):
        fetched = _fetched(begun, job)
        if fetched.job != begun.job:  # it comes with what was to be measured
            prepared = _prepared(fetched, in_work_dir=not fresh)
            fetched = fetched if prepared is None else prepared.run
            files = _checked_files(fetched, prepared)
        begun = fetched
        if begun.job.sensitivity is not None:  # the weights tell models apart that look alike by their headers
            available_evidence(begun)
        if fresh:
            _start_over(begun, prepared, files, work)
        else:
            _claim(begun, prepared, files, work)
        if prepared is not None:
            prepared = replace(prepared, run=begun)
        with stops_cleanly(work.path, begun.job.command):
            yield begun, prepared, work


def _fetched(run: Run, asked: Job) -> Run:
    """The same with the weights on this machine; begun anew, as a later call will begin, where statistics that the job
    has a use for came along with them. asked: the job before its survey."""
    if run.checkpoint.fetch_weights is None:
        return run
    fetched = replace(run, checkpoint=run.checkpoint.with_weights())
    again = survey(asked, run.progress, run.should_stop)
    if (again.job.imatrix, again.job.sensitivity) == (run.job.imatrix, run.job.sensitivity):
        return fetched
    for note in again.notes:
        if note not in run.notes:
            run.progress.say(note)
    return again


def _checked_files(run: Run, prepared: Prepared[Any] | None) -> Files:
    """The files of the artifact, none of which replaces what is read, and for which there is room. Raises ConvertError
    for whatever else would stop the job."""
    files = TARGETS[run.job.profile.target].files(run) if prepared is None else prepared.files
    if files.layouts:
        check_places(inputs_of(run), files.outputs, run.work_dir)
    moments = collects_moments(run, None if prepared is None else prepared.plan)
    ruled = _ruled(run) if prepared is None else None
    preflight(run, files if ruled is None else ruled.files, moments, _needs(run.job, prepared))
    return files


def _needs(job: Job, prepared: Prepared[Any] | None) -> list[Need]:
    """What the model is run for. prepared: as of fingerprint."""
    analysed = prepared is None
    needs = {
        Need.IMPORTANCE: job.imatrix is None and (prepared is None or prepared.importance is not None),
        Need.SENSITIVITY: analysed and job.sensitivity is None,
        Need.TEXT: prepared is not None and prepared.reads_text_later,
        Need.QUALITY: job.judge != "off",
    }
    return [need for need, needed in needs.items() if needed]


def _start_over(run: Run, prepared: Prepared[Any] | None, files: Files, work: WorkDirectory) -> None:
    """--fresh: forget what was done, and replace what is at the output now, once there is something in its place."""
    outputs = {*files.outputs, *TARGETS[run.job.profile.target].files(run).outputs}
    forget_outputs(outputs, files.is_directory, Replaceable(work.path / REPLACEABLE))
    work.clear()
    work.claim(fingerprint(run, prepared), fresh=True)
    Replaceable(work.path / REPLACEABLE).allow(outputs)


def _claim(run: Run, prepared: Prepared[Any] | None, files: Files, work: WorkDirectory) -> None:
    """Take the work directory for this job. Before the artifact is begun nothing may be in its place; later on its own
    journal tells what is there."""
    if not (work.path / JOURNAL).exists():
        check_places_free(files, Replaceable(work.path / REPLACEABLE))
    work.claim(fingerprint(run, prepared))


def _analyse(run: Run, work: WorkDirectory, clock: Clock) -> Prepared[Any]:
    """The plan, after what it rests on has been measured."""
    job = run.job
    importance = planned_importance(run)
    if job.imatrix is None:
        with clock("calibrate"):
            importance = TARGETS[job.profile.target].calibrate(run, None)
    with clock("analyse"):
        evidence = given_evidence(run) or streamed_evidence(run, importance)
    if job.refine:
        from bitwright.converter.gguf.refine import refine

        with clock("refine"):
            evidence = refine(run, partial(decide, run), evidence, importance.with_costs(evidence.columns))
    with clock("plan"):
        prepared = decide(run, evidence)
        _claim(prepared.run, prepared, _checked_files(prepared.run, prepared), work)
    for note in (*prepared.notes[len(run.notes) :], *filter(None, [_gain(run, evidence, prepared.plan)])):
        run.progress.say(note)
    return prepared


def _adapted(planned: Prepared[Any], clock: Clock) -> Adapted[Any, Any]:
    """calibrate and adapt: what is done of a plan before its tensors are encoded."""
    target, job, progress = planned.target, planned.run.job, planned.run.progress
    if text := ternary_warning(planned.run.checkpoint, planned.plan):
        progress.say(f"warning: {text}")
    calibrated = _calibrate(planned, clock)
    with clock("adapt"):
        if calibrated.plan.error_feedback and job.imatrix is not None:
            target.calibrate(calibrated.run, calibrated.plan)  # for the second moments, which the file does not have
        adapted: Adapted[Any, Any] = target.adapt(calibrated)
    for note in (*(f"{decision['tensor']}: {decision['why']}" for decision in adapted.decisions), *adapted.notes):
        progress.say(note)
    return adapted


def _run_stages(
    planned: Prepared[Any], clock: Clock, machine: OnMachine | Absent, encoders: Encoders
) -> tuple[Prepared[Any], Report]:
    """calibrate to report: what is done of a plan. Returns the plan as it was carried out, and the report."""
    target, job = planned.target, planned.run.job
    adapted = _adapted(planned, clock)
    prepared = adapted.prepared
    with clock("encode"):
        paths = _write(planned, adapted, encoders)
    with clock("verify"):
        errors, coverage = target.verify(adapted, paths)
        paths = target.complete(adapted, paths)
    quality = coherence = agreement = None
    if job.judge != "off":
        from bitwright.converter.judge.findings import judge

        judged = replace(planned.run, model_map=prepared.run.model_map)
        quality, agreement, coherence = judge(judged, target.candidate(adapted, paths), clock)
    tasks = None
    if job.lm_eval:
        from bitwright.converter.judge.tasks import measured_tasks

        with clock("tasks"):
            tasks = measured_tasks(prepared.run, paths[0])
    measured = Measured(errors, coverage, quality, coherence, agreement, tasks)
    report = assemble(planned, adapted, target.hashes(adapted, paths), measured, clock.seconds)
    report = replace(report, machine=machine)
    describe_job(prepared, report)
    content = json.dumps(report.to_dict(), indent=1)
    write_sealed(prepared.run.work_dir / "report.json", "report", content.encode())  # with it the job is done
    return prepared, report


def _calibrate(planned: Prepared[Any], clock: Clock) -> Prepared[Any]:
    """The plan with the importance that its encoders use, where they use any."""
    importance, run = planned.importance, planned.run
    if importance is None:
        return planned
    if run.job.imatrix is None:
        with clock("calibrate"):
            computed = planned.target.calibrate(run, planned.plan).with_costs(importance.costs)
            check_importance(computed, run.model_map, planned.plan, str(run.work_dir / IMPORTANCE_FILE))
            importance = computed
    for note in importance.notes():
        run.progress.say(note)
    return replace(planned, importance=importance)


def _write(planned: Prepared[Any], adapted: Adapted[Any, Any], encoders: Encoders) -> list[Path]:
    """Encode and write; second moments that are lost on the way are computed again."""
    run, target = planned.run, planned.target

    def write() -> list[Path]:
        with encoders(adapted) as encoder:
            return target.write(adapted, encoder)

    try:
        paths = write()
    except MomentsLost as lost:
        run.progress.say(f"{lost.where}: {lost.what}: the model is calibrated again")
        forget_calibration(run.work_dir)
        target.calibrate(run, planned.plan)
        paths = write()
    remove_tree(run.work_dir / MOMENTS)
    return paths
