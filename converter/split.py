"""The command `convert split`: an artifact in one file becomes one in several, without encoding anything again."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from converter.gguf_source import open_parts
from converter.job import default_work_dir, file_sha256
from converter.progress import Progress
from converter.records import REPORT, read_report
from formats.errors import ConvertError
from formats.files import take_name
from formats.gguf_file import EncodedTensor, GgufLayout, lay_out
from formats.seals import write_sealed
from formats.whole_file import remove_temporary, whole_file

_COPIED_AT_ONCE = 1 << 24
_SIZE = "--split-size="


def split(artifact: Path, shard_bytes: int, work_dir: Path | None, progress: Progress) -> list[Path]:
    """Write the artifact's tensors into files of at most shard_bytes beside it, byte for byte the files that
    `convert --split-size` would have written; the report beside it then is of these. The file itself stays. A call that
    was ended before it was done is continued by the next.

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
        if not _is_of(report, artifact, tensors, lambda n_bytes: lay_out(artifact.name, metadata, entries, n_bytes)):
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
        _rewrite_report(report, work_dir / REPORT, paths, shard_bytes)
    return paths


def _is_of(
    report: dict[str, Any],
    artifact: Path,
    tensors: dict[str, EncodedTensor],
    layouts: Callable[[int], list[GgufLayout]],
) -> bool:
    """Whether the report is of this artifact, whole or as it was split before. layouts: of a size of files."""
    described = [file["sha256"] for file in report["artifact"]["files"]]
    if described == [file_sha256(artifact)]:
        return True
    sizes = [word.removeprefix(_SIZE) for word in report["arguments"] if word.startswith(_SIZE)]
    if len(sizes) != 1 or not sizes[0].isdecimal():
        return False
    split_before = layouts(int(sizes[0]))
    return len(split_before) == len(described) and all(
        _sha256(_parts(layout, tensors)) == sha256 for layout, sha256 in zip(split_before, described, strict=True)
    )


def _sha256(parts: Iterator[bytes]) -> str:
    found = hashlib.sha256()
    for data in parts:
        found.update(data)
    return found.hexdigest()


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


def _rewrite_report(report: dict[str, Any], path: Path, shards: list[Path], shard_bytes: int) -> None:
    """The report is of the shards from now on, and so is the command that it gives."""
    files = [{"path": str(p), "bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in shards]
    *options, model = [word for word in report["arguments"] if not word.startswith(_SIZE)]
    report["artifact"] |= {"bytes": sum(p.stat().st_size for p in shards), "files": files}
    report["arguments"] = [*options, f"{_SIZE}{shard_bytes}", model]
    write_sealed(path, "report", json.dumps(report, indent=1).encode())
