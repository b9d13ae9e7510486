"""Seals: the hashes of results that are kept, in a journal beside them, so that none is used that has changed since.

seals.jsonl   JSON lines {"file", "sha256"}; of a file the last one counts
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitwright.formats.files.disk import file_sha256, rename, sync_directory
from bitwright.formats.files.journal import append_line, read_lines
from bitwright.formats.files.whole import whole_file

SEALS = "seals.jsonl"


@contextmanager
def sealed(path: Path) -> Iterator[Path]:
    """Where to write a file that takes its name, sealed, when the block ends well. The seal comes first: a file with
    this name is never without one. Raises ConvertError."""
    draft = path.with_name(f".unsealed-{path.name}")
    yield draft
    append_line(path.with_name(SEALS), {"file": path.name, "sha256": file_sha256(draft)})
    rename(draft, path)
    sync_directory(path.parent)


def write_sealed(path: Path, what: str, content: bytes) -> None:
    """what: as of whole_file. Raises ConvertError."""
    with sealed(path) as draft, whole_file(draft, what) as file:
        file.write(content)


def is_sound(path: Path) -> bool:
    """Whether the file is there, and what it was when it was sealed."""
    return path.is_file() and _seal(path) == file_sha256(path)


def was_sealed(path: Path) -> bool:
    """Whether the file is there, and what it was when it was sealed last or before: a kill may come between the seal
    and the name of what takes its place."""
    return path.is_file() and file_sha256(path) in _seals(path)


def is_sealed(path: Path) -> bool:
    """Whether a file of this name was sealed, be it there or not."""
    return _seal(path) is not None


def sealed_files(directory: Path) -> dict[str, str]:
    """Name -> SHA-256 of the files in a directory that are there and were sealed, by name."""
    last = {entry["file"]: entry["sha256"] for entry in read_lines(directory / SEALS)}
    return {name: last[name] for name in sorted(last) if (directory / name).is_file()}


def _seal(path: Path) -> str | None:
    return next(reversed(_seals(path)), None)


def _seals(path: Path) -> list[str]:
    return [entry["sha256"] for entry in read_lines(path.with_name(SEALS)) if entry["file"] == path.name]
