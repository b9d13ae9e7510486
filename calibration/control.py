"""How a caller watches a long pass and ends it."""

from typing import Protocol


class Progress(Protocol):
    """Called as work proceeds: `done` of `total` units of the stage are finished; never from two threads at once."""

    def __call__(self, stage: str, done: int, total: int, unit: str) -> None: ...


class ShouldStop(Protocol):
    """Polled after every layer; True ends the pass once that layer's checkpoint is written."""

    def __call__(self) -> bool: ...


class Interrupted(Exception):
    """The pass ended early because it was asked to; calling it again with the same work directory continues it."""


def say(progress: Progress, text: str) -> None:
    """One line for the user, where the progress is one that says lines."""
    if (told := getattr(progress, "say", None)) is not None:
        told(text)


def silent(stage: str, done: int, total: int, unit: str) -> None:
    """Progress that nobody watches."""


def never() -> bool:
    """A pass that runs to its end."""
    return False
