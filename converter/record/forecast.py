"""What a job will take, as far as it is known: seconds of each stage, memory, disk, download."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bitwright.formats.typed import to_plain
from bitwright.profiles.sizes import size_text

Basis = Literal["kept", "measured", "cache"]
"""Earlier runs on this machine; one layer's matrices and rows, measured now; a result that the cache has."""

_BASES: dict[Basis, str] = {
    "kept": "rates of earlier runs on this machine",
    "measured": "one layer measured now, without what goes on around it",
    "cache": "results that the cache has",
}


@dataclass(frozen=True)
class Step:
    """A stage. seconds: None where nothing tells. at_least: it takes some more, of which nothing is known. basis: what
    the seconds rest on; None where they are None."""

    stage: str
    seconds: float | None = None
    at_least: bool = False
    basis: Basis | None = None

    @property
    def text(self) -> str:
        if self.basis == "cache":
            return f"{self.stage} cached"
        if self.seconds is None:
            return f"{self.stage} ?"
        return f"{self.stage} {'> ' if self.at_least else ''}{seconds_text(self.seconds)}"


@dataclass(frozen=True)
class Forecast:
    """The stages in their order. memory_bytes: the peak, disk_bytes: what is written at most, as the check before a job
    counts both. download_bytes: what is still to be fetched."""

    steps: tuple[Step, ...]
    memory_bytes: int
    disk_bytes: int
    download_bytes: int

    @property
    def seconds(self) -> float:
        """Of all stages that are known."""
        return sum(step.seconds or 0.0 for step in self.steps)

    @property
    def is_complete(self) -> bool:
        return all(step.seconds is not None and not step.at_least for step in self.steps)

    def lines(self) -> list[str]:
        """For people."""
        known = [step for step in self.steps if step.seconds is not None]
        total = f"{'about' if self.is_complete else 'more than'} {seconds_text(self.seconds)}"
        lines = [f"forecast: {total if known else 'how long it takes is not known here yet'}"]
        lines.append(f"  time: {', '.join(step.text for step in self.steps)}")
        bases = dict.fromkeys(step.basis for step in known if step.basis is not None)
        if bases:
            lines.append(f"  by: {'; '.join(_BASES[basis] for basis in bases)}")
        if any(step.seconds is None for step in self.steps):
            lines.append("  ?: known once a job of this kind has run here")
        amounts = f"  memory {size_text(self.memory_bytes)} at most, disk {size_text(self.disk_bytes)}"
        return [*lines, amounts + (f", download {size_text(self.download_bytes)}" if self.download_bytes else "")]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        plain: dict[str, Any] = to_plain(self)
        return {"seconds": self.seconds, "complete": self.is_complete, **plain}


def seconds_text(seconds: float) -> str:
    """A duration for people: 40 s, 12 min, 2 h 10 min."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 10 else f"{hours} h"


class Steps:
    """Where a job is among its steps, and how long the rest takes by the forecast."""

    def __init__(self, steps: Sequence[Step] = ()):
        self.steps = list(steps)
        self.index: int | None = None
        self._begun: set[str] = set()

    def begin(self, stage: str) -> None:
        again = stage in self._begun  # a look at what is done already
        self._begun.add(stage)
        places = (i for i, step in enumerate(self.steps) if step.stage == stage)
        self.index = None if again else next(places, None)

    def expect(self, steps: Sequence[Step]) -> None:
        """A forecast, or a better one amid the job: of steps that have begun nothing changes."""
        before = [step for step in self.steps if step.stage in self._begun]
        self.steps = before + [step for step in steps if step.stage not in self._begun]

    def left(self, elapsed: float, least: float = 0.0) -> tuple[float, bool] | None:
        """Seconds that are left, and whether that is only what is known of them; None where nothing is known.

        elapsed: seconds of the current step so far. least: what its own progress says that it will take yet."""
        if self.index is None:
            return None
        current, later = self.steps[self.index], self.steps[self.index + 1 :]
        of_current = least if current.seconds is None else max(least, current.seconds - elapsed)
        known = [step.seconds for step in later if step.seconds is not None]
        if not known and not of_current:
            return None
        partial = len(known) < len(later) or any(step.at_least for step in later)
        return of_current + sum(known), partial or (not of_current and current.seconds is None)

    def text(self, elapsed: float = 0.0, least: float = 0.0) -> str:
        """Step 3 of 8 - 12 min left; "" outside of the steps."""
        if self.index is None:
            return ""
        place, left = f"Step {self.index + 1} of {len(self.steps)}", self.left(elapsed, least)
        if left is None:
            return place
        return f"{place} - {'more than ' if left[1] else ''}{seconds_text(left[0])} left"
