"""Directories for what a command needs only while it runs."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from formats.files import remove_tree

_PREFIX = ".bitwright-"


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A directory where temporary files go, removed in the end. Those that killed processes of this user have left are
    removed now: a living one holds the lock of its own."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        descriptor = _lock(left)
        if descriptor is not None:
            try:
                remove_tree(left)
            finally:
                os.close(descriptor)
    while True:
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
        descriptor = _lock(directory)
        if descriptor is not None:
            break  # otherwise another process took it for one that is left, before it was locked
    try:
        yield directory
    finally:
        remove_tree(directory)
        os.close(descriptor)


def _lock(directory: Path) -> int | None:
    """A descriptor that holds the directory, while it is open; None where it is gone, another user's, or held."""
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
    except OSError:
        pass
    os.close(descriptor)
    return None
