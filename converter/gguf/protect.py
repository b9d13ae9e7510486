"""The stage `protect`: what is done for the super weights of a model, as asked or as measurement shows to help.

Measured is the model with one tensor encoded, as the plan has it and protected in each way, against the model as it is,
on the text on which removals are measured. A way without a byte is taken when it lowers the divergence beyond doubt;
a finer format when, besides, its bytes lower the divergence here far more than elsewhere.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bitwright.calibration.evaluation.quality import Baseline
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.calibration.statistics.super_weights import SuperWeight, SuperWeightReport
from bitwright.converter.artifact.run import Run
from bitwright.converter.gguf.encode import Encoder
from bitwright.converter.gguf.rescale_search import choose_factors
from bitwright.converter.job.cache import arrays_identity, text_identity
from bitwright.converter.job.kept import kept
from bitwright.converter.measure.running import load_tokenizer, runnable, streamable
from bitwright.converter.measure.super_weights import RESULT as SEARCH
from bitwright.converter.measure.super_weights import (
    given_or_streamed_super_weights,
    load_super_weights,
    measuring_text,
)
from bitwright.converter.model.rescaled import rescale_rows
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.seals import is_sound
from bitwright.formats.files.whole import whole_file
from bitwright.formats.registry import get_format
from bitwright.profiles.planning.fallbacks import fitting_format
from bitwright.profiles.planning.plan import Plan
from bitwright.profiles.planning.protect import (
    give_format,
    looks_for_super_weights,
    pin,
    rescale,
    rescaled_specs,
    with_specs,
)
from bitwright.profiles.reading.protection import Action, Protection
from bitwright.profiles.vocabulary import ModelMap, TensorSpec

RESULT = "protection.json"

# A difference of divergences counts when it is this many standard errors, and this share of what it would lower.
_STANDARD_ERRORS = 2.0
_LEAST_GAIN = 0.02
# A finer format must buy this many times what the same bytes buy in the same tensor of a layer without super weights.
_TIMES_ELSEWHERE = 2.0
_FREE: tuple[Action, ...] = ("pin", "rescale")


@dataclass(frozen=True)
class Trial:
    """A tensor encoded in one way; what: "none" for no protection. extra_bytes: beyond that; divergence: mean KL
    divergence of the model with this tensor encoded; error: standard error of its difference from "none"."""

    what: str
    extra_bytes: int
    divergence: float
    error: float


@dataclass(frozen=True)
class Decision:
    """What is done for a tensor's super weights. action: None for nothing. format: of the actions that change it.
    factors: (matrix, neuron, factor) of the neurons that are rescaled."""

    tensor: str
    action: Action | None
    why: str
    format: str | None = None
    factors: tuple[tuple[int, int, float], ...] = ()
    trials: tuple[Trial, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Decision":
        """From what asdict makes of one, by way of JSON. Raises ValueError, KeyError or TypeError where it is none."""
        factors = tuple((int(m), int(n), float(f)) for m, n, f in data["factors"])
        return cls(**{**data, "factors": factors, "trials": tuple(Trial(**trial) for trial in data["trials"])})


def save_decisions(path: Path, decisions: Sequence[Decision]) -> None:
    with whole_file(path, "record of protection") as file:
        file.write(json.dumps([asdict(decision) for decision in decisions], indent=1).encode())


def load_decisions(path: Path) -> list[Decision]:
    """What save_decisions wrote. Raises ConvertError for a damaged file."""
    try:
        return [Decision.from_dict(data) for data in json.loads(path.read_bytes())]
    except (ValueError, KeyError, TypeError) as error:
        raise ConvertError(
            f"the record of protection is damaged ({error})", str(path), "start again with --fresh"
        ) from None


@dataclass(frozen=True)
class Protected:
    """Plan and map as they are executed; report: what is known of super weights, None where nobody looked."""

    plan: Plan
    model_map: ModelMap
    report: SuperWeightReport | None = None
    decisions: tuple[Decision, ...] = ()


def protect(run: Run, plan: Plan, importance: ImportanceMatrix | None) -> Protected:
    """Look for super weights where the plan needs to know of them, and protect them. What is found and decided stays in
    the work directory, and is not found or decided again.

    Raises ConvertError for a report of another model, and for a way that this plan does not allow.
    """
    job = run.job
    if not looks_for_super_weights(job.protection, plan):
        return Protected(plan, run.model_map)
    report = given_or_streamed_super_weights(run, importance)
    directory = run.work_dir / "protection"

    def trials() -> Trials:
        running, running_map = runnable(run.checkpoint, run.model_map, run.work_dir)
        text = measuring_text(job, load_tokenizer(running.location))
        baseline = Baseline(streamable(run, running), text, run.control("protection"), keep=True)
        return Trials(baseline, running, running_map, text_identity(text))

    def decide() -> list[Decision]:
        return Protector(run, plan, importance).decide(report.weights, trials)

    path = run.work_dir / RESULT
    decisions = kept(path, "record of protection", run.progress, decide, save_decisions, load_decisions, directory)
    return _apply(decisions, run, report, plan)


def refuse_protection(protection: Protection, plan: Plan) -> None:
    """Raises ConvertError for a protection that would break the plan's budget."""
    if plan.spent is not None and protection.super_weights in ("raise", "exclude"):
        raise ConvertError(
            f"{protection.super_weights} gives tensors more bytes than the budget has given them",
            "--protect-super-weights",
            "use pin or rescale, which cost no byte, or a profile whose rules choose the formats",
        )


