"""What is known of a plan's quality: a measured divergence from a report, a predicted one from a sensitivity table, or
nothing but the command that measures it."""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bitwright.converter.advice.cache_quality import kept_cache_quality
from bitwright.converter.advice.plans import PricedPlan, Source
from bitwright.converter.job.work_directory import CACHE_QUALITY
from bitwright.converter.report.data import PublishedReport
from bitwright.converter.report.records import REPORT
from bitwright.converter.source.hub import download
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.regular_file import read_json
from bitwright.formats.files.seals import is_sound

Kind = Literal["measured", "published", "predicted", "16 bits", "not measured"]
Confidence = Literal["high", "medium", "low"]
_CONFIDENCE: dict[Kind, Confidence] = {
    "measured": "high",
    "published": "medium",
    "16 bits": "high",
    "predicted": "medium",
    "not measured": "low",
}


_MARKS: dict[Kind, str] = {"predicted": "*", "published": "+"}
_PUBLISHED = f"recipe/*/{REPORT}"
_LARGEST_REPORT = 16 << 20  # bytes; one of a model of 100 layers has a tenth of it

Entry = tuple[str, dict[str, Any]]
"""Where a report is, and the report."""


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
        """high: measured on this model here; medium: measured of it by who published a report, or predicted from
        measurements of it; low: nothing was measured."""
        return _CONFIDENCE[self.kind]

    @property
    def text(self) -> str:
        return "-" if self.kld is None else f"{self.kld:.3g}" + _MARKS.get(self.kind, "")


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
    """The reports of finished conversions of a model in some directories, and in the work directories within them; and
    those that others have published in a repository of the Hub."""

    def __init__(self, source: Source, places: Iterator[Path], repository: str | None = None):
        self._published = [] if repository is None else list(_published(source, repository))
        self._found: list[Entry] = []
        for path in dict.fromkeys(places):
            report = _report(path)
            if report is not None and report.get("model") == source.checkpoint.model_id:
                self._found.append((str(path), report))
        self._caches = {place: kept_cache_quality(Path(place), report) for place, report in self._found}

    def of(self, priced: PricedPlan) -> Entry | None:
        """The report of this very plan, or of the profile on this model where the plan was adapted on the way."""
        return _measured(_matching(self._found, priced))

    def published(self, priced: PricedPlan) -> Entry | None:
        """The same of those that others have published."""
        return _measured(_matching(self._published, priced))

    def with_cache(self, priced: PricedPlan, kv: str) -> CacheQuality | None:
        """Of this plan with keys and values in a format, or else of another plan of the model; None where none was
        measured."""
        own = _matching(self._found, priced)
        for place, report in (*own, *self._found):
            if kv in (klds := self._caches[place]):
                is_own = any(place == other for other, _ in own)
                kept = Path(place).with_name(CACHE_QUALITY)
                return CacheQuality(klds[kv], str(report.get("profile")), is_own, str(kept))
        return None


def _matching(entries: Sequence[Entry], priced: PricedPlan) -> list[Entry]:
    if not entries:
        return []  # without the digest, which takes longer than the rest of a candidate's quality
    digest = priced.plan.digest()
    same_plan = [entry for entry in entries if entry[1].get("plan_sha256") == digest]
    of_profile = [
        entry
        for entry in entries
        if entry[1].get("profile") == priced.profile and not entry[1].get("recipe", {}).get("overrides")
    ]
    return [*same_plan, *of_profile]


def _measured(entries: Sequence[Entry]) -> Entry | None:
    return next((entry for entry in entries if entry[1].get("quality")), None)


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
        place, report = found
        quality = report["quality"]
        return Quality("measured", quality.get("mean_kld"), quality.get("perplexity"), place)
    if priced.is_plain:
        return Quality("16 bits", 0.0, None, "every matrix keeps 16 bits or more")
    if (found := reports.published(priced)) is not None:
        place, report = found
        quality = report["quality"]
        return Quality("published", quality.get("mean_kld"), quality.get("perplexity"), place)
    if (predicted := priced.plan.predicted_kld) is not None:
        return Quality("predicted", predicted, None, "the sensitivity table")
    command = shlex.join(["bitwright", "--profile", priced.profile, source.model])
    return Quality("not measured", None, None, f"{command} measures it")


def _published(source: Source, repository: str) -> Iterator[Entry]:
    """The reports in a repository of the Hub that are of this very model: of its id and its commit. One that is none,
    or holds no divergence that could be, is passed over: others have written them, and nothing here can check them.

    Raises ConvertError for a local model, which has no identity there, and for a repository that cannot be read."""
    checkpoint = source.checkpoint
    if checkpoint.revision is None:
        raise ConvertError(
            "reports on the Hub are of models on the Hub, and this one is local",
            f"--reports {repository}",
            "leave it out; --work-dir names the directory of a report on this machine",
        )
    name, _, revision = repository.partition("@")
    directory = download(name, revision or None, [_PUBLISHED])
    for path in sorted(directory.glob(_PUBLISHED)):
        try:
            if path.stat().st_size > _LARGEST_REPORT:
                continue
            report = PublishedReport.from_dict(json.loads(path.read_bytes()))
        except (ValueError, ArithmeticError, RecursionError, OSError):
            continue
        kld = None if report.quality is None else report.quality.mean_kld
        is_of_it = (report.base_model, report.revision) == (checkpoint.model_id, checkpoint.revision)
        if is_of_it and kld is not None and 0 <= kld < float("inf"):
            yield f"{name}@{directory.name[:12]}: {path.relative_to(directory).as_posix()}", report.to_dict()


def _report(path: Path) -> dict[str, Any] | None:
    """The report, if it is what a conversion has written."""
    try:
        if not is_sound(path):
            return None
        report = read_json(path, remedy="")
    except (ConvertError, OSError, json.JSONDecodeError):
        return None
    return report if isinstance(report, dict) else None
