"""Progress on stderr: a bar with rate and remaining time on a terminal, a plain line now and then elsewhere; and the
same for programs (--events) and for later (the log in the work directory)."""

import logging
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bitwright.converter.record.events import SCHEMA, VERSION, Events
from bitwright.converter.record.forecast import Forecast, Steps
from bitwright.converter.record.log import Log
from bitwright.formats.errors import ConvertError
from bitwright.profiles.sizes import size_text

_SECONDS_BETWEEN_LINES, _SECONDS_BETWEEN_EVENTS = 10.0, 1.0
_PACKAGE, _COMPILER = "bitwright", "bitwright.formats.compiler"  # as their loggers are called


class Progress:
    """Called by the stages as progress(stage, done, total, unit); units are counted ("layers") or bytes ("B").

    It falls silent when stderr takes no more, on a full disk or where the terminal is gone: that ends no job. quiet:
    nothing on stderr; events and log are as ever.
    """

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.steps = Steps()
        self.log: Log | None = None
        self.on_work: Callable[[str, int, float], object] | None = None
        self._events: Events | None = None
        self._bar: tqdm | None = None
        self._stage = ""
        self._last_line = 0.0
        self._last: tuple[str, int, int] | None = None
        self._part = _Part()
        self._step_began = time.monotonic()
        self._lock = threading.RLock()
        self._reused = False
        self._command = ""
        self._before_the_log: list[str] | None = None

    def __call__(self, stage: str, done: int, total: int, unit: str) -> None:
        self._part.went_on(stage, done, total)
        self._record(stage, done, total, unit)
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
            binary = "iB" if unit == "B" else unit  # as tqdm writes MiB
            self._bar = tqdm(
                desc=stage,
                total=total,
                unit=binary,
                initial=done,
                unit_scale=unit == "B",
                unit_divisor=1024,
                leave=True,
            )
        self._bar.set_postfix_str(self._where(), refresh=False)
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
        where = self._where()
        line = f"{stage}: {_counted(done, total, unit)}" + (f"  ({where})" if where else "")
        print(line, file=sys.stderr, flush=True)

    def _where(self) -> str:
        return self.steps.text(time.monotonic() - self._step_began, self._part.seconds_left)

    def close(self) -> None:
        with self._unless_stderr_fails():
            if self._bar is not None:
                self._bar.close()
        self._bar, self._stage = None, ""

    def say(self, message: str) -> None:
        """One line for the user, above a bar if one is drawn."""
        self._note(message)
        self._tell("message", text=message.removeprefix("warning: "), warning=message.startswith("warning: "))
        self._show(message)

    def _show(self, message: str) -> None:
        with self._unless_stderr_fails():
            if not self.quiet and sys.stderr is not None:
                tqdm.write(_for_terminal(message) if sys.stderr.isatty() else message, file=sys.stderr)

    # The steps of a job.

    def expect(self, forecast: Forecast, again: bool = False) -> None:
        """What the job will take, said and counted down. again: a better one amid the job, which is not said."""
        for line in forecast.lines():
            self._note(line)
            if not again:
                self._show(line)
        self._tell("forecast", **forecast.to_dict())
        if again:
            self.steps.expect(forecast.steps)
        else:
            self.steps = Steps(forecast.steps)

    def reuse(self) -> None:
        """Something of this stage was found, and not done, or took time but once: its time says nothing."""
        self._reused = True

    def took(self, what: str, amount: int, seconds: float) -> None:
        """So much of a tensor was done in so many seconds."""
        if self.on_work is not None:
            self.on_work(what, amount, seconds)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[], bool]]:
        """A stage of the job, from its beginning to its end; asks whether all of it was done."""
        self.steps.begin(name)
        self._reused = False
        self._part, self._step_began = _Part(), time.monotonic()
        place = self.steps.text()
        left = self.steps.left(0.0)
        self._note(f"{place or 'stage'}: {name}")
        self._tell(
            "stage_start",
            stage=name,
            step=None if self.steps.index is None else self.steps.index + 1,
            steps=len(self.steps.steps),
            seconds_left=None if left is None else round(left[0], 1),
        )
        if place:
            self._show(f"{place}: {name}")
        yield lambda: not self._reused
        seconds = round(time.monotonic() - self._step_began, 3)
        self._note(f"{name} took {seconds:.1f} s")
        self._tell("stage_end", stage=name, seconds=seconds)
        self.steps.begin("")

    # What is written down.

    @contextmanager
    def recorded(self, events: Path | None, command: str) -> Iterator[None]:
        """A command whose events go to this file, which ends with "done" or with the error. What the kernels' compiler
        says is said here. Raises ConvertError where the file cannot be written."""
        self._events = None if events is None else Events(events)
        self._tell("begin", schema=SCHEMA, version=VERSION, command=command)
        self._command, self._before_the_log = command, []
        with _listening(self):
            try:
                yield
                self._tell("done")
            except BaseException as error:
                self._tell("error", **_facts(error))
                raise
            finally:
                self.close()
                if self._events is not None:
                    self._events.close()

    @contextmanager
    def logged(self, path: Path) -> Iterator[None]:
        """A job whose log is this file, beginning with what was said before. An error tells where its log is."""
        self.log = Log(path)
        for text in filter(None, [self._command, *(self._before_the_log or [])]):
            self.log.write(text)
        self._before_the_log = [] if self._command else None
        try:
            yield
        except BaseException as error:
            self.log.write_error(error)
            if isinstance(error, ConvertError) and self.log.is_written:
                error.log = str(path)
            raise
        finally:
            self.log.close()
            self.log = None

    def made(self, path: str, n_bytes: int, sha256: str) -> None:
        """A file of the artifact, whole and verified."""
        self._note(f"wrote {path} ({n_bytes} bytes, sha256 {sha256})")
        self._tell("artifact", path=path, bytes=n_bytes, sha256=sha256)

    def judged(self, verdict: str | None, text: str) -> None:
        """What the artifact is good for; None where nothing of it was measured."""
        self._note(text)
        self._tell("verdict", verdict=verdict, text=text)

    def _record(self, stage: str, done: int, total: int, unit: str) -> None:
        """Progress for programs and for later, now and then."""
        last = done >= total
        if self._part.is_due("events", last, _SECONDS_BETWEEN_EVENTS):
            left = self.steps.left(time.monotonic() - self._step_began, self._part.seconds_left)
            seconds = None if left is None else round(left[0], 1)
            self._tell("progress", what=stage, done=done, total=total, unit=unit, seconds_left=seconds)
        if self._part.is_due("log", last, _SECONDS_BETWEEN_LINES):
            self._note(f"{stage}: {_counted(done, total, unit)}")

    def _tell(self, event: str, **facts: Any) -> None:
        with self._lock:
            if self._events is not None:
                self._events(event, **facts)

    def _note(self, text: str) -> None:
        with self._lock:
            if self.log is not None:
                self.log.write(text)
            elif self._before_the_log is not None:
                self._before_the_log.append(text)