def protection_notes(protection: Protection, plan: Plan) -> list[str]:
    """What a plan that is made before super weights are known leaves open."""
    if not looks_for_super_weights(protection, plan):
        return []
    if protection.super_weights == "auto":
        size = "may add to the size" if plan.spent is None else "costs no byte of the budget"
        return [f"super weights are looked for when the job runs; what protects them best {size}"]
    return [f"super weights are looked for when the job runs, and {protection.super_weights} protects them"]


def protected_before(run: Run, plan: Plan, importance: ImportanceMatrix | None) -> Protected | None:
    """What `protect` has decided in the job's work directory; None where that is lost."""
    if not looks_for_super_weights(run.job.protection, plan):
        return Protected(plan, run.model_map)
    decisions, search = run.work_dir / RESULT, run.work_dir / SEARCH
    report = None if importance is None else importance.super_weights
    if report is None and is_sound(search):
        report = load_super_weights(search)
    if report is None or not is_sound(decisions):
        return None
    return _apply(load_decisions(decisions), run, report, plan)


def _apply(decisions: list[Decision], run: Run, report: SuperWeightReport, plan: Plan) -> Protected:
    model_map = run.model_map
    for decision in decisions:
        plan, model_map = apply(decision, report.weights, run.job.protection.tolerance, plan, model_map)
    return Protected(plan, model_map, report, tuple(decisions))


def apply(
    decision: Decision, weights: Sequence[SuperWeight], tolerance: float, plan: Plan, model_map: ModelMap
) -> tuple[Plan, ModelMap]:
    """Plan and map with what was decided for a tensor. weights: the super weights, of any tensor."""
    if decision.action == "pin":
        places = [(w.matrix, w.row, w.column) for w in weights if w.tensor == decision.tensor]
        return pin(plan, decision.tensor, places, tolerance, decision.why), model_map
    if decision.action == "rescale":
        factors = {(matrix, neuron): factor for matrix, neuron, factor in decision.factors}
        specs = _rescaled_specs(model_map, decision.tensor, factors)
        return rescale(plan, specs, decision.why), with_specs(model_map, specs)
    if decision.format is not None:
        out = decision.action == "exclude"
        return give_format(plan, decision.tensor, decision.format, decision.why, out), model_map
    return plan, model_map


def _rescaled_specs(model_map: ModelMap, name: str, factors: dict[tuple[int, int], float]) -> dict[str, TensorSpec]:
    """The tensors that change when neurons of this one are rescaled. Raises ConvertError where that is not possible."""
    specs = rescaled_specs(model_map, name, factors)
    if specs is None:
        raise ConvertError(
            "super weights can be rescaled in gated MLPs only, and this one has no up projection",
            f"tensor {name}",
            "use --protect-super-weights pin",
        )
    return specs


class Trials(NamedTuple):
    """What ways of protection are measured with: the source's predictions, the checkpoint and map that are run, see
    converter.measure.running.runnable, and what tells the text."""

    baseline: Baseline
    checkpoint: Checkpoint
    model_map: ModelMap
    text: dict[str, Any]


