"""Progress on stderr: a bar with rate and remaining time on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from bitwright.profiles.sizes import size_text

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
        self._last: tuple[str, int, int] | None = None

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
            if done >= total and (stage, done, total) == self._last:
                return  # said already: a bar is closed when its stage is done
            self.close()
            self._stage = stage
            self._bar = tqdm(
                desc=stage, total=total, unit=unit, initial=done, unit_scale=unit == "B", unit_divisor=1024, leave=True
            )
        self._bar.update(done - self._bar.n)
        self._last = stage, done, total
        if done >= total:
            self.close()

    def _print(self, stage: str, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        if (stage, done, total) == self._last:
            return
        self._last = stage, done, total
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


class Clock:
    """Wall-clock seconds of each stage of this run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.monotonic() - start, 3)
