"""The command `convert split`: an artifact in one file becomes one in several, without encoding anything again."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from converter.gguf_source import open_parts
from converter.job import default_work_dir, file_sha256
from converter.progress import Progress
from formats.errors import ConvertError
from formats.gguf_file import EncodedTensor, GgufLayout, lay_out
from formats.whole_file import take_name, whole_file

_COPIED_AT_ONCE = 1 << 24


def split(artifact: Path, shard_bytes: int, work_dir: Path | None, progress: Progress) -> list[Path]:
    """Write the artifact's tensors into files of at most shard_bytes beside it, byte for byte the files that
    `convert --split-size` would have written; the report beside it then is of these. The file itself stays.

    Raises ConvertError for an artifact that is split already or fits in one file, and where a file is in the way.
    """
    metadata, tensors, entries = open_parts(artifact)
    layouts = lay_out(artifact.name, metadata, entries, shard_bytes)
    if len(layouts) == 1:
        raise ConvertError(
            f"the artifact has {artifact.stat().st_size} bytes, which is no more than {shard_bytes}",
            str(artifact),
            "nothing is to be done; give a smaller --split-size where it should be split all the same",
        )
    paths = [artifact.with_name(layout.file_name) for layout in layouts]
    for path in paths:
        if os.path.lexists(path):
            raise ConvertError("the file is there already", str(path), "move it out of the way")
    needed, free = sum(layout.n_bytes for layout in layouts), shutil.disk_usage(artifact.parent).free
    if needed > free:
        raise ConvertError(f"{needed} bytes are needed, {free} are free", str(artifact.parent), "make room")
    done = 0
    for layout, path in zip(layouts, paths, strict=True):
        with whole_file(path, "artifact", "make room, then run the command again", take_name) as file:
            for n_bytes in _copy(layout, tensors, file):
                done += n_bytes
                progress("split", done, needed, "B")
    report = (work_dir or default_work_dir(artifact)) / "report.json"
    if report.exists():
        _rewrite_report(report, paths, shard_bytes)
    return paths


def _copy(layout: GgufLayout, tensors: dict[str, EncodedTensor], file: BinaryIO) -> Iterator[int]:
    """Write one file of the layout; yields the bytes of data as they are copied."""
    file.write(layout.header)
    for entry, offset in zip(layout.tensors, layout.offsets, strict=True):
        file.write(bytes(offset - file.tell()))
        source, left = tensors[entry.name], entry.n_bytes
        with source.path.open("rb") as origin:
            origin.seek(source.offset)
            while left:
                data = origin.read(min(left, _COPIED_AT_ONCE))
                file.write(data)
                left -= len(data)
                yield len(data)
    file.write(bytes(layout.n_bytes - file.tell()))


def _rewrite_report(path: Path, shards: list[Path], shard_bytes: int) -> None:
    """The report is of the shards from now on, and so is the command that it gives."""
    report: dict[str, Any] = json.loads(path.read_bytes())
    files = [{"path": str(p), "bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in shards]
    *options, model = [word for word in report["arguments"] if not word.startswith("--split-size=")]
    report["artifact"] |= {"bytes": sum(p.stat().st_size for p in shards), "files": files}
    report["arguments"] = [*options, f"--split-size={shard_bytes}", model]
    with whole_file(path, "report") as file:
        file.write(json.dumps(report, indent=1).encode())
