"""The one place where this tool changes the disk, in steps that an observer can see.

    make     a directory, or an empty file
    write    bytes of a file, or its length
    sync     what was written, or the names in a directory, to the disk itself
    rename, remove

An observer is shown every step just before it is taken. Tests have one: it copies the disk as a kill would leave it, or
raises what a failing disk raises.
"""

import errno
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, cast

from bitwright.formats.errors import ConvertError

Step = Literal["make", "write", "sync", "rename", "remove"]
Observer = Callable[[Step, Path], None]

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What flock says on a file system that has no locks, such as some network mounts."""

_REMEDY = "make room or mend the disk, then run the same command again: it continues from here"
_observer: Observer | None = None


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Show the observer every step until the block ends. What it raises, the step raises."""
    global _observer  # noqa: PLW0603
    previous, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = previous


def _step(step: Step, path: Path) -> None:
    if _observer is not None:
        _observer(step, path)


@contextmanager
def _explained(doing: str, path: Path, remedy: str = _REMEDY) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConvertError(f"{doing} failed: {error.strerror}", str(path), remedy) from error


class _RawFile(io.FileIO):
    """A file for reading and writing that is there afterwards; each call is one of the system."""

    def __init__(self, path: Path, fresh: bool):
        self.path = path
        if fresh or not path.exists():
            _step("make", path)
        flags = os.O_CREAT | (os.O_TRUNC if fresh else 0)
        super().__init__(path, "r+", opener=lambda name, mode: os.open(name, mode | flags, 0o666))

    def write(self, data: object) -> int:
        _step("write", self.path)
        return super().write(data)  # type: ignore[arg-type]

    def truncate(self, size: int | None = None) -> int:
        _step("write", self.path)
        return super().truncate(size)


def open_file(path: Path, fresh: bool = False) -> BinaryIO:
    """A file for reading and writing anywhere in it, made where there is none; fresh: without what is in it.
    Its steps raise OSError, which the caller explains."""
    return cast(BinaryIO, io.BufferedRandom(_RawFile(path, fresh)))


def sync_file(file: BinaryIO) -> None:
    """What was written to a file of open_file is on the disk when this returns. Raises OSError."""
    file.flush()
    _step("sync", Path(file.name))
    os.fsync(file.fileno())


def open_descriptor(path: Path) -> int:
    """Of a file for reading and writing, made where there is none. Raises OSError."""
    if not path.exists():
        _step("make", path)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def write_at(descriptor: int, path: Path, data: memoryview, offset: int) -> None:
    """Write bytes to their place in a file, from any thread. Raises OSError."""
    _step("write", path)
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, data[written:], offset + written)


def sync_descriptor(descriptor: int, path: Path) -> None:
    """Raises OSError."""
    _step("sync", path)
    os.fsync(descriptor)


def sync_directory(directory: Path) -> None:
    """Make the renames in a directory survive a power cut. Raises ConvertError."""
    with _explained("writing", directory):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            sync_descriptor(descriptor, directory)
        finally:
            os.close(descriptor)


def make_directory(directory: Path, remedy: str = _REMEDY) -> None:
    """With its parents, where it is not there yet. Raises ConvertError."""
    if not directory.is_dir():
        with _explained("making the directory", directory, remedy):
            _step("make", directory)
            directory.mkdir(parents=True, exist_ok=True)


def rename(source: Path, target: Path) -> None:
    """A file replaces what has the name; a directory only an empty one. Raises ConvertError."""
    with _explained("writing", target):
        _step("rename", target)
        os.replace(source, target)


def take_name(source: Path, target: Path) -> None:
    """Rename a file or a directory to a name that nothing has; an empty directory may give way to a directory.

    Raises FileExistsError, or another OSError, where something has that name, be it for no longer than this moment. On
    a file system without hard links a file that appears at this very moment would be replaced.
    """
    _step("rename", target)
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
    _step("remove", source)
    source.unlink()


def remove(path: Path) -> None:
    """A file, if it is there. Raises ConvertError."""
    if path.exists() or path.is_symlink():
        with _explained("removing", path):
            _step("remove", path)
            path.unlink(missing_ok=True)


def remove_tree(directory: Path) -> None:
    """A directory, if it is there, with all that is in it; links are not followed. Raises ConvertError.

    It loses its name first, so that no half of it is taken for the whole; one whose name begins with a dot is a
    leftover already. What a kill leaves of it goes with the next call.
    """
    if not directory.name.startswith("."):
        removed = directory.with_name(f".{directory.name}.removed")
        remove_tree(removed)
        if not directory.is_dir():
            return
        rename(directory, removed)
        directory = removed
    if not directory.is_dir():
        return
    for root, directories, names in os.walk(directory, topdown=False):
        for name in names:
            remove(Path(root, name))
        for name in directories:
            remove_directory(Path(root, name))
    remove_directory(directory)


def remove_directory(path: Path) -> None:
    """An empty directory, or a link to one. Raises ConvertError."""
    if path.is_symlink():
        remove(path)
        return
    with _explained("removing", path):
        _step("remove", path)
        path.rmdir()


def file_state(path: Path) -> tuple[int, int] | None:
    """What is another whenever the file has been written: its time in ns and its size; None for no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
