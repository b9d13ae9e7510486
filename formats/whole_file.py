"""Writing a file whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from formats.errors import ConvertError


@contextmanager
def whole_file(path: Path, what: str, remedy: str = "check the directory and its space") -> Iterator[BinaryIO]:
    """A file that takes its name when the block ends well, flushed to the disk; until then the old one is there.

    what: the file's kind, for the ConvertError, with that remedy, when it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise ConvertError(f"the {what} cannot be written ({error.strerror})", str(path), remedy) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Make the renames in a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
