"""The command `convert split`: an artifact in one file becomes one in several, without encoding anything again."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from converter.gguf_source import open_parts
from converter.job import default_work_dir, file_sha256
from converter.progress import Progress
from formats.errors import ConvertError
from formats.files import take_name
from formats.gguf_file import EncodedTensor, GgufLayout, lay_out
from formats.seals import write_sealed
from formats.whole_file import remove_temporary, whole_file

_COPIED_AT_ONCE = 1 << 24


def split(artifact: Path, shard_bytes: int, work_dir: Path | None, progress: Progress) -> list[Path]:
    """Write the artifact's tensors into files of at most shard_bytes beside it, byte for byte the files that
    `convert --split-size` would have written; the report beside it then is of these. The file itself stays. A call that
    was ended before it was done is continued by the next.

    Raises ConvertError for an artifact that is split already or fits in one file, and where another file is in the way.
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
    report = (work_dir or default_work_dir(artifact)) / "report.json"
    if report.exists():
        _rewrite_report(report, paths, shard_bytes)
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


def _rewrite_report(path: Path, shards: list[Path], shard_bytes: int) -> None:
    """The report is of the shards from now on, and so is the command that it gives."""
    report: dict[str, Any] = json.loads(path.read_bytes())
    files = [{"path": str(p), "bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in shards]
    *options, model = [word for word in report["arguments"] if not word.startswith("--split-size=")]
    report["artifact"] |= {"bytes": sum(p.stat().st_size for p in shards), "files": files}
    report["arguments"] = [*options, f"--split-size={shard_bytes}", model]
    write_sealed(path, "report", json.dumps(report, indent=1).encode())
