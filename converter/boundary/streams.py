"""Standard streams whose failure ends no job: output that a full disk or a closed terminal refuses is lost, and nothing
else is."""

import io
import os
import sys
from typing import Any


def keep_streams_usable() -> None:
    """Prepare the process of a command: stderr never fails, an error of stdout names stdout, and no file that we open
    gets the descriptor of a standard stream that is closed."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, this one
    if sys.stderr is sys.__stderr__:  # otherwise the caller has replaced it
        raw = io.BufferedWriter(_Forgiving(), 1 << 13)
        sys.stderr = io.TextIOWrapper(raw, "utf-8", "backslashreplace", line_buffering=True)
    if sys.stdout is sys.__stdout__ and sys.stdout is not None:
        out = sys.stdout
        named = io.BufferedWriter(_Stdout(1, "w", closefd=False), 1 << 13)
        sys.stdout = io.TextIOWrapper(named, out.encoding, out.errors, line_buffering=out.line_buffering)


def give_up_stdout() -> None:
    """Drop output that stdout refuses, so that the process ends with its own exit code."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class _Stdout(io.FileIO):
    """The process's stdout. Its errors name it."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = "stdout"
            raise


class _Forgiving(io.RawIOBase):
    """The process's stderr. A write that fails counts as done."""

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
