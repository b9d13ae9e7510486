"""A job that is done: what its work directory says of it, and whether a later run finds it as it was left."""

import json
from pathlib import Path
from typing import Any

from bitwright.converter.artifact.run import Run
from bitwright.converter.artifact.target import Prepared
from bitwright.converter.job.kept import is_kept
from bitwright.converter.measure.evidence import TRIALS
from bitwright.converter.report.data import Report
from bitwright.converter.report.page import report_page
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import file_sha256, remove_tree
from bitwright.formats.files.seals import write_sealed
from bitwright.formats.typed import to_plain


def describe_work(prepared: Prepared[Any], report: Report) -> None:
    """Write plan.json and report.html, where they are not there as they would be written."""
    described, work_dir = prepared.to_dict(), prepared.run.work_dir
    for name, content in (
        ("plan.json", json.dumps(described, indent=1)),
        ("report.html", report_page(report, described["tensors"])),
    ):
        kept = is_kept(work_dir / name, "report", prepared.run.progress)
        if not kept or (work_dir / name).read_bytes() != content.encode():
            write_sealed(work_dir / name, "report", content.encode())


def finished_job(prepared: Prepared[Any]) -> tuple[Prepared[Any], Report] | None:
    """What `run` returns of a job that is done already; None of one that is not."""
    run = prepared.run
    remove_tree(run.work_dir / TRIALS)  # where a kill has left what its refinement was measured with
    report = _finished_report(run)
    adapted = None if report is None else prepared.target.adapted_before(prepared)
    if report is None or adapted is None:
        return None
    describe_work(adapted, report)
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
