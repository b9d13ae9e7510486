"""The one gate to files that somebody else has made: regular files alone, and what is read whole has a limit.

A pipe named config.json would keep a reader waiting for ever, a link to /dev/zero would fill the memory.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from bitwright.formats.errors import ConvertError

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
LARGEST_METADATA_BYTES = 256 << 20
"""Of a file beside the weights: the largest tokenizer.json that is known has a fifth of it."""


def open_regular(path: Path, remedy: str = "name a readable file") -> BinaryIO:
    """The file, open for reading. Raises ConvertError, at once, for what is absent, unreadable or no regular file."""
    try:
        # A pipe without a writer is opened at once this way; of a regular file it changes nothing.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise ConvertError(f"the file cannot be read ({error.strerror})", str(path), remedy) from None
    except ValueError as error:  # a name with a zero byte in it
        raise ConvertError(f"the file cannot be read ({error})", repr(str(path)), remedy) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise ConvertError(f"the file cannot be read: it is {kind} and no regular file", str(path), remedy)
    return os.fdopen(descriptor, "rb")


def check_size(path: Path, limit: int, remedy: str) -> None:
    """Raises ConvertError as open_regular does, and for more than `limit` bytes."""
    with open_regular(path, remedy) as file:
        _check_size(file, path, limit, remedy)


def read_whole(path: Path, limit: int, remedy: str = "name a readable file") -> bytes:
    """Its content. Raises ConvertError as check_size does."""
    with open_regular(path, remedy) as file:
        size = _check_size(file, path, limit, remedy)
        try:
            return file.read(size)
        except OSError as error:
            raise ConvertError(f"the file cannot be read ({error.strerror})", str(path), remedy) from None


def _check_size(file: BinaryIO, path: Path, limit: int, remedy: str) -> int:
    size = os.fstat(file.fileno()).st_size
    if size > limit:
        raise ConvertError(f"the file has {size} bytes, and {limit} are the most for its kind", str(path), remedy)
    return size


def read_json(path: Path, limit: int = LARGEST_METADATA_BYTES, remedy: str = "fetch this file again") -> dict[str, Any]:
    """The JSON object in the file. Raises ConvertError as read_whole does, and for anything else in it."""
    return parse_json(read_whole(path, limit, remedy), str(path), path.name, remedy)


def parse_json(text: bytes | str, where: str, what: str, remedy: str) -> dict[str, Any]:
    """The JSON object that `what` is. Raises ConvertError for anything else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{what} is no JSON: {error}", where, remedy) from None
    if not isinstance(content, dict):
        raise ConvertError(f"{what} is no JSON object", where, remedy)
    return content