class _Part:
    """What a stage does at the moment: how far it is, and what was written down of it."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.seconds_left = 0.0
        self._began = (0.0, 0)
        self._noted: dict[str, float] = {}

    def went_on(self, name: str, done: int, total: int) -> None:
        now = time.monotonic()
        if name != self.name:
            self.name, self._began, self._noted = name, (now, done), {}
        since, first = self._began
        self.seconds_left = (total - done) * (now - since) / (done - first) if done > first else 0.0

    def is_due(self, where: str, last: bool, pause: float) -> bool:
        """Whether it is time to write something down there again: at its beginning, at its end once, and in between."""
        now = time.monotonic()
        before = self._noted.get(where)
        if before is not None and now - before < (0.0 if last else pause):
            return False
        self._noted[where] = float("inf") if last else now
        return True


def _counted(done: int, total: int, unit: str) -> str:
    return f"{size_text(done)} of {size_text(total)}" if unit == "B" else f"{done} of {total} {unit}"


def _for_terminal(message: str) -> str:
    """The message with its lines broken between words; a file, or a program that reads, gets each in one."""
    width = shutil.get_terminal_size().columns
    broken = (
        textwrap.wrap(line, width, subsequent_indent="  ", break_long_words=False) for line in message.split("\n")
    )
    return "\n".join(part for parts in broken for part in parts or [""])


def _facts(error: BaseException) -> dict[str, Any]:
    """An error as plain data."""
    if isinstance(error, ConvertError):
        return {**error.to_dict(), "exit_code": error.exit_code}
    what = "stopped at once" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
    return {"what": what, "where": "", "remedy": "", "exit_code": None}


class _Listener(logging.Handler):
    """Says what the modules of this package log, and once that kernels are compiled."""

    def __init__(self, progress: Progress):
        super().__init__(logging.INFO)
        self.progress, self._said = progress, False

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.progress.say(f"warning: {record.getMessage()}")
        elif record.name == _COMPILER:
            self.progress.reuse()  # as the time of this stage is another one than the next run's
            if self._said:
                return
            self._said = True
            self.progress.say("compiling kernels for this processor, which happens once; the next run finds them")


_listening_to: list[_Listener] = []  # of all threads, which have the logger in common
_listening_lock = threading.Lock()


@contextmanager
def _listening(progress: Progress) -> Iterator[None]:
    logger, listener = logging.getLogger(_PACKAGE), _Listener(progress)
    with _listening_lock:
        _listening_to.append(listener)
        logger.addHandler(listener)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        with _listening_lock:
            _listening_to.remove(listener)
            logger.removeHandler(listener)
            if not _listening_to:
                logger.setLevel(logging.NOTSET)


class Clock:
    """Wall-clock seconds of each stage of this run. on_end: told of each that was done whole, with its seconds."""

    def __init__(self, progress: Progress, on_end: Callable[[str, float], object] = lambda _stage, _seconds: None):
        self.seconds: dict[str, float] = {}
        self._progress, self._on_end = progress, on_end

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        with self._progress.stage(stage) as was_done:
            yield
        seconds = time.monotonic() - start
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + seconds, 3)
        if was_done():
            self._on_end(stage, seconds)
