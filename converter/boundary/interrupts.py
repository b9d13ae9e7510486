"""Signals that ask a process to end: Ctrl-C, SIGTERM (kill, a scheduler), SIGHUP (the terminal is gone)."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOPPED = 130
"""The exit code of a command that was stopped and can be continued, whichever signal stopped it."""

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stop:
    """Whether a signal has asked for the end: the first one lets the current layer finish, the second ends at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        return self.asked

    @contextmanager
    def on_interrupt(self) -> Iterator["Stop"]:
        with _handled_by(self._handle):
            yield self

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        # A handler runs between any two instructions, so nothing that printing raises may leave it.
        with suppress(OSError, ValueError, RuntimeError):
            print("\nfinishing this layer; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)


@contextmanager
def stops_at_once() -> Iterator[None]:
    """Every such signal raises KeyboardInterrupt, so that context managers clean up."""

    def handle(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handled_by(handle):
        yield


@contextmanager
def _handled_by(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    previous = {}
    try:
        for signum in _SIGNALS:
            if signum == signal.SIGINT or signal.getsignal(signum) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                previous[signum] = signal.signal(signum, handle)
    except ValueError:  # only the main thread may handle signals; elsewhere the caller does
        pass
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
