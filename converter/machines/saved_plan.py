"""A plan in a file, by which other machines encode their parts: what was asked for, and what was made of it.

    plan.json                   the options of the job, its fingerprint, and hashes of what was measured for it
    plan.json.bitwright-work/   the work directory: what was measured, which every part reads and none changes

It is written last, so that what it names is there.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitwright.calibration.control import ShouldStop
from bitwright.converter.artifact.target import Adapted, Prepared
from bitwright.converter.job.build import build_job
from bitwright.converter.job.job import Job
from bitwright.converter.job.progress import Progress
from bitwright.converter.job.work_directory import default_work_dir
from bitwright.converter.pipeline import measure, measured
from bitwright.converter.preparation import fingerprint
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import file_sha256, make_directory
from bitwright.formats.files.regular_file import read_json
from bitwright.formats.files.seals import sealed_files
from bitwright.formats.files.whole import whole_file
from bitwright.formats.typed import to_plain

_KIND, _VERSION = "bitwright plan", 1
_FIELDS = {"options": dict, "fingerprint": dict, "results": dict}


@dataclass(frozen=True)
class SavedPlan:
    """path: of the file. options: as of converter.job.build.build_job. fingerprint: of the job that was planned.
    results: name -> SHA-256 of the files in its work directory that the artifact rests on."""

    path: Path
    options: dict[str, Any]
    fingerprint: dict[str, Any]
    results: dict[str, str]

    @property
    def identity(self) -> str:
        """What is the same on every machine that works by this plan, and for no other plan: SHA-256."""
        decided = json.dumps([self.fingerprint, self.results], sort_keys=True)
        return hashlib.sha256(decided.encode()).hexdigest()

    @property
    def work_dir(self) -> Path:
        given = self.options.get("work_dir")
        return default_work_dir(self.path) if given is None else Path(given)

    def job(self, **changes: Any) -> Job:
        """changes: options that differ here."""
        given = {name: value for name, value in changes.items() if value is not None}
        return build_job(**{**self.options, "work_dir": self.work_dir, **given})

    def measured(
        self, progress: Progress, should_stop: ShouldStop, **changes: Any
    ) -> tuple[Prepared[Any], Adapted[Any, Any]]:
        """What was planned, ready to be encoded: as it is made of the model here, and checked against the file.

        changes: options that differ here, such as the place of the model. Raises ConvertError for another model, other
        options or another version of this tool, and where a result of the work directory is not what it was.
        """
        for name, sha256 in self.results.items():
            path = self.work_dir / name
            if not path.is_file() or file_sha256(path) != sha256:
                raise ConvertError(
                    "what was measured for this plan is gone or was changed",
                    str(path),
                    f"{self.again}: it is made anew",
                )
        prepared, adapted = measured(self.job(extent="beginning", **changes), progress, should_stop)
        here = _plain(fingerprint(prepared.run, prepared))
        differing = [key for key in {**self.fingerprint, **here} if self.fingerprint.get(key) != here.get(key)]
        if differing:
            key = differing[0]
            raise ConvertError(
                f"the plan was made of something else: {', '.join(differing)} differ"
                f" ({key} was {_short(self.fingerprint.get(key))}, is {_short(here.get(key))})",
                str(self.path),
                f"give every machine the same model, files and version of this tool; or {self.again}",
            )
        return prepared, adapted

    @property
    def again(self) -> str:
        """What makes the plan once more, in words."""
        return f"save the plan again: bitwright plan --save {self.path} {self.options['model']}"


def save_plan(
    path: Path, progress: Progress, should_stop: ShouldStop, *, fresh: bool = False, **options: Any
) -> Prepared[Any]:
    """Do everything of a conversion that comes before the encoding, and write the plan. Nothing is measured twice, and
    a plan that is there already and the same stays as it is. options: as of build_job.

    Raises ConvertError for a file of that name that is no plan, and as pipeline.run does.
    """
    if path.exists() and not fresh:
        load_plan(path)
    make_directory(path.parent, "name another file with --save")
    kept = plain_options(options)
    saved = SavedPlan(path, kept, {}, {})
    job = saved.job(extent="beginning", command=options.get("command"))
    if job.in_sequence:
        raise ConvertError(
            "layers that are encoded one after the other cannot be shared among machines",
            "--tune" if job.tune else "--sequential",
            "leave it out, or convert on one machine",
        )
    prepared = measure(job, progress, should_stop, fresh)
    saved = replace(
        saved,
        options=kept | _decided(prepared),
        fingerprint=_plain(fingerprint(prepared.run, prepared)),
        results={name: sha for name, sha in sealed_files(saved.work_dir).items() if not name.startswith(_OF_THE_END)},
    )
    if fresh or not path.exists() or load_plan(path) != saved:
        summary = {key: value for key, value in prepared.to_dict().items() if key not in ("tensors", "output")}
        fields = {name: getattr(saved, name) for name in _FIELDS}
        with whole_file(path, "plan") as file:
            content = {"kind": _KIND, "version": _VERSION, **fields, "summary": summary}
            file.write(json.dumps(content, indent=1).encode())
    return prepared


def _decided(prepared: Prepared[Any]) -> dict[str, Any]:
    """Options that are what they were found to be, so that no machine finds something else: the text, and the commit
    of a model on the Hub."""
    job, checkpoint = prepared.run.job, prepared.run.checkpoint
    decided: dict[str, Any] = {"calibration_dtype": job.calibration_dtype}  # as the measurement here has it
    if job.calibration is not None:
        decided["calibration"] = job.calibration
    if checkpoint.revision is not None and job.model == checkpoint.model_id:
        decided["model"] = f"{job.model}@{checkpoint.revision}"
    return decided


# What the last machine leaves in the work directory, and no part reads.
_OF_THE_END = ("report", "plan.json", "quality", "agreement", "candidate", "runtime", "coherence", "generated", "tasks")


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are given, as they are in a file, of what build_job takes."""
    given = {name: value for name, value in options.items() if value not in (None, ()) and name != "command"}
    return {name: str(value) if isinstance(value, Path) else to_plain(value) for name, value in given.items()}


def load_plan(path: Path) -> SavedPlan:
    """Raises ConvertError for a file that is missing, damaged or no saved plan."""
    remedy = "name the file that `bitwright plan --save FILE` has written"
    content = read_json(path, remedy=remedy)
    if content.get("kind") != _KIND:
        raise ConvertError("this is no saved plan", str(path), remedy)
    if content.get("version") != _VERSION or any(type(content.get(name)) is not of for name, of in _FIELDS.items()):
        raise ConvertError("the plan is damaged, or of another release", str(path), "save it again")
    return SavedPlan(path, *(content[name] for name in _FIELDS))


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """As it is in a file."""
    plain: dict[str, Any] = json.loads(json.dumps(data))
    return plain


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
