"""How long a unit of work took on this machine, kept from one job to the next.

    rates.jsonl in the cache directory: a line for each part of a stage that was done from its beginning to its end

What was continued, or taken from the cache, says nothing and is not kept. Machines that share the directory are told
apart. No result depends on the file, and one that is damaged, or cannot be written, is one without rates.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import log
from pathlib import Path

from bitwright.converter.boundary.machine import cpu_name
from bitwright.converter.forecast.work import Work
from bitwright.converter.job.cache import RATES_FILE, cache_directory
from bitwright.converter.job.job import Job
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import make_directory
from bitwright.formats.files.journal import append_line, read_lines
from bitwright.formats.files.whole import whole_file

# A run that much smaller took its time for other things, such as starting, and says little.
_COMPARABLE = 64.0
_MOST_LINES = 4000


@dataclass(frozen=True)
class _Rate:
    amount: float
    seconds: float


class Rates:
    """path: of the file, None for none. machine: as the lines name it."""

    def __init__(self, path: Path | None, machine: str):
        self.path, self.machine = path, machine
        self._known: dict[tuple[str, str], list[_Rate]] = {}
        if path is None:
            return
        with suppress(OSError, ConvertError, KeyError, TypeError, ValueError):
            for line in read_lines(path):
                if line["machine"] == machine and line["amount"] > 0 and line["seconds"] > 0:
                    rate = _Rate(float(line["amount"]), float(line["seconds"]))
                    self._known.setdefault((line["stage"], line["what"]), []).append(rate)

    @classmethod
    def of_job(cls, job: Job) -> "Rates":
        directory = cache_directory(job.cache)
        machine = f"{cpu_name()}, {job.n_threads} threads"
        return cls(None if directory is None else directory / RATES_FILE, machine)

    def seconds(self, work: Work) -> float | None:
        """By the run whose amount is nearest, of several the latest; None where none is comparable."""
        if not work.amount:
            return None
        known = self._known.get((work.stage, work.what), [])
        near = [rate for rate in reversed(known) if rate.amount * _COMPARABLE >= work.amount]
        if not near:
            return None
        nearest = min(near, key=lambda rate: _distance(rate.amount, work))
        return nearest.seconds * work.amount / nearest.amount

    def keep(self, work: Work, seconds: float) -> None:
        """What was done in so many seconds."""
        if self.path is None or not work.amount or seconds <= 0:
            return
        entry = {"machine": self.machine, "stage": work.stage, "what": work.what}
        with suppress(OSError, ConvertError):
            make_directory(self.path.parent)
            append_line(self.path, {**entry, "amount": work.amount, "seconds": round(seconds, 6)})
            self._shorten(self.path)

    @staticmethod
    def _shorten(path: Path) -> None:
        """The later half of a file that has grown long."""
        lines = path.read_bytes().splitlines(keepends=True)
        if len(lines) > _MOST_LINES:
            with whole_file(path, "file of rates") as file:
                file.writelines(lines[len(lines) // 2 :])


def _distance(amount: float, work: Work) -> float:
    return abs(log(amount / (work.amount or amount)))


class RateKeeper:
    """Keeps the rates of a job as its stages end, as Clock tells it; and what encoding took, as the writer does.

    rates: None for a job that is continued: what is done of it says nothing of the whole."""

    def __init__(self, rates: Rates | None):
        self.rates = rates
        self._works: dict[str, list[Work]] = {}
        self._kinds: dict[str, str] = {}
        self._encoded: dict[str, tuple[float, float]] = {}

    def expect(self, works: Sequence[Work], kinds: Mapping[str, str]) -> None:
        """works: the parts of the stages, as far as they are known by now. kinds: tensor -> kind of its encoding."""
        self._works |= {work.stage: [other for other in works if other.stage == work.stage] for work in works}
        self._kinds |= kinds

    def took(self, tensor: str, n_weights: int, seconds: float) -> None:
        """A tensor was encoded and written."""
        if (kind := self._kinds.get(tensor)) is not None:
            weights, before = self._encoded.get(kind, (0.0, 0.0))
            self._encoded[kind] = weights + n_weights, before + seconds

    def __call__(self, stage: str, seconds: float) -> None:
        """A stage was done in so many seconds, with nothing taken from elsewhere."""
        if self.rates is None:
            return
        if stage == "encode":
            for kind, (n_weights, took) in self._encoded.items():
                self.rates.keep(Work(stage, n_weights, kind), took)
        else:
            for work in self._works.get(stage, []):
                self.rates.keep(work, seconds)
