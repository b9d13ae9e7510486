"""Journals: JSON lines of what is done, by which an interrupted run continues.

Each line is an object that ends with "check", a hash of the rest: a line that was cut short or changed does not count.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import open_file, sync_file

_CHECK = "check"


def read_lines(path: Path, say: Callable[[str], object] | None = None) -> Iterator[dict[str, Any]]:
    """The lines in order that are as they were written, none where there is no file. say: is told of damaged ones; a
    last one that a kill has cut short is none of these."""
    *lines, rest = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else [""]
    entries = [_entry(line) for line in lines]
    damaged = entries.count(None) - lines.count("")
    if damaged and say is not None:
        say(f"{path}: {damaged} of {len(lines)} lines are damaged: what they were about is done again")
    for entry in (*entries, _entry(rest)):
        if entry is not None:
            yield entry


def _entry(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or entry.pop(_CHECK, None) != _hash(entry):
        return None
    return entry


def _hash(entry: Mapping[str, Any]) -> str:
    return blake2b(json.dumps(entry).encode(), digest_size=8).hexdigest()


def _mended(file: BinaryIO) -> bytes:
    """Cut off what a kill has left of the last line; what is to be written first where it only lacks its end."""
    file.seek(0)
    *_, last = file.read().rpartition(b"\n")
    if _entry(last.decode(errors="replace")) is not None:
        return b"\n"
    file.seek(file.tell() - len(last))
    file.truncate()
    return b""


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Add a line, on the disk when this returns; the first one makes the file. Raises ConvertError."""
    line = json.dumps({**entry, _CHECK: _hash(entry)}).encode() + b"\n"
    try:
        with open_file(path) as file:
            if file.seek(0, os.SEEK_END) > 0:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    line = _mended(file) + line
            file.write(line)
            sync_file(file)
    except OSError as error:
        raise ConvertError(
            f"the journal cannot be written ({error.strerror})",
            str(path),
            "make room or mend the disk, then run the same command again: it continues from here",
        ) from error
