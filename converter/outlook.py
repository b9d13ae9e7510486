"""A dry run: the plan of a job with its forecast, or, where the plan rests on what is not measured, how small and how
large it can be, and what measures it. Reads headers only."""

from dataclasses import dataclass
from typing import Any

from bitwright.converter.artifact.run import Run
from bitwright.converter.artifact.target import Prepared
from bitwright.converter.gguf.bounds import Bounds
from bitwright.converter.job.job import Job
from bitwright.converter.preparation import bounds_of, forecast, prepared_or_ruled, survey
from bitwright.converter.record.forecast import Forecast


@dataclass(frozen=True)
class Outlook:
    """run: the job, described. prepared: its plan; where there is none before the analysis, bounds is there."""

    run: Run
    prepared: Prepared[Any] | None
    bounds: Bounds | None
    forecast: Forecast

    @property
    def notes(self) -> tuple[str, ...]:
        return self.run.notes if self.prepared is None else self.prepared.notes

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data: what `bitwright plan --json` prints."""
        if self.prepared is not None:
            return {**self.prepared.to_dict(), "forecast": self.forecast.to_dict()}
        assert self.bounds is not None
        return {
            "model": self.run.checkpoint.model_id,
            "revision": self.run.checkpoint.revision,
            "profile": self.run.job.profile.name,
            "plan_sha256": None,
            "output": str(self.run.output),
            "bytes": None,
            "bounds": self.bounds.to_dict(),
            "notes": list(self.notes),
            "forecast": self.forecast.to_dict(),
        }


def outlook(job: Job) -> Outlook:
    """Raises ConvertError for a size that no choice of formats meets, and for whatever else would stop the job."""
    run = survey(job)
    prepared, is_ruled = prepared_or_ruled(run)
    bounds = bounds_of(run) if prepared is None else None
    decided = None if is_ruled else prepared
    foreseen = forecast(run if decided is None else decided.run, decided)
    return Outlook(run, prepared, bounds, foreseen.forecast)
