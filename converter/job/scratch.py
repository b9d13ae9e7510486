"""Directories for what a command needs only while it runs."""

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import NO_LOCKS, remove_tree

_PREFIX = ".bitwright-scratch-"
_NAME = re.compile(re.escape(_PREFIX) + r"[a-z0-9_]{8}")  # as tempfile.mkdtemp completes it
_MARK = ".made-by-bitwright"


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A directory for temporary files, removed at the end.

    First the directories that killed processes of this user left behind are removed. They hold our mark or nothing, and
    are not locked: a living process holds the lock of its own.
    """
    for leftover in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        descriptor = _lock(leftover) if _NAME.fullmatch(leftover.name) else None
        if descriptor is not None:
            try:
                if _is_ours(leftover):
                    remove_tree(leftover)
            finally:
                os.close(descriptor)
    while True:
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
        try:
            descriptor = _lock(directory)
        except ConvertError:
            directory.rmdir()
            raise
        if descriptor is not None:
            break  # otherwise another process removed it as a leftover before it was locked
    try:
        (directory / _MARK).touch()
        yield directory
    finally:
        remove_tree(directory)
        os.close(descriptor)


def _is_ours(directory: Path) -> bool:
    mark = directory / _MARK
    return (mark.is_file() and not mark.is_symlink()) or not any(directory.iterdir())


def _lock(directory: Path) -> int | None:
    """A descriptor that locks the directory while it is open; None where it is gone, another user's, or locked. Raises
    ConvertError on a file system without locks."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_uid == os.getuid() and os.path.samestat(
            os.fstat(descriptor), os.stat(directory, follow_symlinks=False)
        ):
            return descriptor
    except OSError as error:
        if error.errno in NO_LOCKS:
            os.close(descriptor)
            raise ConvertError(
                f"the directory for temporary files cannot be locked ({error.strerror})",
                str(directory.parent),
                "set TMPDIR to a directory on a disk of this machine",
            ) from None
    os.close(descriptor)
    return None
