"""What a published artifact consists of: its files under the names they have in a repository, and what made them.

README.md                    the card, of all artifacts in the repository
NAME.gguf                    the weights, or NAME-00001-of-00003.gguf and so on
recipe/NAME/report.json      what was measured
recipe/NAME/plan.json        every tensor's format and the reason for it
recipe/NAME/PROFILE.toml     the profile
recipe/NAME/importance.gguf  the importance matrix, where one was used
recipe/NAME/sensitivity.safetensors  the sensitivity table, where one was used
recipe/NAME/report.html      the report for reading, where there is one
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.artifact import file_name
from converter.hub_repository import RepositoryFile
from converter.job import default_work_dir, file_sha256
from converter.progress import Progress, size_text
from converter.recipe import profile_file
from converter.records import PAGE, PLAN, REPORT, read_page, read_plan, read_report
from converter.verify import artifact_files
from formats.errors import ConvertError
from formats.gguf_file import read_gguf

RECIPES = "recipe"
RECIPE_NAMES = (REPORT, PLAN, PAGE)
"""What lies there, beside the profile and what was measured of the model."""
# The Hub asks for files of at most this size: larger ones are slow to fetch, and lost whole when it fails.
LARGEST_FILE_BYTES = 20 * 1000**3
# What was measured of the model, by its key in a report.
MEASURED = {"calibration": "importance matrix", "sensitivity": "sensitivity table"}
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
# BaseName-SizeLabel[-FineTune][-Version][-Encoding] of the GGUF naming convention. The version is left out by most.
_CONVENTION = re.compile(r"\w[\w.]*(-[\w.]+)*-(\d+x)?\d+(\.\d+)?[KMBTQ](-[\w.]+)*")


@dataclass(frozen=True)
class FinishedArtifact:
    """An artifact as its conversion left it. metadata: the plain key-values of its first file."""

    paths: list[Path]
    work_dir: Path
    report: dict[str, Any]
    metadata: dict[str, Any]

    @property
    def has_chat_template(self) -> bool:
        return "tokenizer.chat_template" in self.metadata


def load_artifact(first: Path, work_dir: Path | None, progress: Progress) -> FinishedArtifact:
    """The artifact that begins with this file, and its report. Reads every byte once, for the hashes.

    Raises ConvertError for an artifact without a report, a report that is not as it was written, an artifact that is
    not as its report says, and for files that are too large for the Hub.
    """
    if first.is_dir():
        raise ConvertError(
            "directories are not published yet, GGUFs are", str(first), "send it with `hf upload REPOSITORY DIRECTORY`"
        )
    paths = artifact_files(first)
    for path in paths:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise ConvertError(
                f"the file has {size_text(path.stat().st_size)}, and the Hub asks for at most 20 GB in one",
                str(path),
                f"split it: convert split {first} --split-size 20GB",
            )
    work_dir = work_dir or default_work_dir(first.with_name(f"{_SHARD.sub('', first.stem)}.gguf"))
    report = read_report(work_dir)
    described = {Path(file["path"]).name: file["sha256"] for file in report["artifact"]["files"]}
    total, done = sum(path.stat().st_size for path in paths), 0
    for path in paths:
        if described.get(path.name) != file_sha256(path):
            raise ConvertError(
                "the file is not the one that the report was made of",
                f"{path}, beside {work_dir / REPORT}",
                "put the artifact back as it was, or convert again with --fresh",
            )
        done += path.stat().st_size
        progress("check", done, total, "B")
    if (n := len(report["artifact"]["files"])) != len(paths):
        raise ConvertError(
            f"the report is of {n} files, the artifact has {len(paths)}",
            str(first),
            "name the first shard",
        )
    return FinishedArtifact(paths, work_dir, report, _plain_metadata(paths[0]))


def _plain_metadata(path: Path) -> dict[str, Any]:
    """The key-values that are no lists: vocabularies are of no interest here."""
    return {key: entry.value for key, entry in read_gguf(path).metadata().items() if entry.sub_type is None}


def repository_stem(artifact: FinishedArtifact, name: str | None) -> str:
    """The artifact's name in a repository, without .gguf: as asked; else its own where that follows the GGUF naming
    convention; else what the convention makes of the model's metadata."""
    own = _SHARD.sub("", artifact.paths[0].stem)
    if name is not None:
        own = name.removesuffix(".gguf")
        if not _CONVENTION.fullmatch(own):
            raise ConvertError(
                f"{name!r} does not follow the GGUF naming convention",
                "--name",
                "write BaseName-SizeLabel-Version-Encoding, for example SmolLM2-135M-v1.0-Q4_K_M",
            )
    if _CONVENTION.fullmatch(own):
        return own
    model = str(artifact.report["model"]).rpartition("/")[2]
    return file_name(artifact.metadata, model, artifact.report["profile"]).removesuffix(".gguf")


