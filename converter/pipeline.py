"""The whole conversion: the stages in the order they run, each of which leaves its result in the work directory.

source -> describe -> plan -> preflight -> calibrate -> adapt -> encode -> write
       -> verify -> quality -> agreement -> guard -> report

What the stages do to a GGUF and to a safetensors directory is behind the seam of artifact/target.py: `adapt` protects
the super weights of a GGUF and folds its channels, and moves outliers of a directory's activations into its weights.

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
from bitwright.calibration.statistics.second_moments import MomentsLost
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
from bitwright.converter.artifact.target import Adapted, Encoders, Prepared
from bitwright.converter.artifact.writer import JOURNAL
from bitwright.converter.finished import describe_work, finished_job
from bitwright.converter.forecast.rates import RateKeeper, Rates
from bitwright.converter.job.job import Job
from bitwright.converter.job.progress import Clock, Progress
from bitwright.converter.job.recipe import IMPORTANCE_FILE
from bitwright.converter.job.work_directory import REPLACEABLE, WorkDirectory, stops_cleanly
from bitwright.converter.measure.calibrate import MOMENTS, check_importance, forget_calibration, planned_importance
from bitwright.converter.measure.dtype import with_decided_dtype
from bitwright.converter.measure.evidence import (
    analysis_is_needed,
    available_evidence,
    given_evidence,
    streamed_evidence,
)
from bitwright.converter.measure.moments import collects_moments
from bitwright.converter.measure.obstacles import Need
from bitwright.converter.measure.published import brings_statistics
from bitwright.converter.measure.statistics_directory import check_statistics
from bitwright.converter.preflight import preflight, ternary_warning
from bitwright.converter.preparation import (
    TARGETS,
    bounds_of,
    decide,
    fingerprint,
    forecast,
    gain_of_analysis,
    known_beforehand,
    needs_of,
    ruled,
    survey,
)
from bitwright.converter.record.log import LOG_FILE
from bitwright.converter.report.assemble import Measured, assemble
from bitwright.converter.report.data import OnMachine, Report
from bitwright.converter.report.verdict import missed_target, verdict_line, warning
from bitwright.formats.files.disk import remove_tree
from bitwright.formats.files.seals import write_sealed
from bitwright.formats.typed import ABSENT, Absent


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
    keeper = RateKeeper(None)
    progress.on_work, clock = keeper.took, Clock(progress, keeper)
    with _begun(job, progress, should_stop, fresh, clock, keeper) as (begun, known, work):
        if known is not None and (done := finished_job(known)) is not None:
            _tell(progress, done[1])
            return done
        with progress.logged(work.path / LOG_FILE), stops_cleanly(work.path, begun.job.command):
            prepared = _planned(begun, known, work, clock, keeper)
            prepared = replace(prepared, run=replace(prepared.run, earlier=earlier))
            prepared, report = _run_stages(prepared, clock, machine, encoders or prepared.target.encoder)
            _tell(progress, report)
    for text in filter(None, (missed_target(report), warning(report))):
        progress.say(f"warning: {text}")
    return prepared, report


def measure(job: Job, progress: Progress, should_stop: ShouldStop = never, fresh: bool = False) -> Prepared[Any]:
    """Do what of the job comes before its tensors are encoded, or what is left of that. Its results stay in the work
    directory, where `measured` finds them. Raises as `run` does."""
    keeper = RateKeeper(None)
    clock = Clock(progress, keeper)
    with (
        _begun(job, progress, should_stop, fresh, clock, keeper) as (begun, known, work),
        progress.logged(work.path / LOG_FILE),
        stops_cleanly(work.path, begun.job.command),
    ):
        prepared = _planned(begun, known, work, clock, keeper)
        _adapted(prepared, clock)
    return prepared


def measured(job: Job, progress: Progress, should_stop: ShouldStop = never) -> tuple[Prepared[Any], Adapted[Any, Any]]:
    """What `measure` has prepared of the job, and with what is to be encoded of it: read from the work directory, which
    nothing is written to."""
    begun = survey(job, progress, should_stop)
    begun = replace(begun, checkpoint=begun.checkpoint.with_weights())
    prepared = known_beforehand(begun)
    if prepared is None:
        raise analysis_is_needed(begun.job)
    return prepared, _adapted(prepared, Clock(progress, RateKeeper(None)))


@contextmanager
def _begun(
    job: Job, progress: Progress, should_stop: ShouldStop, fresh: bool, clock: Clock, keeper: RateKeeper
) -> Iterator[tuple[Run, Prepared[Any] | None, WorkDirectory]]:
    """The job surveyed, its work directory and its output held and taken; what is known before anything runs."""
    with clock("plan"):
        if job.lm_eval:
            from bitwright.converter.judge.tasks import check_tasks

            check_tasks(job.lm_eval)
        begun = survey(job, progress, should_stop)
        check_places(inputs_of(begun), [begun.output], begun.work_dir)
        prepared = known_beforehand(begun, in_work_dir=not fresh)
        if prepared is not None:
            begun = prepared.run
        elif begun.job.profile.budget is not None and not begun.job.profile.has_rules_instead:
            bounds_of(begun)
        files = _checked_files(begun, prepared)
    for note in begun.notes if prepared is None else prepared.notes:
        progress.say(note)
    work = WorkDirectory(begun.work_dir)
    with work.locked(), locked_output(begun.output):
        if fresh or not work.is_begun:
            keeper.rates = Rates.of_job(begun.job)
        if begun.checkpoint.fetch_weights is not None:
            _foretell(begun, prepared, keeper)
            with clock("download"):
                fetched = _fetched(begun, job)
            if fetched.job != begun.job:  # it comes with what was to be measured
                prepared = known_beforehand(fetched, in_work_dir=not fresh)
                fetched = fetched if prepared is None else prepared.run
                files = _checked_files(fetched, prepared)
            begun = fetched
        check_statistics(begun)
        if begun.job.sensitivity is not None:  # the weights tell models apart that look alike by their headers
            available_evidence(begun)
        if {*needs_of(begun.job, prepared)} - {Need.QUALITY}:
            begun = with_decided_dtype(begun, {} if fresh else work.description())
        if fresh:
            _start_over(begun, prepared, files, work)
        else:
            _claim(begun, prepared, files, work)
        if prepared is not None:
            prepared = replace(prepared, run=begun)
        yield begun, prepared, work


def _planned(
    begun: Run, known: Prepared[Any] | None, work: WorkDirectory, clock: Clock, keeper: RateKeeper
) -> Prepared[Any]:
    """The plan, measured first where it rests on an analysis, and foreseen."""
    _foretell(begun, known, keeper, again="download" in clock.seconds)
    prepared = known
    if prepared is None:
        prepared = _analyse(begun, work, clock)
        _foretell(prepared.run, prepared, keeper, again=True)
    return prepared


def _fetched(run: Run, asked: Job) -> Run:
    """The same with the weights on this machine; begun anew, as a later call will begin, where statistics that the job
    has a use for came along with them. asked: the job before its survey."""
    fetched = replace(run, checkpoint=run.checkpoint.with_weights())
    if not brings_statistics(fetched.checkpoint):
        return fetched
    again = survey(asked, run.progress, run.should_stop)
    if (again.job.imatrix, again.job.sensitivity) == (run.job.imatrix, run.job.sensitivity):
        return fetched
    for note in again.notes:
        if note not in run.notes:
            run.progress.say(note)
    return again


def _foretell(run: Run, prepared: Prepared[Any] | None, keeper: RateKeeper, again: bool = False) -> None:
    foreseen = forecast(run, prepared, keeper.rates)
    keeper.expect(foreseen.works, foreseen.kinds)
    run.progress.expect(foreseen.forecast, again)


def _tell(progress: Progress, report: Report) -> None:
    """What has come out, for programs and for the log."""
    for file in report.artifact.files:
        progress.made(file.path, file.bytes, file.sha256)
    progress.judged(report.verdict, verdict_line(report))


def _checked_files(run: Run, prepared: Prepared[Any] | None) -> Files:
    """The files of the artifact, none of which replaces what is read, and for which there is room. Raises ConvertError
    for whatever else would stop the job."""
    files = TARGETS[run.job.profile.target].files(run) if prepared is None else prepared.files
    if files.layouts:
        check_places(inputs_of(run), files.outputs, run.work_dir)
    moments = collects_moments(run, None if prepared is None else prepared.plan)
    by_rules = ruled(run) if prepared is None else None
    preflight(run, files if by_rules is None else by_rules.files, moments, needs_of(run.job, prepared))
    return files


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
    for note in (*prepared.notes[len(run.notes) :], *filter(None, [gain_of_analysis(run, evidence, prepared.plan)])):
        run.progress.say(note)
    return prepared


def _adapted(planned: Prepared[Any], clock: Clock) -> Adapted[Any, Any]:
    """calibrate and adapt: what is done of a plan before its tensors are encoded."""
    target, job, progress = planned.target, planned.run.job, planned.run.progress
    if text := ternary_warning(planned.run.checkpoint, planned.plan):
        progress.say(f"warning: {text}")
    calibrated = _calibrate(planned, clock)
    with clock("adapt"):
        if job.imatrix is not None and collects_moments(calibrated.run, calibrated.plan):
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
    describe_work(prepared, report)
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
        if not collects_moments(run, planned.plan):
            raise
        run.progress.say(f"{lost.where}: {lost.what}: the model is calibrated again")
        forget_calibration(run.work_dir)
        target.calibrate(run, planned.plan)
        paths = write()
    remove_tree(run.work_dir / MOMENTS)
    return paths
