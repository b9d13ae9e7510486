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
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from calibration.control import ShouldStop
from calibration.quality import Baseline
from converter.analyse import CORRECTIONS_FILE, TRIALS
from converter.calibrate import calibration_text, load_tokenizer, runnable
from converter.encode import Encoder
from converter.kept import tell_damage
from converter.progress import Progress
from converter.target import Prepared
from converter.verify import DecodedArtifact
from converter.write import ArtifactWriter
from formats.errors import ConvertError
from formats.files import make_directory, remove_tree
from formats.journal import append_line, read_lines
from formats.seals import write_sealed
from profiles.evidence import Evidence
from profiles.plan import Plan
from profiles.vocabulary import ModelMap

if TYPE_CHECKING:
    from calibration.importance import ImportanceMatrix
    from calibration.weights import WeightSource

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
    decide: Callable[[Evidence], Prepared],
    evidence: Evidence,
    importance: "ImportanceMatrix | None",
    rounds: int,
    work_dir: Path,
    progress: Progress,
    should_stop: ShouldStop,
) -> Evidence:
    """Evidence under which `decide` makes the best of the plans that `rounds` corrections lead to.

    What was measured stays in the work directory, and a call after an interruption continues there.
    Raises Interrupted when should_stop says so.
    """
    tell_damage(work_dir / CORRECTIONS_FILE, "refinement", progress)  # a sound one would not be made again
    trials, best = None, None
    factors: dict[str, float] = {}
    seen: set[str] = set()
    for step in range(rounds + 1):
        try:
            prepared = decide(evidence.corrected(factors))
        except ConvertError:
            if best is None:
                raise
            break  # by what has been measured the goal is out of reach, and the best of what there was stays
        if prepared.plan.digest() in seen:
            break
        seen.add(prepared.plan.digest())
        trials = trials or _Trials(prepared, importance, work_dir, progress, should_stop)
        measured = trials.divergence(prepared)
        progress.say(f"refinement {step} of {rounds}: {measured:.4f} nats a token, measured")
        rank = _rank(prepared, measured)
        if best is None or rank < best.rank:
            predicted = _predicted(prepared.plan, evidence.corrected(factors))
            best = _Best(rank, measured, sum(predicted.values()), factors, _only_goal(prepared))
            share = FIRST_SHARE
            change = {} if step == rounds else _change(prepared, predicted, measured, trials)
        else:
            share /= 2
        # All of what is wrong in sum, which decides how much a divergence takes; of what is wrong among parts a share.
        factors = {
            name: best.factors.get(name, 1.0) * best.scale * (of_part / best.scale) ** share
            for name, of_part in change.items()
        }
    assert best is not None
    factors = dict(best.factors)
    if not best.meets_its_goal:  # scaled, the losses would lead to another plan, which nobody has measured
        factors = {name: best.scale * factor for name, factor in factors.items()}
    record = {"divergence": best.divergence, "factors": factors}
    write_sealed(work_dir / CORRECTIONS_FILE, "refinement", json.dumps(record, indent=1).encode())
    remove_tree(work_dir / TRIALS)
    return evidence.corrected(factors)


def _change(prepared: Prepared, predicted: Mapping[str, float], whole: float, trials: "_Trials") -> dict[str, float]:
    """By what each tensor's losses would have to change to agree with what is measured of its part."""
    parts = parts_of(prepared.model_map)
    of_part = {part: sum(predicted[name] for name in names) for part, names in parts.items()}
    worth = [part for part, loss in of_part.items() if loss > NEGLIGIBLE_SHARE * sum(of_part.values())]
    without = {part: trials.divergence(prepared, parts[part]) for part in worth}
    change = corrections(of_part, whole, without)
    return {name: change[part] for part, names in parts.items() for name in names}


def _predicted(plan: Plan, evidence: Evidence) -> dict[str, float]:
    """What each tensor's format is expected to cost; 16 bits cost nothing that counts."""
    losses = {p.tensor.name: evidence.losses.get(p.tensor.name, {}).get(p.format, 0.0) for p in plan.tensors}
    return losses


