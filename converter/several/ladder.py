"""A ladder: several artifacts of one model, measured once.

Importance, sensitivity and second moments are computed before the first rung. The first two stay beside the artifacts
as files; all serve every rung by the cache, which is one of the ladder's own where none is to be used. Every plan is
made before anything is encoded, so that a rung that cannot be had stops nothing half-way. A tensor that two rungs have
in the same format is encoded once.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from bitwright.calibration.control import ShouldStop
from bitwright.converter.artifact.naming import default_imatrix_name
from bitwright.converter.artifact.run import EarlierArtifact
from bitwright.converter.artifact.writer import JOURNAL
from bitwright.converter.imatrix import write_importance
from bitwright.converter.job.build import build_job
from bitwright.converter.job.cache import cache_directory
from bitwright.converter.job.job import Job
from bitwright.converter.job.options import option_of
from bitwright.converter.job.progress import Progress
from bitwright.converter.measure.obstacles import obstacle, obstacle_to_analysis
from bitwright.converter.pipeline import run
from bitwright.converter.preparation import bounds_of, prepare, survey
from bitwright.converter.report.data import Report
from bitwright.converter.report.page import ladder_page
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import make_directory, remove_tree
from bitwright.formats.files.whole import whole_file
from bitwright.formats.names import safe_name
from bitwright.profiles.sizes import parse_size

PAGE, SUMMARY = "ladder.html", "ladder.json"
# In the directory of a ladder that is to use no cache, until it is done.
_OWN_CACHE = "ladder.bitwright-cache"
_BITS = re.compile(r"(\d+(?:\.\d+)?) ?bpw", re.IGNORECASE)
_SIZE = re.compile(r"\d+(?:\.\d+)? ?[kmgt]i?b?", re.IGNORECASE)


@dataclass(frozen=True)
class Rung:
    """One artifact of a ladder. text: as it was asked for; options: what that means to a job."""

    text: str
    options: dict[str, Any]


def parse_rungs(text: str) -> list[Rung]:
    """Rungs with commas between them: names of profiles, sizes such as 1.2GiB, and bits per weight such as 4.5bpw.

    Raises ConvertError for a list that is empty, or names one twice.
    """
    texts = [part.strip() for part in text.split(",") if part.strip()]
    if not texts or len(set(texts)) < len(texts):
        what = "names a rung twice" if texts else "names no rung"
        raise ConvertError(f"the ladder {what}", f"--ladder {text}", "for example --ladder 2.5bpw,balanced-4bit,1.2GiB")
    return [Rung(part, _options(part)) for part in texts]


def _options(text: str) -> dict[str, Any]:
    if bits := _BITS.fullmatch(text):
        return {"target_bpw": float(bits[1])}
    if _SIZE.fullmatch(text):
        return {"target_size": parse_size(text, f"--ladder {text}")}
    return {"profile": text}


def climb(
    model: str,
    rungs: Sequence[Rung],
    directory: Path,
    progress: Progress,
    should_stop: ShouldStop,
    fresh: bool = False,
    **options: Any,
) -> list[Report]:
    """Every rung's artifact in the directory, with a page and a summary that compare them; returns their reports.

    options: fields of Job, of every rung; none that names the output or a target.
    Raises ConvertError before anything is encoded for a rung that cannot be had, and for two that are the same
    artifact. The same call continues after whatever stopped it.
    """
    if directory.suffix == ".gguf":
        raise ConvertError("a ladder has several artifacts", f"--output {directory}", "name a directory")
    make_directory(directory, "use --output")
    jobs = [build_job(model, **{"output": directory, **options, **rung.options}) for rung in rungs]
    own_cache = directory / _OWN_CACHE if cache_directory(jobs[0].cache) is None else None
    if own_cache is not None:
        jobs = [replace(job, cache=own_cache) for job in jobs]
    _check_reachable(jobs, rungs)
    given = _measured(jobs, directory, progress, should_stop, fresh)
    jobs = [job if job.profile.target != "gguf" else given.of(job) for job in jobs]
    jobs = _placed(jobs, rungs)
    reports: list[Report] = []
    earlier: list[EarlierArtifact] = []
    for job, rung in zip(jobs, rungs, strict=True):
        progress.say(f"rung {len(reports) + 1} of {len(rungs)}: {rung.text}")
        prepared, report = run(job, progress, should_stop, fresh, earlier=tuple(earlier))
        reports.append(report)
        if job.profile.target == "gguf":
            files = tuple(Path(file.path) for file in report.artifact.files)
            earlier.append(EarlierArtifact(files, prepared.run.work_dir / JOURNAL))
    if own_cache is not None:
        remove_tree(own_cache)
    summary = [report.to_dict() for report in reports]
    for name, content in ((SUMMARY, json.dumps(summary, indent=1)), (PAGE, ladder_page(reports))):
        with whole_file(directory / name, "comparison") as file:
            file.write(content.encode())
    return reports


@dataclass(frozen=True)
class _Measured:
    """The files of what was measured of the model; None for what no job needs, names itself, or can have."""

    imatrix: Path | None = None
    sensitivity: Path | None = None

    def of(self, job: Job) -> Job:
        """A job whose codes are chosen with feedback takes importance and second moments from the cache."""
        imatrix = job.imatrix or (self.imatrix if job.feedback is None else None)
        return replace(job, imatrix=imatrix, sensitivity=job.sensitivity or self.sensitivity)


def _measured(
    jobs: Sequence[Job], directory: Path, progress: Progress, should_stop: ShouldStop, fresh: bool
) -> _Measured:
    first, ggufs = jobs[0], [job for job in jobs if job.profile.target == "gguf"]
    if first.imatrix is not None or not ggufs:
        return _Measured()
    surveyed = survey(ggufs[0])
    if obstacle(surveyed.checkpoint) is not None:
        return _Measured()  # every rung says itself what it can do without
    measuring = [job for job in ggufs if job.aimed().profile.needs_sensitivity]
    if not measuring and not any(prepare(job).plan.uses_importance for job in ggufs):
        return _Measured()
    wanted = first.sensitivity is None and bool(measuring)
    hindered = obstacle_to_analysis(surveyed.checkpoint, surveyed.model_map.predicts_tokens) is not None
    path = directory / default_imatrix_name(surveyed.checkpoint, surveyed.model_map)
    taken = [each.name for each in fields(Job) if "imatrix" in option_of(each).commands and each.name != "work_dir"]
    options = {name: getattr(first, name) for name in taken} | {"command": first.command, "fresh": fresh}
    measures = {
        "sensitivity": wanted and not hindered,
        "moments": any(job.feedback and job.statistics is None for job in ggufs),
    }
    written = write_importance(first.model, path, progress, should_stop, **measures, **options)
    return _Measured(*written)


def _check_reachable(jobs: Sequence[Job], rungs: Sequence[Rung]) -> None:
    """Raises ConvertError for a size that no choice of formats meets, before anything is measured for the others: of
    sizes that are asked for alike, the smallest one tells."""
    smallest: dict[str, tuple[float, Job, Rung]] = {}
    for job, rung in zip(jobs, rungs, strict=True):
        budget = job.aimed().profile.budget
        if budget is not None and budget.has_goal and not budget.as_rules:
            alike = repr((replace(budget, size=None, bpw=None, where=""), budget.size is None))
            asked = (budget.bpw or 0.0) if budget.size is None else budget.size
            if alike not in smallest or asked < smallest[alike][0]:
                smallest[alike] = asked, job, rung
    for _, job, rung in smallest.values():
        with _of_rung(rung):
            bounds_of(survey(job))


@contextmanager
def _of_rung(rung: Rung) -> Iterator[None]:
    try:
        yield
    except ConvertError as error:
        raise ConvertError(f"the rung {rung.text} cannot be had: {error.what}", error.where, error.remedy) from None


def _placed(jobs: Sequence[Job], rungs: Sequence[Rung]) -> list[Job]:
    """The same with an output each: of files that are called after one mix, all but the first are called after their
    rungs, too. Raises ConvertError for a plan that cannot be made, and for two rungs that write the same artifact."""
    placed: dict[Path, Rung] = {}
    plans: dict[str, Rung] = {}
    outputs = []
    for job, rung in zip(jobs, rungs, strict=True):
        with _of_rung(rung):
            prepared = prepare(job)
        output, plan = prepared.run.output, prepared.plan.digest()
        same = plans.get(plan)
        if output in placed and output.suffix == ".gguf":
            stem, _, label = output.name.rpartition("-BW-")
            output = output.with_name(f"{stem}-{safe_name(rung.text).replace('.', '_')}-BW-{label}")
        if same is not None or output in placed:
            other = same or placed[output]
            raise ConvertError(
                f"the rungs {other.text} and {rung.text} are the same artifact", str(output), "leave out one of them"
            )
        placed[output] = plans[plan] = rung
        outputs.append(output)
    return [replace(job, output=output) for job, output in zip(jobs, outputs, strict=True)]
