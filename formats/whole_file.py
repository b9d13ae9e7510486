"""Writing a file whole or not at all."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from formats.errors import ConvertError
from formats.names import hidden_path

Place = Callable[[Path, Path], object]
"""Gives what lies at the first path the name of the second."""


@contextmanager
def whole_file(
    path: Path,
    what: str,
    remedy: str = "check the directory and its space",
    place: Place = os.replace,
) -> Iterator[BinaryIO]:
    """A file that takes its name when the block ends well, flushed to the disk; until then the old one is there.

    what: the file's kind, for the ConvertError, with that remedy, when it cannot be written. place: gives the whole
    file its name, and decides what becomes of another one that has it.
    """
    temporary = hidden_path(path, "tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        place(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise ConvertError(f"the {what} cannot be written ({error.strerror})", str(path), remedy) from error
    finally:
        temporary.unlink(missing_ok=True)


def take_name(source: Path, target: Path) -> None:
    """Rename a file or a directory to a name that nothing has; an empty directory may give way to a directory.

    Raises FileExistsError, or another OSError, where something has that name, be it for no longer than this moment. On
    a file system without hard links a file that appears at this very moment would be replaced.
    """
    if source.is_dir():
        source.rename(target)  # fails for anything but an empty directory
        return
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        source.rename(target)
        return
    source.unlink()


def sync_directory(directory: Path) -> None:
    """Make the renames in a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
