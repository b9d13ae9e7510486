"""What is known of a plan's quality: a measured divergence from a report, a predicted one from a sensitivity table, or
nothing but the command that measures it."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bitwright.converter.advice.cache_quality import kept_cache_quality
from bitwright.converter.advice.plans import PricedPlan, Source
from bitwright.converter.job.work_directory import CACHE_QUALITY
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.regular_file import read_json
from bitwright.formats.files.seals import is_sound

Kind = Literal["measured", "predicted", "16 bits", "not measured"]
Confidence = Literal["high", "medium", "low"]
_CONFIDENCE: dict[Kind, Confidence] = {
    "measured": "high",
    "16 bits": "high",
    "predicted": "medium",
    "not measured": "low",
}


@dataclass(frozen=True)
class Quality:
    """kld: mean KL divergence from the source, in nats a token; perplexity: of the artifact; both None where nothing
    is known. source: the report, or what a prediction rests on; for what is not measured the command that measures
    it."""

    kind: Kind
    kld: float | None
    perplexity: float | None
    source: str

    @property
    def confidence(self) -> Confidence:
        """high: measured on this model; medium: predicted from measurements of it; low: nothing was measured."""
        return _CONFIDENCE[self.kind]

    @property
    def text(self) -> str:
        return "-" if self.kld is None else f"{self.kld:.3g}" + ("*" if self.kind == "predicted" else "")


@dataclass(frozen=True)
class CacheQuality:
    """What `bitwright evaluate --kv` measured of this model with keys and values in a format. kld: mean KL divergence
    of weights and cache together from the source, in nats a token. profile: of the artifact; is_own: whether its plan
    is the candidate's. source: the file."""

    kld: float
    profile: str
    is_own: bool
    source: str


class Reports:
    """The reports of finished conversions of a model in some directories, and in the work directories within them."""

    def __init__(self, source: Source, places: Iterator[Path]):
        self._found: list[tuple[Path, dict[str, Any]]] = []
        for path in dict.fromkeys(places):
            report = _report(path)
            if report is not None and report.get("model") == source.checkpoint.model_id:
                self._found.append((path, report))
        self._caches = {path: kept_cache_quality(path, report) for path, report in self._found}

    def of(self, priced: PricedPlan) -> tuple[Path, dict[str, Any]] | None:
        """The report of this very plan, or of the profile on this model where the plan was adapted on the way."""
        return next((entry for entry in self._matching(priced) if entry[1].get("quality")), None)

    def with_cache(self, priced: PricedPlan, kv: str) -> CacheQuality | None:
        """Of this plan with keys and values in a format, or else of another plan of the model; None where none was
        measured."""
        own = self._matching(priced)
        for path, report in (*own, *self._found):
            if kv in (klds := self._caches[path]):
                is_own = any(path == place for place, _ in own)
                return CacheQuality(klds[kv], str(report.get("profile")), is_own, str(path.with_name(CACHE_QUALITY)))
        return None

    def _matching(self, priced: PricedPlan) -> list[tuple[Path, dict[str, Any]]]:
        digest = priced.plan.digest()
        same_plan = [entry for entry in self._found if entry[1].get("plan_sha256") == digest]
        of_profile = [
            entry
            for entry in self._found
            if entry[1].get("profile") == priced.profile and not entry[1].get("recipe", {}).get("overrides")
        ]
        return [*same_plan, *of_profile]


def report_places(model: str, work_dir: Path | None) -> Iterator[Path]:
    """Where reports of a model may lie: the work directory that is named, those of the current directory, and those
    beside a local model."""
    if work_dir is not None:
        yield work_dir / "report.json"
    beside = Path(model).expanduser()
    roots = [Path(), beside.parent] if beside.exists() else [Path()]
    for root in roots:
        for pattern in ("*.bitwright/report.json", "*.bitwright-work/report.json"):
            yield from sorted(root.glob(pattern))


def quality_of(priced: PricedPlan, source: Source, reports: Reports) -> Quality:
    """Measured before predicted before nothing."""
    if (found := reports.of(priced)) is not None:
        path, report = found
        quality = report["quality"]
        return Quality("measured", quality.get("mean_kld"), quality.get("perplexity"), str(path))
    if priced.is_plain:
        return Quality("16 bits", 0.0, None, "every matrix keeps 16 bits or more")
    if (predicted := priced.plan.predicted_kld) is not None:
        return Quality("predicted", predicted, None, "the sensitivity table")
    command = shlex.join(["bitwright", "--profile", priced.profile, source.model])
    return Quality("not measured", None, None, f"{command} measures it")


def _report(path: Path) -> dict[str, Any] | None:
    """The report, if it is what a conversion has written."""
    try:
        if not is_sound(path):
            return None
        report = read_json(path, remedy="")
    except (ConvertError, OSError, json.JSONDecodeError):
        return None
    return report if isinstance(report, dict) else None
