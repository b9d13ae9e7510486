"""Standard streams that end no job: what a full disk or a closed terminal does not take is lost, and nothing else."""

import io
import os
import sys
from typing import Any


def keep_streams_usable() -> None:
    """For a command's process: stderr never fails, and no file of ours takes the number of a stream that is closed."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, this one
    if sys.stderr is sys.__stderr__:  # else whoever runs us has put their own there
        raw = io.BufferedWriter(_Forgiving(), 1 << 13)
        sys.stderr = io.TextIOWrapper(raw, "utf-8", "backslashreplace", line_buffering=True)


def give_up_stdout() -> None:
    """Forget what stdout does not take, so that the process ends with its own exit code."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class _Forgiving(io.RawIOBase):
    """The process's stderr."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            return os.write(2, data)
        except OSError:
            return len(data)

    def fileno(self) -> int:
        return 2

    def isatty(self) -> bool:
        return os.isatty(2)
