"""Where a long pass over a model keeps its checkpoints, how a caller watches it and ends it, and the disk it takes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol


class OnProgress(Protocol):
    """Called as work proceeds: `done` of `total` units of the stage are finished; never from two threads at once."""

    def __call__(self, stage: str, done: int, total: int, unit: str) -> None: ...


class ShouldStop(Protocol):
    """Polled after every layer; True ends the pass once that layer's checkpoint is written."""

    def __call__(self) -> bool: ...


class Interrupted(Exception):
    """The pass ended early because it was asked to; calling it again with the same work directory continues it."""


def say(progress: OnProgress, text: str) -> None:
    """One line for the user, where the progress is one that says lines."""
    if (told := getattr(progress, "say", None)) is not None:
        told(text)


def took(progress: OnProgress, what: str, amount: int, seconds: float) -> None:
    """So much of a kind of work was done in so many seconds, for a progress that wants to know."""
    if (told := getattr(progress, "took", None)) is not None:
        told(what, amount, seconds)


def silent(stage: str, done: int, total: int, unit: str) -> None:
    """Progress that nobody watches."""


def never() -> bool:
    """A pass that runs to its end."""
    return False


@dataclass(frozen=True)
class PassControl:
    """What a caller decides of a pass that changes none of its results.

    work_dir: for the checkpoints of this pass alone; the same call with the same directory continues after the last
    checkpoint, or returns at once when all is done. progress: how far the pass is. should_stop: whether it is to end;
    it then raises Interrupted.
    """

    work_dir: Path
    progress: OnProgress = silent
    should_stop: ShouldStop = never

    def within(self, name: str) -> "PassControl":
        """The control of one part of the pass, whose checkpoints are in a directory of that name in this one."""
        return replace(self, work_dir=self.work_dir / name)


class PassStore(Protocol):
    """Where a finished pass may be known from another time: its work directory as it was left."""

    def fetch(self, target: Path) -> bool:
        """Put it at the target, a directory that is not there yet, if it is known."""

    def store(self, source: Path) -> None:
        """Keep the directory for another time."""


def work_bytes(samples: int, sequence_length: int, hidden_size: int) -> int:
    """Disk space in bytes, at most, of the hidden states of a pass over that many samples: two files of float32."""
    return 2 * samples * sequence_length * hidden_size * 4
