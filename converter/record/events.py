"""What a command does, as it does it, for programs: JSON lines, described in docs/automation.md.

Every line is an object with "event", its kind, and "time", seconds since 1970. The first of a command is "begin" and
states the version of this schema, the last one is "done" or "error". A later version may add kinds and keys; one that
takes something away, or gives it another meaning, has another number.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from bitwright.converter.record.secrets import redacted
from bitwright.formats.errors import ConvertError

SCHEMA, VERSION = "bitwright.events", 1
KINDS = (
    *("begin", "forecast", "stage_start", "progress", "message", "stage_end"),
    *("artifact", "verdict", "error", "done"),
)
"""Every kind of event."""


class Events:
    """A file that events are appended to. One that takes no more, on a full disk or where its reader is gone, ends no
    job."""

    def __init__(self, path: Path, now: Callable[[], float] = time.time):
        """Raises ConvertError where the file cannot be opened."""
        self._now = now
        try:
            self._file: TextIO | None = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise ConvertError(
                f"the events cannot be written ({error.strerror})", str(path), "name a file with --events"
            ) from None

    def __call__(self, event: str, **facts: Any) -> None:
        """One event of a kind of KINDS; facts: plain JSON data."""
        if self._file is None:
            return
        line = json.dumps({"event": event, "time": round(self._now(), 3), **_without_secrets(facts)})
        try:
            self._file.write(f"{line}\n")
        except (OSError, ValueError):
            self.close()

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()


def _without_secrets(data: Any) -> Any:
    if isinstance(data, str):
        return redacted(data)
    if isinstance(data, dict):
        return {key: _without_secrets(value) for key, value in data.items()}
    return [_without_secrets(value) for value in data] if isinstance(data, list | tuple) else data
