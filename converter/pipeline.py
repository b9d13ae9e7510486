"""The whole conversion: the stages in the order they run, each of which leaves its result in the work directory.

source -> describe -> plan -> preflight -> calibrate -> adapt -> encode -> write
       -> verify -> quality -> agreement -> guard -> report

What the stages do to a GGUF and to a safetensors directory is behind the seam of artifact/target.py: `adapt` protects
the super weights of a GGUF, and moves outliers of a directory's activations into its weights.

Where the profile decides by measured sensitivity, the order is calibrate -> analyse -> plan.
"""

import json
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
from bitwright.converter.artifact.run import Run
from bitwright.converter.artifact.target import Adapted, Prepared, Target
from bitwright.converter.artifact.writer import JOURNAL
from bitwright.converter.directory.target import DirectoryTarget
from bitwright.converter.gguf.target import GgufTarget
from bitwright.converter.job.identity import job_fingerprint
from bitwright.converter.job.job import Job
from bitwright.converter.job.kept import is_kept
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
from bitwright.converter.measure.dtype import with_decided_dtype
from bitwright.converter.measure.evidence import (
    TRIALS,
    analysis_is_needed,
    available_evidence,
    given_evidence,
    streamed_evidence,
)
from bitwright.converter.measure.moments import collects_moments
from bitwright.converter.measure.obstacles import Need, obstacle_to_analysis
from bitwright.converter.preflight import check_samples, preflight, ternary_warning
from bitwright.converter.report.assemble import Measured, assemble
from bitwright.converter.report.data import OnMachine, Report
from bitwright.converter.report.page import report_page
from bitwright.converter.report.verdict import missed_target, warning
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import file_sha256, remove_tree
from bitwright.formats.files.seals import write_sealed
from bitwright.formats.typed import ABSENT, Absent, to_plain
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
    return job_fingerprint(job, checkpoint, plan=plan, calibration=corpus, moments=moments_of)


def run(
    job: Job,
    progress: Progress,
    should_stop: ShouldStop = never,
    fresh: bool = False,
    machine: OnMachine | Absent = ABSENT,
) -> tuple[Prepared[Any], Report]:
    """Do the job, or what is left of it. Returns what was prepared and the report. machine: what the report is to say
    of the machine that the profile was chosen for.

    Raises ConvertError (Stopped when should_stop() asked for it); running the same job again continues.
    """
    clock = Clock()
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
        begun = replace(begun, checkpoint=begun.checkpoint.with_weights())
        if begun.job.sensitivity is not None:  # the weights tell models apart that look alike by their headers
            available_evidence(begun)
        if {*_needs(begun.job, prepared)} - {Need.QUALITY}:
            begun = with_decided_dtype(begun, {} if fresh else work.description())
        if fresh:
            _start_over(begun, prepared, files, work)
        else:
            _claim(begun, prepared, files, work)
        if prepared is not None:
            prepared = replace(prepared, run=begun)
            if (finished := _finished(prepared)) is not None:
                return finished
        with stops_cleanly(work.path, begun.job.command):
            prepared = prepared or _analyse(begun, work, clock)
            if text := ternary_warning(prepared.run.checkpoint, prepared.plan):
                progress.say(f"warning: {text}")
            prepared, report = _run_stages(prepared, clock, machine)
    for text in filter(None, (missed_target(report), warning(report))):
        progress.say(f"warning: {text}")
    return prepared, report


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


def _run_stages(planned: Prepared[Any], clock: Clock, machine: OnMachine | Absent) -> tuple[Prepared[Any], Report]:
    """calibrate to report: what is done of a plan. Returns the plan as it was carried out, and the report."""
    target, job, progress = planned.target, planned.run.job, planned.run.progress
    calibrated = _calibrate(planned, clock)
    with clock("adapt"):
        if calibrated.plan.error_feedback and job.imatrix is not None:
            target.calibrate(calibrated.run, calibrated.plan)  # for the second moments, which the file does not have
        adapted = target.adapt(calibrated)
    prepared = adapted.prepared
    for note in (*(f"{decision['tensor']}: {decision['why']}" for decision in adapted.decisions), *adapted.notes):
        progress.say(note)
    with clock("encode"):
        paths = _write(planned, adapted)
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
    _describe(prepared, report)
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


def _write(planned: Prepared[Any], adapted: Adapted[Any, Any]) -> list[Path]:
    """Encode and write; second moments that are lost on the way are computed again."""
    run, target = planned.run, planned.target
    try:
        paths = target.write(adapted)
    except MomentsLost as lost:
        run.progress.say(f"{lost.where}: {lost.what}: the model is calibrated again")
        forget_calibration(run.work_dir)
        target.calibrate(run, planned.plan)
        paths = target.write(adapted)
    remove_tree(run.work_dir / MOMENTS)
    return paths


def _describe(prepared: Prepared[Any], report: Report) -> None:
    """Write plan.json and report.html, where they are not there as they would be written."""
    described, work_dir = prepared.to_dict(), prepared.run.work_dir
    for name, content in (
        ("plan.json", json.dumps(described, indent=1)),
        ("report.html", report_page(report, described["tensors"])),
    ):
        kept = is_kept(work_dir / name, "report", prepared.run.progress)
        if not kept or (work_dir / name).read_bytes() != content.encode():
            write_sealed(work_dir / name, "report", content.encode())


def _finished(prepared: Prepared[Any]) -> tuple[Prepared[Any], Report] | None:
    """What `run` returns of a job that is done already; None of one that is not."""
    run = prepared.run
    remove_tree(run.work_dir / TRIALS)  # where a kill has left what its refinement was measured with
    report = _finished_report(run)
    adapted = None if report is None else prepared.target.adapted_before(prepared)
    if report is None or adapted is None:
        return None
    _describe(adapted, report)
    run.progress.say("already done: the artifact is there and its hashes are right")
    return adapted, report


def _finished_report(run: Run) -> Report | None:
    """The report of a job that is done and whose files are as it left them; a changed or missing file is an error.

    A report without the quality or the tasks that are asked for now does not count: what it lacks is to be measured.
    """
    from bitwright.converter.judge.agreement import may_be_completed
    from bitwright.converter.judge.judging import report_samples

    job, path = run.job, run.work_dir / "report.json"
    if not is_kept(path, "report", run.progress):
        return None
    report = Report.from_dict(json.loads(path.read_bytes()))
    if job.judge != "off":
        needed = report_samples(job.judge)
        if report.quality is None or report.quality.samples < needed or report.not_judged:
            return None
        if may_be_completed(to_plain(report.agreement)):
            return None
    asked = job.lm_eval, job.lm_eval_limit
    if job.lm_eval and (report.tasks is None or asked != (report.tasks.tasks, report.tasks.limit)):
        return None
    for file in report.artifact.files:
        if not Path(file.path).exists() or file_sha256(Path(file.path)) != file.sha256:
            raise ConvertError(
                "the artifact of this finished job has been removed or changed since",
                file.path,
                "put it back, or write it again with --fresh",
            )
    return report
