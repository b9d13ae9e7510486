"""The command `bitwright split`: an artifact in one file becomes one in several, without encoding anything again."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bitwright.converter.job.progress import Progress
from bitwright.converter.job.recipe import with_option
from bitwright.converter.job.work_directory import default_work_dir
from bitwright.converter.report.data import ArtifactFile, Report
from bitwright.converter.report.records import REPORT, SPLIT_REPORT, read_report
from bitwright.converter.source.gguf import open_parts
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import file_sha256, take_name
from bitwright.formats.files.gguf import EncodedTensor, GgufLayout, lay_out
from bitwright.formats.files.seals import write_sealed
from bitwright.formats.files.whole import remove_temporary, whole_file

_COPIED_AT_ONCE = 1 << 24
_SIZE = "--split-size="


def split(artifact: Path, shard_bytes: int, work_dir: Path | None, progress: Progress) -> list[Path]:
    """Write the artifact's tensors into files of at most shard_bytes beside it, byte for byte the files that
    `bitwright --split-size` would have written, and a report of these beside its own. The file itself stays. A call
    that was ended before it was done is continued by the next.

    Raises ConvertError for an artifact that is split already or fits in one file, where another file is in the way, and
    before anything is written, for a report that was changed or is of another artifact.
    """
    metadata, tensors, entries = open_parts(artifact)
    layouts = lay_out(artifact.name, metadata, entries, shard_bytes)
    if len(layouts) == 1:
        raise ConvertError(
            f"the artifact has {artifact.stat().st_size} bytes, which is no more than {shard_bytes}",
            str(artifact),
            "nothing is to be done; give a smaller --split-size where it should be split all the same",
        )
    work_dir = work_dir or default_work_dir(artifact)
    report = None
    if (work_dir / REPORT).exists():
        report = read_report(work_dir, may_lack_seal=True)
        if [file.sha256 for file in report.artifact.files] != [file_sha256(artifact)]:
            raise ConvertError(
                "the report is of another artifact", str(work_dir / REPORT), "name the artifact's own with --work-dir"
            )
    paths = [artifact.with_name(layout.file_name) for layout in layouts]
    there = {path for layout, path in zip(layouts, paths, strict=True) if _is_there(layout, tensors, path)}
    total = sum(layout.n_bytes for layout in layouts)
    needed = sum(layout.n_bytes for layout, path in zip(layouts, paths, strict=True) if path not in there)
    if needed > (free := shutil.disk_usage(artifact.parent).free):
        raise ConvertError(f"{needed} bytes are needed, {free} are free", str(artifact.parent), "make room")
    done = total - needed
    for layout, path in zip(layouts, paths, strict=True):
        if path in there:
            remove_temporary(path)
            continue
        with whole_file(path, "artifact", "make room, then run the command again", take_name) as file:
            for data in _parts(layout, tensors):
                file.write(data)
                done += len(data)
                progress("split", done, total, "B")
    if report is not None:
        _write_report(report, work_dir / SPLIT_REPORT, paths, shard_bytes)
    return paths


def _is_there(layout: GgufLayout, tensors: dict[str, EncodedTensor], path: Path) -> bool:
    """Whether an earlier call, which was ended before it was done, has written the file. Raises ConvertError for a file
    of other bytes."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        same = all(file.read(len(data)) == data for data in _parts(layout, tensors)) and not file.read(1)
    if not same:
        raise ConvertError("another file is there already", str(path), "move it out of the way")
    return True


def _parts(layout: GgufLayout, tensors: dict[str, EncodedTensor]) -> Iterator[bytes]:
    """All bytes of one file of the layout, in order."""
    yield layout.header
    position = len(layout.header)
    for entry, offset in zip(layout.tensors, layout.offsets, strict=True):
        yield bytes(offset - position)
        source, left = tensors[entry.name], entry.n_bytes
        with source.path.open("rb") as origin:
            origin.seek(source.offset)
            while left:
                data = origin.read(min(left, _COPIED_AT_ONCE))
                if not data:
                    raise ConvertError("the artifact has been cut short", str(source.path), "write it again")
                yield data
                left -= len(data)
        position = offset + entry.n_bytes
    yield bytes(layout.n_bytes - position)


def _write_report(report: Report, path: Path, shards: list[Path], shard_bytes: int) -> None:
    """The same report of the shards, with the command that writes them at once."""
    files = tuple(ArtifactFile(str(shard), shard.stat().st_size, file_sha256(shard)) for shard in shards)
    rewritten = replace(
        report,
        artifact=replace(report.artifact, bytes=sum(file.bytes for file in files), files=files),
        arguments=tuple(with_option(report.arguments, f"{_SIZE}{shard_bytes}")),
    )
    write_sealed(path, "report", json.dumps(rewritten.to_dict(), indent=1).encode())