def _rank(prepared: Prepared, measured: float) -> tuple[bool, float]:
    """The lower the better. First comes whether the plan misses a divergence that is the only goal; of those that do
    not the smallest is the best, and of all others the one that diverges least."""
    goal = _only_goal(prepared)
    if goal is None or measured > goal:
        return goal is not None, measured
    return False, float(prepared.file_bytes)


def _only_goal(prepared: Prepared) -> float | None:
    """The divergence that was asked for where no size was."""
    assert prepared.plan.spent is not None
    budget = prepared.plan.spent.budget
    return budget.kld if budget.size is None and budget.bpw is None else None


class _Best(NamedTuple):
    """The best plan: how good, its divergence measured and predicted, and the factors of its evidence. goal: see
    _only_goal."""

    rank: tuple[bool, float]
    divergence: float
    predicted: float
    factors: dict[str, float]
    goal: float | None

    @property
    def scale(self) -> float:
        return self.divergence / self.predicted if self.predicted > 0 else 1.0

    @property
    def meets_its_goal(self) -> bool:
        return self.goal is not None and self.divergence <= self.goal


class _Trials:
    """Plans of one model, carried out in the work directory one after another and measured beside the source.

    The journal remembers what was measured of which plan.
    """

    def __init__(
        self,
        first: Prepared,
        importance: "ImportanceMatrix | None",
        work_dir: Path,
        progress: Progress,
        should_stop: ShouldStop,
    ):
        self.importance, self.directory = importance, work_dir / TRIALS
        self.progress, self.should_stop = progress, should_stop
        make_directory(self.directory)
        self.journal = self.directory / "measured.jsonl"
        self._known: dict[str, float] = {
            entry["trial"]: entry["divergence"] for entry in read_lines(self.journal, progress.say)
        }
        job = first.job
        self._source, self._model_map = runnable(first.checkpoint, first.model_map, work_dir)
        tokenizer = load_tokenizer(self._source.location)
        self._baseline = Baseline(
            self._source,
            self._source.location,
            calibration_text(job, tokenizer, first.model_map, SAMPLES, SEQUENCE_LENGTH),
            work_dir=self.directory / "runs",
            device=job.device,
            threads=job.n_threads,
        )
        self._written: tuple[str, DecodedArtifact] | None = None

    def divergence(self, prepared: Prepared, exact: Collection[str] = ()) -> float:
        """The mean KL divergence from the source, in nats a token, with the source's weights in the tensors `exact`."""
        key = hashlib.sha256(json.dumps([prepared.plan.digest(), sorted(exact)]).encode()).hexdigest()
        if key not in self._known:
            candidate = _Mixed(self._artifact(prepared), self._source, exact)
            scores = self._baseline.scores(candidate, key, progress=self.progress, should_stop=self.should_stop)
            self._known[key] = float(scores[2].mean())
            append_line(self.journal, {"trial": key, "divergence": self._known[key]})
        return self._known[key]

    def _artifact(self, prepared: Prepared) -> DecodedArtifact:
        """The plan carried out; what was encoded of the one before is deleted."""
        job, plan = prepared.job, prepared.plan
        digest = plan.digest()
        if self._written is None or self._written[0] != digest:
            if self._written is not None:
                remove_tree(self.directory / self._written[0])
            directory = self.directory / digest
            make_directory(directory)
            with Encoder(prepared.checkpoint, plan, self.importance, job.n_threads) as encoder:
                writer = ArtifactWriter(
                    encoder, prepared.layouts(self.importance), directory, directory / "encoded.jsonl"
                )
                paths = writer.write(self.progress, self.should_stop)
            self._written = digest, DecodedArtifact(paths, self._model_map)
        return self._written[1]


class _Mixed:
    """A source of weights: the candidate's, but the source's own for the tensors `exact` (GGUF names)."""

    def __init__(self, candidate: DecodedArtifact, source: "WeightSource", exact: Collection[str]):
        self._candidate, self._source, self._exact = candidate, source, set(exact)
        self.tensors = candidate.tensors

    def read(self, name: str) -> np.ndarray:
        spec, _ = self.tensors[name]
        return (self._source if spec.name in self._exact else self._candidate).read(name)
