"""Progress on stderr: a bar with rate and remaining time on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Called by the stages as progress(stage, done, total, unit); units are counted ("layers") or bytes ("B").

    It falls silent when stderr takes no more, on a full disk or where the terminal is gone: that ends no job.
    """

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self._bar: tqdm | None = None
        self._stage = ""
        self._last_line = 0.0

    def __call__(self, stage: str, done: int, total: int, unit: str) -> None:
        with self._unless_stderr_fails():
            if self.quiet or sys.stderr is None:
                return
            if sys.stderr.isatty():
                self._draw(stage, done, total, unit)
            else:
                self._print(stage, done, total, unit)

    @contextmanager
    def _unless_stderr_fails(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):
            self.quiet, self._bar = True, None

    def _draw(self, stage: str, done: int, total: int, unit: str) -> None:
        if self._bar is None or self._stage != stage:
            self.close()
            self._stage = stage
            self._bar = tqdm(
                desc=stage, total=total, unit=unit, initial=done, unit_scale=unit == "B", unit_divisor=1024, leave=True
            )
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()

    def _print(self, stage: str, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        if stage == self._stage and done < total and now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._stage, self._last_line = stage, now
        counted = f"{size_text(done)} of {size_text(total)}" if unit == "B" else f"{done} of {total} {unit}"
        print(f"{stage}: {counted}", file=sys.stderr, flush=True)

    def close(self) -> None:
        with self._unless_stderr_fails():
            if self._bar is not None:
                self._bar.close()
        self._bar, self._stage = None, ""

    def say(self, message: str) -> None:
        """One line for the user, above a bar if one is drawn."""
        with self._unless_stderr_fails():
            if not self.quiet and sys.stderr is not None:
                tqdm.write(message, file=sys.stderr)


def size_text(n_bytes: float) -> str:
    """Bytes in the largest binary unit that leaves a number of at least one: 1.50 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.2f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.2f} TiB"