class Protector:
    """Decides for the tensors of a plan that hold super weights."""

    def __init__(self, run: Run, plan: Plan, importance: ImportanceMatrix | None):
        self.checkpoint, self.model_map, self.plan = run.checkpoint, run.model_map, plan
        self.importance, self.protection, self.threads = importance, run.job.protection, run.job.n_threads
        self.cache = run.cache
        self._planned = {planned.tensor.name: planned for planned in plan.tensors}

    def decide(self, weights: Sequence[SuperWeight], trials: Callable[[], Trials]) -> list[Decision]:
        """One decision for every tensor with super weights.

        trials: opens what "auto" measures with. Raises ConvertError where the way that was asked for does not exist,
        and Interrupted.
        """
        by_tensor: dict[str, list[SuperWeight]] = defaultdict(list)
        for weight in weights:
            by_tensor[weight.tensor].append(weight)
        mode, tensors = self.protection.super_weights, sorted(by_tensor.items())
        if mode == "off" or not tensors:
            return []
        if mode == "auto":
            opened = trials()
            return [self._measured(name, members, set(by_tensor), opened) for name, members in tensors]
        return [self._option(mode, name, members) for name, members in tensors]

    def _option(self, action: Action, name: str, weights: list[SuperWeight]) -> Decision:
        planned, which = self._planned[name], _which(weights)
        if action == "pin":
            return Decision(name, "pin", f"{which} pinned within {self.protection.tolerance:.4g}")
        if action == "rescale":
            neurons = sorted({(w.matrix, w.column) for w in weights})
            _rescaled_specs(self.model_map, name, dict.fromkeys(neurons, 2.0))
            factors = choose_factors(
                self.checkpoint,
                planned,
                [(w.matrix, w.row, w.column) for w in weights],
                self._importance(name),
                self.protection.tolerance,
                self.plan.effort,
            )
            if not factors:
                return Decision(name, None, f"{which} comes out best as it is")
            text = ", ".join(f"{neuron} by {factor:.4g}" for _, neuron, factor in factors)
            return Decision(name, "rescale", f"{which}: neuron {text} rescaled", None, tuple(factors))
        wanted = self.protection.raise_to if action == "raise" else self._source_format(planned.tensor)
        chosen = fitting_format(get_format(wanted), planned.tensor.n_columns)
        if action == "raise" and chosen.bits_per_weight <= get_format(planned.format).bits_per_weight:
            return Decision(name, None, f"{which}: {planned.format} is as fine as {chosen.name}")
        verb = "raised to" if action == "raise" else "kept out of quantization, in"
        return Decision(name, action, f"{which}: {verb} {chosen.name}", chosen.name)

    def _measured(self, name: str, weights: list[SuperWeight], special: set[str], trials: Trials) -> Decision:
        """The best of all ways for a tensor by measurement, or none. Of a budget's plan it is kept for other plans that
        give the tensor the same format: nothing else of a plan is looked at there."""
        if self.plan.spent is None:
            return self._compared(name, weights, special, trials)
        columns = self._importance(name)
        cached = self.cache.entry(
            "protection",
            tensor=name,
            format=self._planned[name].format,
            effort=str(self.plan.effort),
            weights=[(weight.matrix, weight.row, weight.column) for weight in weights],
            tolerance=self.protection.tolerance,
            importance=None if columns is None else arrays_identity({"columns": columns}),
            text=trials.text,
        )
        return Decision.from_dict(cached.json_result(lambda: asdict(self._compared(name, weights, special, trials))))

    def _compared(self, name: str, weights: list[SuperWeight], special: set[str], trials: Trials) -> Decision:
        """The same, measured now."""
        none = Decision(name, None, f"{_which(weights)}: nothing lowers the divergence of this tensor beyond doubt")
        actions: list[Action] = [*_FREE]
        if self.plan.spent is None:  # a budget has weighed the tensor's format against all others
            actions.append("raise")
        options = [none, *(self._option(action, name, weights) for action in actions)]
        without = self._candidate(none, weights, trials)
        scores: dict[Action | None, np.ndarray] = {None: self._scores(none, without, trials)}
        for option in options[1:]:
            if option.action is None:
                continue
            candidate = self._candidate(option, weights, trials)
            # A pin that the codes meet anyway changes none of them.
            same = np.array_equal(candidate.decoded, without.decoded)
            scores[option.action] = scores[None] if same else self._scores(option, candidate, trials)
        best = none
        for option in options[1:]:
            gained = scores[None] - scores.get(option.action, scores[None])
            if option.action in _FREE and _beyond_doubt(gained, scores[None]):
                best = min(best, option, key=lambda o: scores[o.action].mean())
        finer = options[-1]
        if finer.action == "raise":
            gained = scores[best.action] - scores["raise"]
            if _beyond_doubt(gained, scores[None]) and self._worth_its_bytes(finer, gained, special, trials):
                best = finer
        why = best.why
        if best is not none:
            why += f", KLD of this tensor {scores[None].mean():.4g} -> {scores[best.action].mean():.4g}"
        measured = tuple(self._trial(o, scores[o.action], scores[None]) for o in options if o is none or o.action)
        return replace(best, why=why, trials=measured)

    def _worth_its_bytes(self, option: Decision, difference: np.ndarray, special: set[str], trials: Trials) -> bool:
        """Whether a finer format gains more per byte here than in the nearest layer without super weights."""
        planned = self._planned[option.tensor]
        layer = planned.tensor.layer or 0
        others = [
            p
            for p in self.plan.tensors
            if p.tensor.role is planned.tensor.role and p.format == planned.format and p.tensor.name not in special
        ]
        if not others:
            return True
        other = min(others, key=lambda p: (abs((p.tensor.layer or 0) - layer), p.tensor.name))
        plain, raised = Decision(other.tensor.name, None, ""), replace(option, tensor=other.tensor.name)
        difference_there = np.subtract(
            *(self._scores(each, self._candidate(each, [], trials), trials) for each in (plain, raised))
        )
        elsewhere = max(0.0, float(difference_there.mean()))
        return float(difference.mean()) >= _TIMES_ELSEWHERE * elsewhere

    def _trial(self, option: Decision, scores: np.ndarray, without: np.ndarray) -> Trial:
        planned = self._planned[option.tensor]
        finer = planned if option.format is None else replace(planned, format=option.format)
        error = float((without - scores).std(ddof=1) / np.sqrt(scores.size))
        what = "none" if option.action is None else option.action
        return Trial(what, finer.n_bytes - planned.n_bytes, float(scores.mean()), error)

    def _candidate(self, option: Decision, weights: Sequence[SuperWeight], trials: Trials) -> "WithEncoded":
        """The source with the tensor encoded in this way."""
        plan, model_map = apply(option, weights, self.protection.tolerance, self.plan, self.model_map)
        spec = model_map.tensor(option.tensor)
        with Encoder(self.checkpoint, plan, self.importance, self.threads) as encoder:
            decoded = decoded_as_it_acts(encoder, spec)
        return WithEncoded(trials.checkpoint, trials.model_map.tensor(option.tensor).sources, decoded)

    def _scores(self, option: Decision, candidate: "WithEncoded", trials: Trials) -> np.ndarray:
        """The divergence at every position with the tensor encoded in this way and all others as they are."""
        name = f"{option.tensor} {option.action or 'none'}".replace(".", "-").replace(" ", "-")
        first_layer = self.model_map.tensor(option.tensor).layer or 0
        divergences: np.ndarray = trials.baseline.stream_scores(candidate, name, first_layer=first_layer)[2]
        return divergences

    def _importance(self, name: str) -> np.ndarray | None:
        if self.importance is None or name not in self.importance.names:
            return None
        return self.importance.columns(name)

    def _source_format(self, tensor: TensorSpec) -> str:
        dtype = self.checkpoint.tensors[tensor.sources[0]].dtype
        return dtype if dtype in ("F16", "BF16") else "F32"


