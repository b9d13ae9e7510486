"""Seals: the hashes of results that are kept, in a journal beside them, so that none is used that has changed since.

seals.jsonl   JSON lines {"file", "sha256"}; of a file the last one counts
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from formats.files import file_sha256, rename, sync_directory
from formats.journal import append_line, read_lines
from formats.whole_file import whole_file

SEALS = "seals.jsonl"


@contextmanager
def sealed(path: Path) -> Iterator[Path]:
    """Where to write a file that takes its name, sealed, when the block ends well. The seal comes first: a file with
    this name is never without one. Raises ConvertError."""
    draft = _draft(path)
    yield draft
    append_line(path.with_name(SEALS), {"file": path.name, "sha256": file_sha256(draft)})
    rename(draft, path)
    sync_directory(path.parent)


def finish(path: Path) -> None:
    """Give a file that is sealed its name, where a kill came between the two. Raises ConvertError."""
    draft = _draft(path)
    if draft.is_file() and _seal(path) == file_sha256(draft):
        rename(draft, path)
        sync_directory(path.parent)


def _draft(path: Path) -> Path:
    return path.with_name(f".unsealed-{path.name}")


def write_sealed(path: Path, what: str, content: bytes) -> None:
    """what: as of whole_file. Raises ConvertError."""
    with sealed(path) as draft, whole_file(draft, what) as file:
        file.write(content)


def is_sound(path: Path) -> bool:
    """Whether the file is there, and what it was when it was sealed."""
    return path.is_file() and _seal(path) == file_sha256(path)


def is_sealed(path: Path) -> bool:
    """Whether a file of this name was sealed, be it there or not."""
    return _seal(path) is not None


def _seal(path: Path) -> str | None:
    return {entry["file"]: entry["sha256"] for entry in read_lines(path.with_name(SEALS))}.get(path.name)
