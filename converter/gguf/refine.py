"""The stage `refine`: what the parts of a plan cost together, measured, and a plan that takes it into account.

Predictions add the losses of tensors up, and errors do not add up, least of all below 3 bits. So the plan is carried
out and its divergence measured; then, for each part of the model, once more with the source's weights in that part.
What the divergence falls by is what the part costs among the errors of all others. Its ratio to the part's prediction
corrects the losses of the part's tensors, in all formats, and another plan is made under the corrected losses. If it
is better its parts are measured in turn; if not, the next plan is made with half of the correction. Of the plans that
were measured the best one stays: the one of the least divergence; where a divergence alone is the goal, the smallest
that stays below it.

A part is one role in a third of the layers; embedding and output are parts of their own.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from bitwright.calibration.control import PassControl
from bitwright.calibration.evaluation.quality import Baseline
from bitwright.converter.artifact.run import Run
from bitwright.converter.artifact.target import Prepared
from bitwright.converter.artifact.writer import ArtifactWriter
from bitwright.converter.gguf.encode import Encoder
from bitwright.converter.gguf.layout import gguf_layouts
from bitwright.converter.gguf.verify import DecodedArtifact
from bitwright.converter.job.kept import kept_json
from bitwright.converter.measure.evidence import CORRECTIONS_FILE, TRIALS
from bitwright.converter.measure.running import calibration_text, load_tokenizer, runnable, streamable
from bitwright.converter.model.stored_rows import part_of_source
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import make_directory, remove_tree
from bitwright.formats.files.journal import append_line, read_lines
from bitwright.profiles.evidence import Evidence
from bitwright.profiles.planning.plan import Plan
from bitwright.profiles.vocabulary import ModelMap

if TYPE_CHECKING:
    from bitwright.calibration.statistics.importance import ImportanceMatrix
    from bitwright.calibration.stream.weights import WeightSource

SAMPLES, SEQUENCE_LENGTH = 8, 256
# Beyond that a ratio says more of the text than of the part.
LARGEST_RATIO = 4.0
# The share of a correction, in logarithms, that the next plan is made with. No one factor is right for all formats of a
# part, so all of it overshoots.
FIRST_SHARE = 0.5
# A part of which less than this share of the whole is predicted is not worth a run.
NEGLIGIBLE_SHARE = 0.005


def parts_of(model_map: ModelMap) -> dict[str, list[str]]:
    """The tensors that may be quantized, by the part they belong to."""
    parts: dict[str, list[str]] = {}
    for tensor in model_map.tensors:
        if tensor.quantizable:
            third = "" if tensor.layer is None else f", third {3 * tensor.layer // model_map.n_layers + 1} of 3"
            parts.setdefault(f"{tensor.role}{third}", []).append(tensor.name)
    return parts


def corrections(predicted: Mapping[str, float], whole: float, without: Mapping[str, float]) -> dict[str, float]:
    """The factor of every part's losses.

    predicted: part -> nats; whole: the measured divergence of the plan; without: part -> the same with the source's
    weights in it, for the parts that were measured. Others keep their share; together the corrected losses of the plan
    are its measured divergence.
    """
    total = sum(predicted.values())
    ratios = dict.fromkeys(predicted, 1.0)
    measured = {part: max(whole - loss, 0.0) for part, loss in without.items()}
    if sum(measured.values()) > 0:
        # What the measured parts cost together, as if nothing were lost between them.
        common = sum(measured.values()) / sum(predicted[part] for part in measured)
        for part, cost in measured.items():
            ratios[part] = float(np.clip(cost / predicted[part] / common, 1 / LARGEST_RATIO, LARGEST_RATIO))
    scale = whole / sum(ratio * predicted[part] for part, ratio in ratios.items()) if total > 0 else 1.0
    return {part: scale * ratio for part, ratio in ratios.items()}


def refine(
    run: Run, decide: Callable[[Evidence], Prepared[Plan]], evidence: Evidence, importance: "ImportanceMatrix | None"
) -> Evidence:
    """Evidence under which `decide` makes the best of the plans that the job's rounds of corrections lead to.

    What was measured stays in the work directory, and a call after an interruption continues there.
    Raises Interrupted when the run should stop.
    """

    def correct() -> dict[str, Any]:
        best = _best_plan(run, decide, evidence, importance)
        factors = dict(best.factors)
        if not best.meets_its_goal:  # scaled, the losses would lead to another plan, which nobody has measured
            factors = {name: best.scale * factor for name, factor in factors.items()}
        return {"divergence": best.divergence, "factors": factors}

    path, scratch = run.work_dir / CORRECTIONS_FILE, run.work_dir / TRIALS
    record = kept_json(path, "refinement", run.progress, correct, scratch)
    return evidence.corrected(record["factors"])


def _best_plan(
    run: Run, decide: Callable[[Evidence], Prepared[Plan]], evidence: Evidence, importance: "ImportanceMatrix | None"
) -> "_Measured":
    """The best of the plans that the corrections lead to."""
    prepared = decide(evidence)
    trials, rounds = _Trials(run, importance), run.job.refine

    def measure(step: int, prepared: Prepared[Plan], factors: Mapping[str, float]) -> _Measured:
        divergence = trials.divergence(prepared)
        run.progress.say(f"refinement {step} of {rounds}: {divergence:.4f} nats a token, measured")
        return _Measured(prepared, divergence, _predicted(prepared.plan, evidence.corrected(factors)), factors)

    best = measure(0, prepared, {})
    seen, share = {best.prepared.plan.digest()}, FIRST_SHARE
    change = _change(best, trials)
    for step in range(1, rounds + 1):
        # All of what is wrong in sum, which decides how much a divergence takes; of what is wrong among parts a share.
        factors = {
            name: best.factors.get(name, 1.0) * best.scale * (of_part / best.scale) ** share
            for name, of_part in change.items()
        }
        try:
            prepared = decide(evidence.corrected(factors))
        except ConvertError:
            break  # by what has been measured the goal is out of reach, and the best of what there was stays
        if prepared.plan.digest() in seen:
            break
        seen.add(prepared.plan.digest())
        attempt = measure(step, prepared, factors)
        if attempt.rank < best.rank:
            best, share = attempt, FIRST_SHARE
            change = _change(best, trials) if step < rounds else {}
        else:
            share /= 2
    return best


def _change(measured: "_Measured", trials: "_Trials") -> dict[str, float]:
    """By what each tensor's losses would have to change to agree with what is measured of its part."""
    parts = parts_of(measured.prepared.run.model_map)
    of_part = {part: sum(measured.losses[name] for name in names) for part, names in parts.items()}
    worth = [part for part, loss in of_part.items() if loss > NEGLIGIBLE_SHARE * sum(of_part.values())]
    without = {part: trials.divergence(measured.prepared, parts[part]) for part in worth}
    change = corrections(of_part, measured.divergence, without)
    return {name: change[part] for part, names in parts.items() for name in names}


