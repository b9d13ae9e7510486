"""The whole conversion: the stages in the order they run, each of which leaves its result in the work directory.

source -> describe -> plan -> preflight -> calibrate -> adapt -> encode -> write
       -> verify -> quality -> agreement -> guard -> report

What the stages do to a GGUF and to a safetensors directory is behind the seam of converter/target.py: of the one
`adapt` protects super weights, of the other it moves outliers of the activations into the weights.

Where the profile decides by measured sensitivity, the order is calibrate -> analyse -> plan.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from calibration.control import ShouldStop, never
from calibration.corpus import resolve_corpus
from calibration.importance import ImportanceMatrix
from calibration.second_moments import MomentsLost
from converter.analyse import TRIALS, analyse, analysis_is_needed, found_evidence, given_evidence, sensitivity_path
from converter.breakdown import layer_rows
from converter.calibrate import check_importance, forget_calibration, planned_importance
from converter.child import RuntimeTroubled
from converter.directory_target import DirectoryTarget
from converter.gguf_target import GgufTarget
from converter.job import (
    REPLACEABLE,
    UNDECIDED,
    Job,
    WorkDirectory,
    calibration_file_sha256,
    file_sha256,
    stops_cleanly,
    tool_identity,
)
from converter.kept import is_kept
from converter.metadata import source_card
from converter.model_map import describe
from converter.ownership import (
    Replaceable,
    bring_back,
    check_free,
    check_places,
    check_replaceable,
    inputs_of,
    locked_output,
)
from converter.page import report_page
from converter.preflight import check_samples, preflight, ternary_warning
from converter.progress import Progress
from converter.recipe import IMPORTANCE_FILE, calibration_manifest, recipe, reproducing_arguments, sensitivity_manifest
from converter.report import group_rows, source_bytes
from converter.source import open_checkpoint
from converter.target import Layout, Prepared, Surveyed, Target
from converter.verdict import better_recipe, missed_target, overall, warning
from converter.write import JOURNAL, partial_path
from formats.errors import ConvertError
from formats.files import remove, remove_tree
from formats.seals import write_sealed
from profiles.evidence import Evidence


def survey(job: Job) -> Surveyed:
    """source and describe: reads headers, configuration and tokenizer, and no weight."""
    check_samples(job.samples, job.sequence_length)
    job = job.aimed()
    target: Target = GgufTarget() if job.profile.target == "gguf" else DirectoryTarget()
    checkpoint = open_checkpoint(job.model, metadata_only=True)
    model_map = describe(checkpoint, job.pre_tokenizer)
    job = target.located(job, checkpoint, model_map)
    notes = model_map.notes if job.profile.target == "gguf" else model_map.source_notes
    surveyed = Surveyed(job, checkpoint, model_map, target, notes)
    analyses = job.sensitivity is None or job.refine > 0
    return _with_corpus(surveyed, even_with_imatrix=analyses) if job.profile.needs_sensitivity else surveyed


def _with_corpus(surveyed: Surveyed, even_with_imatrix: bool = False) -> Surveyed:
    """The same with the text of its calibration: decided once, as the network may come and go while the job runs.

    even_with_imatrix: sensitivity is measured on that text, super weights are looked for on it, and error feedback
    takes the moments of its inputs, even where the importance is given."""
    job = surveyed.job
    if (job.imatrix is not None and not even_with_imatrix) or job.calibration is not None:
        return surveyed
    corpus, reason = resolve_corpus(None)
    note = f"calibration on {corpus}: {reason}"
    return replace(surveyed, job=replace(job, calibration=corpus), notes=(*surveyed.notes, note))


def decide(surveyed: Surveyed, evidence: Evidence | None) -> Prepared:
    """plan: by the profile, and by the evidence where the profile decides by any. A function of these alone: with
    corrected evidence it makes a corrected plan."""
    job, checkpoint, model_map = surveyed.job, surveyed.checkpoint, surveyed.model_map
    importance = None
    if job.profile.needs_sensitivity or job.imatrix is not None:
        importance = _weighed_importance(surveyed, evidence)
    target = surveyed.target
    plan = target.plan(surveyed, evidence, importance)
    if importance is None and target.needs_statistics(job, plan):
        surveyed = _with_corpus(surveyed)
        importance = _weighed_importance(surveyed, evidence)
    elif target.reads_text_later(job, plan):
        surveyed = _with_corpus(surveyed, even_with_imatrix=True)
    if job.imatrix is not None and importance is not None:
        check_importance(importance, model_map, plan, str(job.imatrix))
    notes = (*surveyed.notes, *target.notes(job, plan))
    if job.imatrix is not None and importance is not None and importance.model not in (None, checkpoint.model_id):
        notes += (f"{job.imatrix} was computed of {importance.model}, and this model is {checkpoint.model_id}",)
    prepared = Prepared(surveyed.job, checkpoint, model_map, target, notes, plan, importance)
    if (
        job.shard_bytes is not None
        and not target.reads_text_later(job, plan)
        and len(prepared.layouts(importance)) == 1
    ):
        # A limit that nothing reaches makes no other job.
        prepared = replace(prepared, job=replace(prepared.job, shard_bytes=None))
    return prepared


def _weighed_importance(surveyed: Surveyed, evidence: Evidence | None) -> ImportanceMatrix:
    """What is planned to be used, with the costs of columns where these were measured."""
    importance = planned_importance(surveyed.job, surveyed.checkpoint, surveyed.model_map)
    return importance if evidence is None else importance.with_costs(evidence.columns)


def prepare(job: Job) -> Prepared:
    """The plan of a job before anything runs: a dry run.

    Raises ConvertError for a profile that decides by measured sensitivity when that has not been measured yet.
    """
    surveyed = survey(job)
    evidence = found_evidence(surveyed.job, surveyed.checkpoint, surveyed.model_map)
    if evidence is None and surveyed.job.profile.needs_sensitivity:
        raise analysis_is_needed(surveyed.job)
    return decide(surveyed, evidence)


def _check_places(known: Surveyed, layouts: Sequence[Layout]) -> None:
    """Refuse to write over what is read. Without layouts the artifact is one file."""
    job = known.job
    assert job.output is not None
    outputs = known.target.outputs(job, layouts) if layouts else [job.output]
    check_places(inputs_of(job, known.checkpoint), outputs, job.work_dir)


def fingerprint(known: Surveyed) -> dict[str, Any]:
    """What decides the artifact's bytes: finished work is reused only where all of it is the same. known: what was
    prepared; or only surveyed, where the plan rests on an analysis that is still to be made."""
    job, checkpoint = known.job, known.checkpoint
    if isinstance(known, Prepared):
        plan, importance = known.plan.digest(), known.importance
        moments_of = job.calibration if known.plan.error_feedback else None
    else:
        plan, importance = UNDECIDED, planned_importance(job, checkpoint, known.model_map)
        moments_of = UNDECIDED
    profile = "".join((*job.profile.inherited, job.profile.text))
    return {
        "tool": tool_identity(),
        "model": checkpoint.model_id,
        "revision": checkpoint.revision,
        "files": [list(entry) for entry in checkpoint.files()],
        "profile": hashlib.sha256(profile.encode()).hexdigest(),
        "overrides": [rule.text for rule in job.overrides],
        "protection": job.protection.super_weights,
        "activations": [job.alpha, job.activation_scales],
        "target": [job.target_size, job.target_bpw, job.target_kld],
        "refine": job.refine,
        "plan": plan,
        "imatrix": file_sha256(job.imatrix) if job.imatrix else None,
        "sensitivity": file_sha256(job.sensitivity) if job.sensitivity else None,
        "calibration": importance.corpus if importance else None,
        "error_feedback": job.error_feedback,
        "moments": moments_of,
        "calibration_file": calibration_file_sha256(job),
        "samples": job.samples,
        "sequence_length": job.sequence_length,
        "seed": job.seed,
        "chat": job.chat,
        "alpha": job.alpha,
        "activation_scales": job.activation_scales,
        "device": job.device,
        "calibration_dtype": job.calibration_dtype,
        "pre_tokenizer": job.pre_tokenizer,
        "shard_bytes": job.shard_bytes,
        "output": str(job.output.absolute()) if job.output else None,
    }


def run(
    job: Job, progress: Progress, should_stop: ShouldStop = never, fresh: bool = False
) -> tuple[Prepared, dict[str, Any]]:
    """Do the job, or what is left of it. Returns what was prepared and the report.

    Raises ConvertError (Stopped when should_stop() asked for it); running the same job again continues.
    """
    clock = _Clock()
    with clock("plan"):
        if job.lm_eval:
            from converter.tasks import check_tasks

            check_tasks(job.lm_eval)
        surveyed = survey(job)
        _check_places(surveyed, [])
        known = _known(surveyed, fresh)
        job = known.job
        assert job.work_dir is not None and job.output is not None
        layouts = known.layouts(known.importance) if isinstance(known, Prepared) else []
        _check_places(known, layouts)
        partial_files = known.target.partial_files(job, layouts)
        preflight(job, known.checkpoint, known.model_map, layouts, partial_files, known.feeds_back)
    for note in known.notes:
        progress.say(note)
    work = WorkDirectory(job.work_dir)
    with work.locked(), locked_output(job.output):
        known = replace(known, checkpoint=known.checkpoint.with_weights())
        if job.sensitivity is not None:  # the weights tell models apart that look alike by their headers
            found_evidence(job, known.checkpoint, known.model_map)
        if fresh:
            _start_over(known, layouts, work)
        else:
            _check_free(known, layouts, work)
            work.claim(fingerprint(known))
        if isinstance(known, Prepared):
            remove_tree(work.path / TRIALS)  # where a kill has left what its refinement was measured with
            report = _finished_report(work.path, job, progress)
            done = None if report is None else known.target.adapted_before(known, progress)
            if report is not None and done is not None:
                _describe(done, report, work.path, progress)
                progress.say("already done: the artifact is there and its hashes are right")
                return done, report
        with stops_cleanly(work.path, job.command):
            prepared = known if isinstance(known, Prepared) else _analyse(known, work, progress, should_stop, clock)
            if text := ternary_warning(prepared.checkpoint, prepared.plan):
                progress.say(f"warning: {text}")
            prepared, report = _run_stages(prepared, work.path, progress, should_stop, clock)
    for text in filter(None, (missed_target(report), warning(report))):
        progress.say(f"warning: {text}")
    return prepared, report


def _start_over(known: Surveyed, layouts: Sequence[Layout], work: WorkDirectory) -> None:
    """--fresh: forget what was done, and replace what is at the output now, once there is something in its place."""
    target, job = known.target, known.job
    outputs = {*target.outputs(job, layouts), *target.outputs(job, [])}
    replaceable = Replaceable(work.path / REPLACEABLE)
    grown = {*replaceable.grown, *map(partial_path, outputs)}
    for path in grown:
        replaceable.check_growing(path, begins_as_ours=False)
    for path in outputs:
        bring_back(path, replaceable)
        check_replaceable(path, target.is_directory)
    for path in grown:
        remove_tree(path) if path.is_dir() else remove(path)
    work.clear()
    work.claim(fingerprint(known), fresh=True)
    Replaceable(work.path / REPLACEABLE).allow(outputs)


def _check_free(known: Surveyed, layouts: Sequence[Layout], work: WorkDirectory) -> None:
    """Before the artifact is begun nothing may be in its place; later on its own journal tells what is there."""
    if not (work.path / JOURNAL).exists():
        replaceable, outputs = Replaceable(work.path / REPLACEABLE), known.target.outputs(known.job, layouts)
        check_free(outputs, replaceable, known.target.is_directory)
        for path in map(partial_path, outputs):
            replaceable.check_growing(path, begins_as_ours=True)  # what it begins with is looked at when it is written


def _known(surveyed: Surveyed, fresh: bool) -> Surveyed:
    """What is known before anything runs: a Prepared, unless its plan rests on an analysis that is still to be made."""
    evidence = found_evidence(surveyed.job, surveyed.checkpoint, surveyed.model_map, in_work_dir=not fresh)
    if evidence is None and surveyed.job.profile.needs_sensitivity:
        return surveyed
    return decide(surveyed, evidence)


def _analyse(
    surveyed: Surveyed, work: WorkDirectory, progress: Progress, should_stop: ShouldStop, clock: "_Clock"
) -> Prepared:
    """The plan, after what it rests on has been measured."""
    job, checkpoint, model_map = surveyed.job, surveyed.checkpoint, surveyed.model_map
    importance = planned_importance(job, checkpoint, model_map)
    if job.imatrix is None:
        with clock("calibrate"):
            importance = surveyed.target.calibrate(surveyed, work.path, progress, should_stop)
    with clock("analyse"):
        evidence = given_evidence(job, checkpoint, model_map) or analyse(
            job, checkpoint, model_map, importance, work.path, progress, should_stop
        )
    if job.refine:
        from converter.refine import refine

        with clock("refine"):
            weighed = importance.with_costs(evidence.columns)
            evidence = refine(
                partial(decide, surveyed), evidence, weighed, job.refine, work.path, progress, should_stop
            )
    with clock("plan"):
        prepared = decide(surveyed, evidence)
        layouts = prepared.layouts(prepared.importance)
        _check_places(prepared, layouts)
        partial_files = prepared.target.partial_files(job, layouts)
        preflight(job, checkpoint, model_map, layouts, partial_files, prepared.feeds_back)
        _check_free(prepared, layouts, work)
        work.claim(fingerprint(prepared))
    for note in prepared.notes[len(surveyed.notes) :]:
        progress.say(note)
    return prepared


def _run_stages(
    prepared: Prepared, work_dir: Path, progress: Progress, should_stop: ShouldStop, clock: "_Clock"
) -> tuple[Prepared, dict[str, Any]]:
    job, target, importance, planned = prepared.job, prepared.target, prepared.importance, prepared
    reads_text_later = job.refine > 0 or target.reads_text_later(job, prepared.plan)
    reads_text = (
        (importance is not None and job.imatrix is None)
        or (job.profile.needs_sensitivity and job.sensitivity is None)
        or reads_text_later
    )
    if importance is not None and job.imatrix is None:
        with clock("calibrate"):
            costs = importance.costs
            importance = target.calibrate(prepared, work_dir, progress, should_stop).with_costs(costs)
            check_importance(importance, prepared.model_map, prepared.plan, str(work_dir / IMPORTANCE_FILE))
    for note in importance.notes() if importance is not None else ():
        progress.say(note)
    with clock("adapt"):
        adapted = target.adapt(prepared, importance, work_dir, progress, should_stop)
        source, prepared, importance = prepared.checkpoint, adapted.prepared, adapted.importance
        model_map, plan = prepared.model_map, prepared.plan
    for note in adapted.notes:
        progress.say(note)
    with clock("encode"):
        try:
            paths = target.write(adapted, work_dir, progress, should_stop)
        except MomentsLost as lost:
            progress.say(f"{lost.where}: {lost.what}: the model is calibrated again")
            forget_calibration(work_dir)
            target.calibrate(planned, work_dir, progress, should_stop)
            paths = target.write(adapted, work_dir, progress, should_stop)
    with clock("verify"):
        errors, found = target.verify(adapted, paths, progress)
        paths = target.complete(adapted, paths)
    quality = coherence = agreement = None
    if job.quality:
        from converter.agreement import runtime_agreement
        from converter.guard import guard
        from converter.quality import measure_quality

        candidate = target.candidate(adapted, paths, work_dir)
        with clock("quality"):
            quality = measure_quality(job, source, model_map, candidate, work_dir, progress, should_stop)
        judges: dict[str, Any] = {
            "seed": job.seed,
            "device": job.device,
            "threads": job.n_threads,
            "progress": progress,
            "should_stop": should_stop,
        }
        with clock("agreement"), _judging("what the runtime computes", progress):
            agreement = runtime_agreement(source, model_map, candidate, work_dir, quality=quality, **judges)
        with clock("guard"), _judging("what the artifact writes", progress):
            coherence = guard(source, model_map, candidate, work_dir, held_out=quality["corpus"], **judges)
    tasks = None
    if job.lm_eval:
        from converter.tasks import measured_tasks

        with clock("tasks"):
            tasks = measured_tasks(paths[0], job.lm_eval, job.lm_eval_limit, job.n_threads, work_dir)
    verdict = overall(quality, coherence, agreement)
    hashes = target.hashes(adapted, paths, work_dir)
    files: list[dict[str, Any]] = [
        {"path": str(path), "bytes": path.stat().st_size, "sha256": hashes[path]} for path in paths
    ]
    n_source, n_artifact = source_bytes(source), sum(path.stat().st_size for path in target.weight_files(paths))
    report = {
        "model": source.model_id,
        "revision": source.revision,
        "profile": plan.profile,
        "plan_sha256": plan.digest(),
        "tool": tool_identity(),
        "recipe": recipe(job, source, plan, importance),
        "arguments": reproducing_arguments(job, source, reads_text),
        "calibration": calibration_manifest(job, importance, work_dir),
        "sensitivity": sensitivity_manifest(sensitivity_path(job, work_dir)),
        "reads_text_later": reads_text_later,
        "source": {"bytes": n_source, "card": source_card(source)},
        "artifact": {
            "kind": job.profile.target,
            "bytes": n_artifact,
            "files": files,
        },
        "compression_ratio": n_source / n_artifact,
        "groups": group_rows(plan),
        "errors": [error.to_dict() for error in errors],
        **found,
        "layers": layer_rows(plan, errors),
        "uniform": target.uniform_sizes(prepared),
        "predicted_kld": plan.predicted_kld,
        "target_kld": plan.spent.budget.kld if plan.spent is not None else None,
        "quality": quality,
        "coherence": coherence,
        "agreement": agreement,
        "tasks": tasks,
        "verdict": verdict,
        # A larger format cures no runtime that computes something else.
        "better": better_recipe(
            job, lambda p: target.plan_of(p, prepared), plan, work_dir, overall(quality, coherence, None)
        ),
        "seconds": clock.seconds,
        "path": str(work_dir / "report.json"),
        "page": str(work_dir / "report.html"),
    }
    _describe(prepared, report, work_dir, progress)
    write_sealed(work_dir / "report.json", "report", json.dumps(report, indent=1).encode())  # with it the job is done
    return prepared, report


def _describe(prepared: Prepared, report: dict[str, Any], work_dir: Path, progress: Progress) -> None:
    """Write plan.json and report.html, where they are not there as they would be written."""
    described = prepared.to_dict()
    for name, content in (
        ("plan.json", json.dumps(described, indent=1)),
        ("report.html", report_page(report, described["tensors"])),
    ):
        if not is_kept(work_dir / name, "report", progress) or (work_dir / name).read_bytes() != content.encode():
            write_sealed(work_dir / name, "report", content.encode())


@contextmanager
def _judging(what: str, progress: Progress) -> Iterator[None]:
    """A part of the verdict, which is left open when the system does not let the runtime run: the next run of the same
    command judges it."""
    try:
        yield
    except RuntimeTroubled as error:
        progress.say(f"warning: not judged is {what}: {error}. Free some memory and run the same command again")


def _finished_report(work_dir: Path, job: Job, progress: Progress) -> dict[str, Any] | None:
    """The report of a job that is done and whose files are as it left them; a changed or missing file is an error.

    A report without the quality or the tasks that are asked for now does not count: what it lacks is to be measured.
    """
    from converter.agreement import may_be_completed

    path = work_dir / "report.json"
    if not is_kept(path, "report", progress):
        return None
    report = json.loads(path.read_bytes())
    tasks = report["tasks"] or {}
    if job.quality and None in (report["quality"], report["coherence"], report["agreement"]):
        return None
    if job.quality and may_be_completed(report["agreement"]):
        return None
    if job.lm_eval and (tasks.get("tasks"), tasks.get("limit")) != (list(job.lm_eval), job.lm_eval_limit):
        return None
    for file in report["artifact"]["files"]:
        if not Path(file["path"]).exists() or file_sha256(Path(file["path"])) != file["sha256"]:
            raise ConvertError(
                "the artifact of this finished job has been removed or changed since",
                file["path"],
                "put it back, or write it again with --fresh",
            )
    return report


class _Clock:
    """Wall-clock seconds of each stage of this run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.monotonic() - start, 3)
