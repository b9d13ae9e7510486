"""The forecast of a job: its work, times what a unit takes here. It decides nothing, and no byte depends on it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from bitwright.converter.artifact.layout import Files
from bitwright.converter.artifact.run import Run
from bitwright.converter.artifact.target import Prepared
from bitwright.converter.forecast.probe import measured_encoding, measured_products
from bitwright.converter.forecast.rates import Rates
from bitwright.converter.forecast.work import Work, download_bytes, encoding_of, kind_of_encoding, work_of
from bitwright.converter.measure.evidence import ANALYSIS_SAMPLES, ANALYSIS_SEQUENCE_LENGTH
from bitwright.converter.measure.moments import collects_moments
from bitwright.converter.measure.statistics_directory import gives_importance
from bitwright.converter.preflight import demand
from bitwright.converter.record.forecast import Basis, Forecast, Step
from bitwright.profiles.planning.plan import Plan


@dataclass(frozen=True)
class Foreseen:
    """works: the parts of all stages, in their order. kinds: tensor -> kind of its encoding, as far as it is known."""

    forecast: Forecast
    works: tuple[Work, ...]
    kinds: dict[str, str]


def foresee(
    run: Run, prepared: Prepared[Any] | None, ruled: Prepared[Any] | None, runs: bool, rates: Rates
) -> Foreseen:
    """What the job will take. prepared: None where its plan rests on an analysis; ruled: what stands in for it then,
    if anything does. runs: whether the model is run."""
    plan, known = None if prepared is None else prepared.plan, prepared or ruled
    importance_is_given = gives_importance(run.job) or (prepared is not None and prepared.importance is None)
    works = list(work_of(run, plan, importance_is_given, prepared is None or prepared.reads_text_later))
    if prepared is None and ruled is not None:
        works = [each for work in works for each in (encoding_of(ruled.plan) if work.stage == "encode" else [work])]
    steps = _steps(run, works, rates, _Probe(run, None if known is None else known.plan))
    needed = demand(run, Files() if known is None else known.files, collects_moments(run, plan), runs)
    kinds = {} if plan is None else {row.tensor.name: kind_of_encoding(plan, row) for row in plan.tensors}
    return Foreseen(Forecast(steps, needed.memory, needed.disk_bytes, download_bytes(run)), tuple(works), kinds)


def _steps(run: Run, works: Iterable[Work], rates: Rates, probe: "_Probe") -> tuple[Step, ...]:
    steps: dict[str, Step] = {}
    for work in works:
        one = _step(run, work, rates, probe)
        before = steps.get(work.stage)
        steps[work.stage] = one if before is None else _together(before, one)
    return tuple(steps.values())


def _step(run: Run, work: Work, rates: Rates, probe: "_Probe") -> Step:
    if _is_cached(run, work.stage):
        return Step(work.stage, 0.0, basis="cache")
    if (seconds := rates.seconds(work)) is not None:
        return Step(work.stage, seconds, basis="kept")
    if (seconds := probe.seconds(work)) is not None:
        return Step(work.stage, seconds, at_least=True, basis="measured")
    return Step(work.stage)


def _is_cached(run: Run, stage: str) -> bool:
    """Whether the cache seems to have what the stage makes."""
    samples, length = run.job.samples, run.job.sequence_length
    if stage == "calibrate":
        results = ["importance", *(["second moments"] if collects_moments(run, None) else [])]
        return all(run.cache.knows(result, samples, length) for result in results)
    if stage == "analyse":
        return run.cache.knows("sensitivity", ANALYSIS_SAMPLES, min(ANALYSIS_SEQUENCE_LENGTH, length))
    return False


def _together(one: Step, other: Step) -> Step:
    """Two parts of a stage. Where one is not known, the other is the least that it takes."""
    known = [step for step in (one, other) if step.seconds is not None]
    if not known:
        return one
    basis: Basis = "measured" if any(step.basis == "measured" for step in known) else "kept"
    at_least = len(known) < 2 or one.at_least or other.at_least
    return replace(one, seconds=sum(step.seconds or 0.0 for step in known), at_least=at_least, basis=basis)


@dataclass
class _Probe:
    """Measures what nothing is known of, each once. plan: what is encoded."""

    run: Run
    plan: Plan | None

    def seconds(self, work: Work) -> float | None:
        if not work.amount:
            return None
        if work.products:
            return None if self._products is None else work.products / self._products
        if work.stage == "encode":
            rate = self._rate_of(work.what)
            return None if rate is None else work.amount / rate
        return None

    @cached_property
    def _products(self) -> float | None:
        return measured_products(self.run.job, self.run.model_map)

    def _rate_of(self, kind: str) -> float | None:
        """Weights a second, in rows as the largest tensor of this kind has them."""
        plan = self.plan
        if plan is None:
            return None
        row = max(
            (row for row in plan.tensors if kind_of_encoding(plan, row) == kind), key=lambda row: row.tensor.n_weights
        )
        return measured_encoding(row.format, row.tensor.n_columns, plan.effort, self.run.job.n_threads)