def _predicted(plan: Plan, evidence: Evidence) -> dict[str, float]:
    """What each tensor's format is expected to cost; 16 bits cost nothing that counts."""
    return {p.tensor.name: evidence.losses.get(p.tensor.name, {}).get(p.format, 0.0) for p in plan.tensors}


@dataclass(frozen=True)
class _Measured:
    """A plan that was carried out, its divergence as it was measured, the loss that was predicted of each tensor, and
    the factors of the evidence that it was made by."""

    prepared: Prepared[Plan]
    divergence: float
    losses: Mapping[str, float]
    factors: Mapping[str, float]

    @cached_property
    def rank(self) -> tuple[bool, float]:
        """The lower the better. First comes whether the plan misses a divergence that is the only goal; of those that
        do not the smallest is the best, and of all others the one that diverges least."""
        if self.meets_its_goal:
            return False, float(self.prepared.files.n_bytes)
        return self._only_goal is not None, self.divergence

    @property
    def scale(self) -> float:
        predicted = sum(self.losses.values())
        return self.divergence / predicted if predicted > 0 else 1.0

    @property
    def meets_its_goal(self) -> bool:
        return self._only_goal is not None and self.divergence <= self._only_goal

    @property
    def _only_goal(self) -> float | None:
        """The divergence that was asked for where no size was."""
        spent = self.prepared.plan.spent
        if spent is None or spent.budget.limits_size:
            return None
        return spent.budget.kld