@dataclass(frozen=True, eq=False)
class WithEncoded:
    """A checkpoint's weights of which one tensor, under these names, is what it was encoded as: float32
    [n_rows, n_columns], as it acts."""

    checkpoint: Checkpoint
    names: Sequence[str]
    decoded: np.ndarray

    @property
    def tensors(self) -> Mapping[str, object]:
        return self.checkpoint.tensors

    def read(self, name: str) -> np.ndarray:
        if name not in self.names:
            return self.checkpoint.read(name)
        n, i = len(self.decoded) // len(self.names), self.names.index(name)
        return self.decoded[i * n : (i + 1) * n]


def decoded_as_it_acts(encoder: Encoder, spec: TensorSpec) -> np.ndarray:
    """The tensor's weights as they are encoded, rescaled columns scaled back, as the up projection does it."""
    rows = encoder.decoded(spec.name)
    back = tuple(replace(part, factor=1 / part.factor) for part in spec.rescaled)
    return rescale_rows(replace(spec, rescaled=back), rows, 0)


def _beyond_doubt(difference: np.ndarray, scores: np.ndarray) -> bool:
    """Whether a divergence is lower by more than chance and by more than nothing; difference: at every position."""
    error = difference.std(ddof=1) / np.sqrt(difference.size)
    return bool(difference.mean() > max(_STANDARD_ERRORS * error, _LEAST_GAIN * scores.mean()))


def _which(weights: Sequence[SuperWeight]) -> str:
    places = ", ".join(f"{w.row},{w.column}" + (f" of expert {w.matrix}" if w.matrix else "") for w in weights)
    return f"super weight{'s' if len(weights) > 1 else ''} {places}"