def published_report(artifact: FinishedArtifact, stem: str, base_model: str | None) -> dict[str, Any]:
    """The report as it is published: names relative to the repository, nothing of this machine."""
    report = {key: value for key, value in artifact.report.items() if key != "path"}
    files = [
        {**file, "path": f"{stem}{_shard_suffix(path)}.gguf"}
        for file, path in zip(report["artifact"]["files"], artifact.paths, strict=True)
    ]
    manifests = {
        key: {field: value for field, value in report[key].items() if field != "path"}
        for key in MEASURED
        if report[key] is not None
    }
    report |= {"artifact": {**report["artifact"], "files": files}, **manifests}
    return _without_places(report | {"base_model": base_model, "recipe_directory": f"{RECIPES}/{stem}"}, artifact)


def _shard_suffix(path: Path) -> str:
    found = _SHARD.search(path.stem)
    return found[0] if found else ""


def files_to_publish(artifact: FinishedArtifact, report: dict[str, Any]) -> list[RepositoryFile]:
    """Everything but the card, the weights first. report: as `published_report` gives it."""
    weights = [
        RepositoryFile(file["path"], path, file["bytes"], file["sha256"])
        for file, path in zip(report["artifact"]["files"], artifact.paths, strict=True)
    ]
    directory = report["recipe_directory"]
    recipe = artifact.report["recipe"]
    plan = {key: value for key, value in read_plan(artifact.work_dir).items() if key != "output"}
    if plan.get("plan_sha256") != artifact.report["plan_sha256"]:
        raise ConvertError(
            "the plan is not the one that the artifact was made by",
            str(artifact.work_dir / PLAN),
            "convert again",
        )
    texts = {
        REPORT: json.dumps(report, indent=1),
        PLAN: json.dumps(_without_places(plan, artifact), indent=1),
        profile_file(recipe["profile"]): recipe["profile_toml"],
    }
    if (page := read_page(artifact.work_dir)) is not None:
        texts[PAGE] = _without_places(page, artifact)
    beside = [RepositoryFile.of_bytes(f"{directory}/{name}", text.encode()) for name, text in texts.items()]
    for key, what in MEASURED.items():
        if manifest := artifact.report[key]:
            path = _measured_path(artifact, manifest, what)
            beside.append(
                RepositoryFile(f"{directory}/{manifest['file']}", path, path.stat().st_size, manifest["sha256"])
            )
    return [*weights, *beside]


def _measured_path(artifact: FinishedArtifact, manifest: dict[str, Any], what: str) -> Path:
    """What was measured of the model, where it was or in the work directory, which may have been moved."""
    for path in (Path(manifest["path"]), artifact.work_dir / manifest["file"]):
        if path.is_file() and file_sha256(path) == manifest["sha256"]:
            return path
    raise ConvertError(
        f"the {what} of this artifact has been removed or changed since",
        manifest["path"],
        f"put it back, there or into {artifact.work_dir}: it is published beside the weights",
    )


def _without_places(value: Any, artifact: FinishedArtifact) -> Any:
    """The same data without the directories of this machine."""
    directories = (artifact.work_dir, artifact.paths[0].parent, Path.cwd(), Path.home())
    places = {f"{path}/" for directory in directories for path in (directory.absolute(), directory.resolve())} - {"//"}
    return _without(value, sorted(places, key=len, reverse=True))


def _without(value: Any, texts: list[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(item, texts) for key, item in value.items()}
    if isinstance(value, list):
        return [_without(item, texts) for item in value]
    if isinstance(value, str):
        for text in texts:
            value = value.replace(text, "")
    return value