class _Trials:
    """Plans of one model, carried out in the work directory one after another and measured beside the source.

    The journal remembers what was measured of which plan.
    """

    def __init__(self, run: Run, importance: "ImportanceMatrix | None"):
        self.run, self.importance, self.directory = run, importance, run.work_dir / TRIALS
        make_directory(self.directory)
        self.journal = self.directory / "measured.jsonl"
        self._known: dict[str, float] = {
            entry["trial"]: entry["divergence"] for entry in read_lines(self.journal, run.progress.say)
        }
        job = run.job
        self._source, self._model_map = runnable(run.checkpoint, run.model_map, run.work_dir)
        tokenizer = load_tokenizer(self._source.location)
        text = calibration_text(job, tokenizer, run.model_map, SAMPLES, SEQUENCE_LENGTH)
        self._baseline = Baseline(
            streamable(run, self._source),
            text,
            PassControl(self.directory / "runs", run.progress, run.should_stop),
            known=run.cache.states(text),
        )
        self._written: tuple[str, DecodedArtifact] | None = None

    def divergence(self, prepared: Prepared[Plan], exact: Collection[str] = ()) -> float:
        """The mean KL divergence from the source, in nats a token, with the source's weights in the tensors `exact`."""
        key = hashlib.sha256(json.dumps([prepared.plan.digest(), sorted(exact)]).encode()).hexdigest()
        if key not in self._known:
            candidate = _Mixed(self._artifact(prepared), self._source, exact)
            scores = self._baseline.stream_scores(candidate, key)
            self._known[key] = float(scores[2].mean())
            append_line(self.journal, {"trial": key, "divergence": self._known[key]})
        return self._known[key]

    def _artifact(self, prepared: Prepared[Plan]) -> DecodedArtifact:
        """The plan carried out; what was encoded of the one before is deleted."""
        plan = prepared.plan
        digest = plan.digest()
        if self._written is None or self._written[0] != digest:
            if self._written is not None:
                remove_tree(self.directory / self._written[0])
            directory = self.directory / digest
            make_directory(directory)
            layouts = gguf_layouts(prepared.run, plan, self.importance)
            with Encoder(self.run.checkpoint, plan, self.importance, self.run.job.n_threads) as encoder:
                writer = ArtifactWriter(encoder, layouts, directory, directory / "encoded.jsonl")
                paths = writer.write(self.run.progress, self.run.should_stop)
            self._written = digest, DecodedArtifact(paths, self._model_map, self.run.job.n_threads)
        return self._written[1]


class _Mixed:
    """A source of weights: the candidate's, but the source's own for the tensors `exact` (GGUF names)."""

    def __init__(self, candidate: DecodedArtifact, source: "WeightSource", exact: Collection[str]):
        self._candidate, self._source, self._exact = candidate, source, set(exact)
        self.tensors = candidate.tensors

    def read(self, name: str) -> np.ndarray:
        exact = [spec.name in self._exact for spec, _ in self.tensors[name]]
        if all(exact):
            return self._source.read(name)
        decoded = self._candidate.read(name)
        if any(exact):
            parts = [part_of_source(spec) for spec, _ in self.tensors[name] if spec.name in self._exact]
            own = self._source.read(name).reshape(decoded.shape)
            decoded = np.where(np.logical_or.reduce(parts), own, decoded)
        return decoded
