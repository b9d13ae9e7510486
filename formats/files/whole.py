"""Writing a file whole or not at all."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import open_file, remove, rename, sync_directory, sync_file
from bitwright.formats.names import hidden_path

_ENDING = "tmp"

Place = Callable[[Path, Path], object]
"""Gives what lies at the first path the name of the second."""


@contextmanager
def whole_file(
    path: Path,
    what: str,
    remedy: str = "check the directory and its space",
    place: Place = rename,
) -> Iterator[BinaryIO]:
    """A file that takes its name when the block ends well, flushed to the disk; until then the old one is there.

    what: the file's kind, for the ConvertError, with that remedy, when it cannot be written. place: gives the whole
    file its name, and decides what becomes of another one that has it.
    """
    temporary = hidden_path(path, _ENDING)
    try:
        with open_file(temporary, fresh=True) as file:
            yield file
            sync_file(file)
        place(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise ConvertError(f"the {what} cannot be written ({error.strerror})", str(path), remedy) from error
    finally:
        remove(temporary)


def copy_file(source: Path, target: Path) -> None:
    """Raises ConvertError; what is at the target is whole, as it was or as the source is."""
    with whole_file(target, "copy") as file, source.open("rb") as origin:
        shutil.copyfileobj(origin, file)


def remove_temporary(path: Path) -> None:
    """What a kill has left amid writing this file, if anything. Raises ConvertError."""
    remove(hidden_path(path, _ENDING))


def is_temporary(path: Path) -> bool:
    """Whether a kill has left the file, amid being written, in a directory where nobody but this tool writes."""
    return path.name.startswith(".") and path.name.endswith(f".{_ENDING}")
