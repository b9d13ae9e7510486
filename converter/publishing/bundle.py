"""What a published artifact consists of: its files under the names they have in a repository, and what made them.

README.md                    the card, of all artifacts in the repository
NAME.gguf                    the weights, or NAME-00001-of-00003.gguf and so on; of a safetensors directory all its
                             files under their own names, where NAME is model, as in model.safetensors
recipe/NAME/report.json      what was measured
recipe/NAME/plan.json        every tensor's format and the reason for it
recipe/NAME/PROFILE.toml     the profile
MODEL.imatrix.gguf           the importance matrix, where one was used: one for all artifacts that were made by it. Of
                             a directory, and where the repository has another one, it is in recipe/NAME
recipe/NAME/sensitivity.safetensors  the sensitivity table, where one was used
recipe/NAME/report.html      the report for reading, where there is one
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitwright.converter.artifact.naming import imatrix_name, labelled, mix_of_file, whole_name
from bitwright.converter.artifact.ownership import foreign_entries
from bitwright.converter.directory.files import finished_files, is_written_name
from bitwright.converter.gguf.verify import artifact_files
from bitwright.converter.job.progress import Progress
from bitwright.converter.job.spelling import profile_file
from bitwright.converter.job.work_directory import default_work_dir
from bitwright.converter.publishing.repository import RepositoryFile
from bitwright.converter.report.data import ArtifactFile, Manifest, PublishedReport, Report
from bitwright.converter.report.records import PAGE, PLAN, REPORT, SPLIT_REPORT, read_page, read_plan, read_report
from bitwright.converter.source.checkpoint import TEMPLATES, model_files
from bitwright.converter.source.front_matter import LARGEST_CARD_BYTES
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import file_sha256
from bitwright.formats.files.gguf import read_gguf
from bitwright.formats.files.regular_file import read_json, read_whole
from bitwright.formats.names import printable
from bitwright.formats.typed import ABSENT
from bitwright.profiles.sizes import size_text

CARD = "README.md"
RECIPES = "recipe"
# The Hub asks for files of at most this size: larger ones are slow to fetch, and lost whole when it fails.
LARGEST_FILE_BYTES = 20 * 1000**3
DIRECTORY_STEM = "model"
_IMATRIX = re.compile(r"[^/]+\.imatrix\.(gguf|dat)")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
# BaseName-SizeLabel[-FineTune][-Version][-Encoding] of the GGUF naming convention. The version is left out by most.
_CONVENTION = re.compile(r"\w[\w.]*(-[\w.]+)*-(\d+x)?\d+(\.\d+)?[KMBTQ](-[\w.]+)*")


@dataclass(frozen=True)
class FinishedArtifact:
    """An artifact as its conversion left it. location: its first file, or the directory. paths: its files by the names
    that tell them apart, the path in the directory or a GGUF's own, the first one first; the report lists the same
    names. metadata: the key-values of a GGUF's first file that are no lists. card: the README.md that lies in a
    directory. notes: what the user is told."""

    location: Path
    paths: dict[str, Path]
    work_dir: Path
    report: Report
    has_chat_template: bool
    metadata: Mapping[str, Any]
    card: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_directory(self) -> bool:
        return self.report.artifact.is_directory

    @property
    def model_id(self) -> str | None:
        """The source's id on the Hub; None for a local checkpoint, which has no revision."""
        return self.report.model if self.report.revision else None


def load_artifact(location: Path, work_dir: Path | None, progress: Progress) -> FinishedArtifact:
    """The artifact that begins with this file, or is this directory, and its report. Reads every byte once, for the
    hashes.

    Raises ConvertError for an artifact without a report, a report that is not as it was written, an artifact that is
    not as its report says, and for files that are too large for the Hub.
    """
    in_directory = location.is_dir()
    files = finished_files(location) if in_directory else artifact_files(location)
    split = "convert again with" if in_directory else f"split it: bitwright split {location}"
    for path in files:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise ConvertError(
                f"the file has {size_text(path.stat().st_size)}, and the Hub asks for at most 20 GB in one",
                str(path),
                f"{split} --split-size 20GB",
            )
    whole = location.absolute() if in_directory else location.with_name(whole_name(location.name))
    work_dir = work_dir or default_work_dir(whole)
    was_split = len(files) > 1 and not in_directory and (work_dir / SPLIT_REPORT).exists()
    report = read_report(work_dir, name=SPLIT_REPORT if was_split else REPORT)
    described = report.artifact.by_name
    paths = {path.relative_to(location).as_posix() if in_directory else path.name: path for path in files}
    _check_files(paths, described, work_dir, progress)
    if missing := described.keys() - paths.keys():
        raise ConvertError(
            f"the report is of {len(described)} files, the artifact has {len(paths)}",
            f"{location}: {min(missing)} is missing",
            "put the file back" if in_directory else "name the first shard",
        )
    if in_directory:
        return _of_directory(location, paths, work_dir, report)
    metadata = {key: entry.value for key, entry in read_gguf(location).metadata().items() if entry.sub_type is None}
    return FinishedArtifact(location, paths, work_dir, report, "tokenizer.chat_template" in metadata, metadata)


