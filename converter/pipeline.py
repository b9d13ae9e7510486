"""The whole conversion: the stages in the order they run, each of which leaves its result in the work directory.

source -> describe -> plan -> preflight -> calibrate -> protect -> encode -> write -> verify -> quality -> report
"""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from calibration.control import ShouldStop, never
from calibration.corpus import resolve_corpus
from calibration.importance import ImportanceMatrix
from converter.artifact import artifact_layout, artifact_metadata, file_name
from converter.calibrate import calibrate, check_importance, planned_importance
from converter.checkpoint import Checkpoint
from converter.encode import Encoder
from converter.job import Job, WorkDirectory, file_sha256, stops_cleanly, tool_identity
from converter.metadata import source_card
from converter.model_map import describe
from converter.preflight import check_output_is_free, check_samples, preflight, ternary_warning
from converter.progress import Progress
from converter.protect import protect, protected_before, refuse_protection
from converter.recipe import IMPORTANCE_FILE, calibration_manifest, recipe, reproducing_arguments
from converter.report import fallback_lines, group_rows, quality_warning, source_bytes
from converter.source import open_checkpoint
from converter.super_weights import super_weight_coverage
from converter.verify import verify
from converter.write import ArtifactWriter
from formats.errors import ConvertError
from formats.gguf_file import GgufLayout
from formats.whole_file import whole_file
from profiles.assign import assign
from profiles.plan import Plan
from profiles.vocabulary import ModelMap


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before anything runs.

    importance: the identity of what the encoders will use, None when no format asks for it. notes: what was decided in
    the user's place and should be said.
    """

    job: Job
    checkpoint: Checkpoint
    model_map: ModelMap
    plan: Plan
    importance: ImportanceMatrix | None
    notes: tuple[str, ...]

    def layouts(self, importance: ImportanceMatrix | None) -> list[GgufLayout]:
        """The artifact's files; equally long for the planned identity of the importance and for the final one."""
        assert self.job.output is not None
        metadata = artifact_metadata(self.job, self.checkpoint, self.model_map, self.plan, importance)
        return artifact_layout(self.job.output.name, metadata, self.plan, self.job.shard_bytes)

    @property
    def file_bytes(self) -> int:
        return sum(layout.n_bytes for layout in self.layouts(self.importance))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data: what `--dry-run --json` prints."""
        return {
            "model": self.checkpoint.model_id,
            "revision": self.checkpoint.revision,
            "profile": self.plan.profile,
            "plan_sha256": self.plan.digest(),
            "output": str(self.job.output),
            "bytes": self.file_bytes,
            "bits_per_weight": self.plan.bits_per_weight,
            "groups": group_rows(self.plan),
            "tensors": self.plan.rows(),
        }


def prepare(job: Job) -> Prepared:
    """source, describe and plan: reads headers, configuration and tokenizer, and no weight."""
    check_samples(job.samples, job.sequence_length)
    checkpoint = open_checkpoint(job.model, metadata_only=True)
    model_map = describe(checkpoint, job.pre_tokenizer)
    plan = assign(job.profile, model_map, job.overrides, job.effort)
    metadata = {key: entry.value for key, entry in model_map.metadata.items()}
    job = job.with_output(file_name(metadata, checkpoint.model_id.rpartition("/")[2], job.profile.name))
    notes = fallback_lines(plan)
    importance = None
    looks = job.protection.looks(plan)
    refuse_protection(job.protection, plan)
    if ((plan.uses_importance and job.imatrix is None) or looks) and job.calibration is None:
        # Decided once: the network may come and go while the job runs.
        corpus, reason = resolve_corpus(None)
        job = replace(job, calibration=corpus)
        notes.append(f"calibration on {corpus}: {reason}")
    if plan.uses_importance or job.imatrix is not None:
        importance = planned_importance(job, checkpoint, model_map, plan)
    if looks and job.protection.super_weights != "auto":
        notes.append(
            f"super weights are looked for when the job runs, and {job.protection.super_weights} protects them"
        )
    elif looks:
        notes.append("super weights are looked for when the job runs; what protects them best may add to the size")
    prepared = Prepared(job, checkpoint, model_map, plan, importance, tuple(notes))
    if job.shard_bytes is not None and len(prepared.layouts(importance)) == 1:
        # A limit that nothing reaches makes no other job.
        prepared = replace(prepared, job=replace(job, shard_bytes=None))
    return prepared


def fingerprint(prepared: Prepared) -> dict[str, Any]:
    """What decides the artifact's bytes: finished work is reused only where all of it is the same."""
    job, checkpoint = prepared.job, prepared.checkpoint
    return {
        "tool": tool_identity(),
        "model": checkpoint.model_id,
        "revision": checkpoint.revision,
        "files": [list(entry) for entry in checkpoint.files()],
        "profile": hashlib.sha256(job.profile.text.encode()).hexdigest(),
        "overrides": [rule.text for rule in job.overrides],
        "protection": job.protection.super_weights,
        "plan": prepared.plan.digest(),
        "imatrix": file_sha256(job.imatrix) if job.imatrix else None,
        "calibration": prepared.importance.corpus if prepared.importance else None,
        "calibration_file": file_sha256(Path(job.calibration))
        if job.calibration and Path(job.calibration).is_file()
        else None,
        "samples": job.samples,
        "sequence_length": job.sequence_length,
        "seed": job.seed,
        "chat": job.chat,
        "device": job.device,
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
        prepared = prepare(job)
        job = prepared.job
        assert job.output is not None and job.work_dir is not None
        layouts = prepared.layouts(prepared.importance)
        preflight(job, prepared.checkpoint, prepared.model_map, layouts)
    for note in prepared.notes:
        progress.say(note)
    work = WorkDirectory(job.work_dir)
    with work.locked():
        checkpoint = prepared.checkpoint.with_weights()
        prepared = replace(prepared, checkpoint=checkpoint)
        if fresh:
            work.clear()
        if not (work.path / "job.json").exists() and not fresh:
            check_output_is_free(job, layouts)
        work.claim(fingerprint(prepared))
        if (report := _finished_report(work.path, job.quality)) is not None:
            progress.say("already done: the artifact is there and its hashes are right")
            done = protected_before(prepared.job, prepared.model_map, prepared.plan, prepared.importance)
            return replace(prepared, plan=done.plan, model_map=done.model_map), report
        if warning := ternary_warning(checkpoint, prepared.plan):
            progress.say(f"warning: {warning}")
        with stops_cleanly(work.path, job.command):
            prepared, report = _run_stages(prepared, work.path, progress, should_stop, clock)
    if warning := quality_warning(report["quality"]):
        progress.say(f"warning: {warning}")
    return prepared, report


def _run_stages(
    prepared: Prepared, work_dir: Path, progress: Progress, should_stop: ShouldStop, clock: "_Clock"
) -> tuple[Prepared, dict[str, Any]]:
    job, checkpoint, importance = prepared.job, prepared.checkpoint, prepared.importance
    assert job.output is not None
    if importance is not None and job.imatrix is None:
        with clock("calibrate"):
            importance = calibrate(job, checkpoint, prepared.model_map, work_dir, progress, should_stop)
            check_importance(importance, prepared.plan, str(work_dir / IMPORTANCE_FILE))
    for note in importance.notes() if importance is not None else ():
        progress.say(note)
    with clock("protect"):
        protected = protect(
            job, checkpoint, prepared.model_map, prepared.plan, importance, work_dir, progress, should_stop
        )
        plan, model_map = protected.plan, protected.model_map
        prepared = replace(prepared, plan=plan, model_map=model_map)
    for decision in protected.decisions:
        progress.say(f"{decision.tensor}: {decision.why}")
    with clock("encode"):
        layouts = prepared.layouts(importance)
        with Encoder(checkpoint, plan, importance, job.n_threads) as encoder:
            writer = ArtifactWriter(encoder, layouts, job.output.parent, work_dir / "encoded.jsonl")
            paths = writer.write(progress, should_stop)
    with clock("verify"):
        errors = verify(paths, checkpoint, model_map, importance, progress)
        coverage = super_weight_coverage(protected.report, paths, model_map, job.protection.tolerance)
    quality = None
    if job.quality:
        from converter.quality import measure_quality

        with clock("quality"):
            quality = measure_quality(job, checkpoint, model_map, paths, work_dir, progress, should_stop)
    files: list[dict[str, Any]] = [
        {"path": str(path), "bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths
    ]
    report = {
        "model": checkpoint.model_id,
        "revision": checkpoint.revision,
        "profile": plan.profile,
        "plan_sha256": plan.digest(),
        "tool": tool_identity(),
        "recipe": recipe(job, checkpoint, plan, importance),
        "arguments": reproducing_arguments(job, checkpoint, plan.uses_importance),
        "calibration": calibration_manifest(job, importance, work_dir),
        "source": {"bytes": source_bytes(checkpoint), "card": source_card(checkpoint)},
        "artifact": {"bytes": sum(file["bytes"] for file in files), "files": files},
        "groups": group_rows(plan),
        "errors": [error.to_dict() for error in errors],
        "super_weight_coverage": coverage,
        "protection": [asdict(decision) for decision in protected.decisions],
        "quality": quality,
        "seconds": clock.seconds,
        "path": str(work_dir / "report.json"),
    }
    for name, content in (("plan.json", prepared.to_dict()), ("report.json", report)):
        with whole_file(work_dir / name, "report") as file:
            file.write(json.dumps(content, indent=1).encode())
    return prepared, report


def _finished_report(work_dir: Path, with_quality: bool) -> dict[str, Any] | None:
    """The report of a job that is done and whose files are as it left them; a changed or missing file is an error.

    A report without the quality that is asked for now does not count: what it lacks is still to be measured.
    """
    path = work_dir / "report.json"
    if not path.exists():
        return None
    report = json.loads(path.read_bytes())
    if with_quality and report["quality"] is None:
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
        self.seconds[stage] = round(time.monotonic() - start, 3)
