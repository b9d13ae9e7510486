"""Statistics that many machines have measured, in a directory: what `bitwright imatrix --merge` makes of the large sums
of their parts, and a job takes instead of running the model over the whole text.

    moments/                  second moments, see calibration/statistics/second_moments.py; where they were asked for
    activations.safetensors   activation statistics, and
    activation-rows/          rows of the same inputs, see InputRows; where they were asked for
    super-weight-trials.json  lines of the journal of removals, see calibration/super_weights/removals.py; where they
                              were asked for
    statistics.json           written last: of which model and text they are, and the SHA-256 of every file
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bitwright.calibration.statistics.activations import InputRows
from bitwright.converter.artifact.run import Run
from bitwright.converter.job.job import Job
from bitwright.converter.job.spelling import MOMENTS_OF_STATISTICS, STATISTICS_RECORD
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import file_sha256
from bitwright.formats.files.regular_file import read_json
from bitwright.formats.files.whole import whole_file
from bitwright.formats.typed import to_plain

_KIND, _VERSION = "bitwright statistics", 1
_FIELDS = {"model": str, "files": list, "text": dict, "files_sha256": dict}
_REMEDY = "name the directory that `bitwright imatrix --merge` has written, OUTPUT.statistics"


@dataclass(frozen=True)
class Statistics:
    """model: its id. files: of the model, as Checkpoint.files() tells them by content. text: its identity.
    files_sha256: of the files in the directory, by their paths in it."""

    directory: Path
    model: str
    files: list[Any]
    text: dict[str, Any]
    files_sha256: Mapping[str, str]

    @property
    def moments(self) -> Path:
        """The directory of the second moments."""
        return self.directory / MOMENTS_OF_STATISTICS

    @property
    def activations(self) -> Path:
        return self.directory / "activations.safetensors"

    @property
    def rows(self) -> InputRows:
        return InputRows(self.directory / "activation-rows")

    @property
    def trials(self) -> Path:
        return self.directory / "super-weight-trials.json"

    @property
    def has_moments(self) -> bool:
        return any(name.startswith(f"{self.moments.name}/") for name in self.files_sha256)

    @property
    def has_activations(self) -> bool:
        return self.activations.name in self.files_sha256


def given_statistics(job: Job) -> Statistics | None:
    """Those that the job names. Raises ConvertError for a directory that holds none."""
    return None if job.statistics is None else load_statistics(job.statistics)


def given_moments(job: Job) -> Path | None:
    """Where the second moments are that the job names; None where it names none."""
    given = given_statistics(job)
    return given.moments if given is not None and given.has_moments else None


def given_activations(job: Job) -> Statistics | None:
    """What the job names, where activations are among it."""
    given = given_statistics(job)
    return given if given is not None and given.has_activations else None


def gives_importance(job: Job) -> bool:
    """Whether the job names the importance: in a file, or of a directory with the activations that tell it."""
    return job.imatrix is not None or (job.profile.target != "gguf" and given_activations(job) is not None)


def given_trials(job: Job) -> list[dict[str, Any]]:
    """What the job names of the trials of the search for super weights."""
    given = given_statistics(job)
    if given is None or given.trials.name not in given.files_sha256:
        return []
    lines: list[dict[str, Any]] = json.loads(given.trials.read_bytes())
    return lines


def load_statistics(directory: Path) -> Statistics:
    """Raises ConvertError for a directory that holds none."""
    path = directory / STATISTICS_RECORD
    if not path.is_file():
        raise ConvertError("no statistics are in this directory, or they are not whole", str(directory), _REMEDY)
    content = read_json(path, remedy=_REMEDY)
    right = all(type(content.get(name)) is kind for name, kind in _FIELDS.items())
    if content.get("kind") != _KIND or content.get("version") != _VERSION or not right:
        raise ConvertError("these statistics are damaged, or of another release", str(path), "merge the parts again")
    return Statistics(directory, **{name: content[name] for name in _FIELDS})


def save_record(directory: Path, model: str, files: list[Any], text: dict[str, Any]) -> None:
    """Say what the statistics in the directory are of, all of which are there."""
    paths = [path for path in sorted(directory.rglob("*")) if path.suffix in (".npz", ".json", ".safetensors")]
    hashes = {str(path.relative_to(directory)): file_sha256(path) for path in paths}
    record = asdict(Statistics(directory, model, files, text, hashes))
    del record["directory"]
    with whole_file(directory / STATISTICS_RECORD, "record of statistics") as file:
        file.write(json.dumps({"kind": _KIND, "version": _VERSION, **record}, indent=1).encode())


def check_statistics(run: Run) -> None:
    """Refuse statistics of another model, or of none of the run's kind. The weights are there. Raises ConvertError."""
    given = given_statistics(run.job)
    if given is None:
        return
    if given.files != to_plain(replace(run.checkpoint, by_content=True).files()):
        raise ConvertError(
            f"the statistics are of another model, {given.model}: its files differ from those of"
            f" {run.checkpoint.model_id}",
            str(given.directory),
            "name those of this model, or leave out --statistics",
        )
    if run.job.profile.target == "gguf" and not (given.has_moments or given.trials.name in given.files_sha256):
        raise ConvertError(
            "these statistics have no second moments and no trials of super weights, and a GGUF takes nothing else",
            str(given.directory),
            "measure the parts with --moments, or leave out --statistics",
        )