def _of_directory(location: Path, paths: dict[str, Path], work_dir: Path, report: Report) -> FinishedArtifact:
    settings = read_json(location / "tokenizer_config.json") if "tokenizer_config.json" in paths else {}
    has_template = "chat_template" in settings or any(re.match(rf"chat_template\.|{TEMPLATES}/", n) for n in paths)
    others = foreign_entries(location)
    card = None
    if CARD in others:
        model_files(location, (CARD,))  # refuses a link out of the directory: what it names would be published
        try:
            card = read_whole(location / CARD, LARGEST_CARD_BYTES, "take it out, or mend it").decode()
        except UnicodeDecodeError:
            raise ConvertError("the card is no UTF-8 text", str(location / CARD), "take it out, or mend it") from None
        others.remove(CARD)
    names = ", ".join(map(printable, others))
    notes = (f"left out, as no conversion has written it: {names}",) if others else ()
    return FinishedArtifact(location, paths, work_dir, report, has_template, {}, card, notes)


def _check_files(
    paths: Mapping[str, Path], described: Mapping[str, ArtifactFile], work_dir: Path, progress: Progress
) -> None:
    """Raises ConvertError for a file of other bytes than the report says of its name."""
    total, done = sum(path.stat().st_size for path in paths.values()), 0
    for name, path in paths.items():
        file = described.get(name)
        if file is None or (file.bytes, file.sha256) != (path.stat().st_size, file_sha256(path)):
            raise ConvertError(
                "the file is not the one that the report was made of",
                f"{path}, beside {work_dir / REPORT}",
                "put the artifact back as it was, or convert again with --fresh",
            )
        done += path.stat().st_size
        progress("check", done, total, "B")


def repository_stem(artifact: FinishedArtifact, name: str | None) -> str:
    """The artifact's name in a repository, without .gguf: as asked; else its own where that follows the GGUF naming
    convention; else what the convention makes of the model's metadata. A directory's files keep their names."""
    if artifact.is_directory:
        if name is not None:
            raise ConvertError("the files of a directory keep their names", f"--name {name}", "leave it out")
        return DIRECTORY_STEM
    own = _SHARD.sub("", artifact.location.stem)
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
    model = artifact.report.model.rpartition("/")[2]
    return labelled(artifact.metadata, model, mix_of_file(artifact.metadata)).removesuffix(".gguf")


def published_report(artifact: FinishedArtifact, stem: str, base_model: str | None) -> PublishedReport:
    """The report as it is published: paths relative to the repository, nothing of this machine."""
    report, directory = artifact.report, f"{RECIPES}/{stem}"
    described = report.artifact.by_name
    files = tuple(replace(described[name], path=path) for name, path in _published_names(artifact, stem).items())
    published = replace(
        report,
        artifact=replace(report.artifact, files=files),
        calibration=report.calibration and replace(report.calibration, path=ABSENT),
        sensitivity=report.sensitivity and replace(report.sensitivity, path=ABSENT),
        path=ABSENT,
    )
    plain = _without_places(published.to_dict(), artifact)
    if report.calibration is not None:
        suffix = Path(report.calibration.file).suffix
        name = imatrix_name(artifact.metadata, report.model.rpartition("/")[2], suffix)
        plain["calibration"]["file"] = f"{directory}/{name}" if artifact.is_directory else name
    if report.sensitivity is not None:
        plain["sensitivity"]["file"] = f"{directory}/{report.sensitivity.file}"
    return PublishedReport.from_dict(plain | {"base_model": base_model, "recipe_directory": directory})


