"""The log of a job: what was said, when, and the whole of an error, for whoever looks later."""

import traceback
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TextIO

from bitwright.converter.record.secrets import redacted

LOG_FILE = "job.log"
"""Its name in the work directory."""


class Log:
    """A file that lines are appended to, each with the time. One that cannot be written ends no job: a run on a full
    disk has better to say than that."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file: TextIO | None = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        except OSError:
            self._file = None

    @property
    def is_written(self) -> bool:
        return self._file is not None

    def write(self, text: str) -> None:
        """One entry; its further lines are indented."""
        if self._file is None:
            return
        first, *others = redacted(text).splitlines() or [""]
        stamp = datetime.now().astimezone().isoformat(timespec="seconds")
        try:
            self._file.write("\n".join([f"{stamp} {first}", *(f"    {line}" for line in others)]) + "\n")
        except (OSError, ValueError):
            self.close()

    def write_error(self, error: BaseException) -> None:
        """The error with its traceback."""
        self.write("".join(traceback.format_exception(error)).rstrip())

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()