def with_own_imatrix(report: PublishedReport) -> PublishedReport:
    """The same with its importance matrix beside its recipe: another one has the name of the model's."""
    if report.calibration is None:
        return report
    name = report.calibration.file.rpartition("/")[2]
    return replace(report, calibration=replace(report.calibration, file=f"{report.recipe_directory}/{name}"))


def _published_names(artifact: FinishedArtifact, stem: str) -> dict[str, str]:
    """The names of the artifact's files in a repository by those that they have here."""
    if artifact.is_directory:
        return {name: name for name in artifact.paths}
    shards = {name: _SHARD.search(path.stem) for name, path in artifact.paths.items()}
    return {name: f"{stem}{shard[0] if shard else ''}.gguf" for name, shard in shards.items()}


def files_to_publish(artifact: FinishedArtifact, stem: str, report: PublishedReport) -> list[RepositoryFile]:
    """Everything but the card, the artifact's own files first. report: as `published_report` gives it."""
    paths = {published: artifact.paths[name] for name, published in _published_names(artifact, stem).items()}
    own = [RepositoryFile(file.path, paths[file.path], file.bytes, file.sha256) for file in report.artifact.files]
    directory = report.recipe_directory
    plan = {key: value for key, value in read_plan(artifact.work_dir).items() if key != "output"}
    if plan["plan_sha256"] != artifact.report.plan_sha256:
        raise ConvertError(
            "the plan is not the one that the artifact was made by",
            str(artifact.work_dir / PLAN),
            "convert again",
        )
    texts = {
        REPORT: json.dumps(report.to_dict(), indent=1),
        PLAN: json.dumps(_without_places(plan, artifact), indent=1),
        profile_file(report.profile): str(artifact.report.recipe["profile_toml"]),
    }
    if (page := read_page(artifact.work_dir)) is not None:
        texts[PAGE] = _without_places(page, artifact)
    beside = [RepositoryFile.of_bytes(f"{directory}/{name}", text.encode()) for name, text in texts.items()]
    for (manifest, what), (published, _) in zip(_measured(artifact.report), _measured(report), strict=True):
        path = _measured_path(artifact, manifest, what)
        beside.append(RepositoryFile(published.file, path, path.stat().st_size, manifest.sha256))
    return [*own, *beside]


def written_paths(stem: str, earlier: PublishedReport | None) -> set[str]:
    """Paths that an earlier publishing of this artifact has written, by their names: a report may name anything, and
    what else it names is not ours. earlier: its report, None for an unreadable one."""
    names, own = {REPORT, PLAN, PAGE}, set[str]()
    if earlier is not None:
        names.add(profile_file(earlier.profile))
        measured = {manifest.file for manifest, _ in _measured(earlier)}
        own |= {file for file in measured if file.rpartition("/")[0] == f"{RECIPES}/{stem}" or _IMATRIX.fullmatch(file)}
        of_gguf = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.gguf").fullmatch
        own |= {*filter(is_written_name if earlier.artifact.is_directory else of_gguf, earlier.hashes)}
    return own | {f"{RECIPES}/{stem}/{name}" for name in names}


def _measured(report: Report) -> list[tuple[Manifest, str]]:
    """What was measured of the model, and what it is called."""
    named = ((report.calibration, "importance matrix"), (report.sensitivity, "sensitivity table"))
    return [(manifest, what) for manifest, what in named if manifest is not None]


def _measured_path(artifact: FinishedArtifact, manifest: Manifest, what: str) -> Path:
    """What was measured of the model, where it was or in the work directory, which may have been moved."""
    before = Path(manifest.path or manifest.file)
    for path in (before, artifact.work_dir / manifest.file):
        if path.is_file() and file_sha256(path) == manifest.sha256:
            return path
    raise ConvertError(
        f"the {what} of this artifact has been removed or changed since",
        str(before),
        f"put it back, there or into {artifact.work_dir}: it is published beside the weights",
    )


def _without_places(value: Any, artifact: FinishedArtifact) -> Any:
    """The same data without the directories of this machine."""
    own = artifact.location if artifact.is_directory else artifact.location.parent
    directories = (artifact.work_dir, own, Path.cwd(), Path.home())
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
