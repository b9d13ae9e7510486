"""The stage `refine`: what the parts of a plan cost together, measured, and a plan that takes it into account.

Predictions add the losses of tensors up, and errors do not add up, least of all below 3 bits. So the plan is carried
out and its divergence measured; then, for each part of the model, once more with the source's weights in that part.
What the divergence falls by is what the part costs among the errors of all others. Its ratio to the part's prediction
corrects the losses of the part's tensors, in all formats, and another plan is made under the corrected losses. Of the
plans that were measured the best one stays.

A part is one role in a third of the layers; embedding and output are parts of their own.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibration.control import ShouldStop
from calibration.corpus import load_corpus
from calibration.quality import Baseline
from converter.analyse import CORRECTIONS_FILE
from converter.calibrate import load_tokenizer, runnable, uses_chat
from converter.encode import Encoder
from converter.progress import Progress
from converter.target import Prepared
from converter.verify import DecodedArtifact
from converter.write import ArtifactWriter
from formats.whole_file import whole_file
from profiles.evidence import Evidence
from profiles.plan import Plan
from profiles.vocabulary import ModelMap

if TYPE_CHECKING:
    from calibration.importance import ImportanceMatrix
    from calibration.weights import WeightSource

SAMPLES, SEQUENCE_LENGTH = 8, 256
# Beyond that a ratio says more of the text than of the part.
LARGEST_RATIO = 4.0
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
    directory = work_dir / "refinement"
    best: tuple[float, dict[str, float]] | None = None
    factors: dict[str, float] = {}
    seen: set[str] = set()
    for step in range(rounds + 1):
        prepared = decide(evidence.corrected(factors))
        digest = prepared.plan.digest()
        if digest in seen:
            break
        seen.add(digest)
        trial = _Trial(prepared, importance, directory, progress, should_stop)
        whole = trial.divergence(())
        progress.say(f"refinement {step} of {rounds}: {whole:.4f} nats a token, measured")
        if best is None or whole < best[0]:
            best = whole, factors
        if step == rounds:
            break
        parts, predicted = parts_of(prepared.model_map), _predicted(prepared.plan, evidence.corrected(factors))
        of_part = {part: sum(predicted[name] for name in names) for part, names in parts.items()}
        worth = [part for part, loss in of_part.items() if loss > NEGLIGIBLE_SHARE * sum(of_part.values())]
        without = {part: trial.divergence(parts[part]) for part in worth}
        change = corrections(of_part, whole, without)
        factors = {name: factors.get(name, 1.0) * change[part] for part, names in parts.items() for name in names}
        trial.discard()
    assert best is not None
    with whole_file(work_dir / CORRECTIONS_FILE, "refinement") as file:
        file.write(json.dumps({"divergence": best[0], "factors": best[1]}, indent=1).encode())
    shutil.rmtree(directory, ignore_errors=True)
    return evidence.corrected(best[1])


def _predicted(plan: Plan, evidence: Evidence) -> dict[str, float]:
    """What each tensor's format is expected to cost; 16 bits cost nothing that counts."""
    losses = {p.tensor.name: evidence.losses.get(p.tensor.name, {}).get(p.format, 0.0) for p in plan.tensors}
    return losses


class _Trial:
    """A plan carried out in a directory, to be measured. The journal remembers what was measured of which plan."""

    def __init__(
        self,
        prepared: Prepared,
        importance: "ImportanceMatrix | None",
        directory: Path,
        progress: Progress,
        should_stop: ShouldStop,
    ):
        self.prepared, self.importance, self.directory = prepared, importance, directory
        self.progress, self.should_stop = progress, should_stop
        self.digest, self.journal = prepared.plan.digest(), directory / "measured.jsonl"
        directory.mkdir(parents=True, exist_ok=True)
        self._written: DecodedArtifact | None = None

    def divergence(self, exact: Collection[str]) -> float:
        """The mean KL divergence from the source, in nats a token, with the source's weights in the tensors `exact`."""
        key = hashlib.sha256(json.dumps([self.digest, sorted(exact)]).encode()).hexdigest()
        for line in self.journal.read_text(encoding="utf-8").splitlines() if self.journal.exists() else []:
            known, divergence = json.loads(line)
            if known == key:
                return divergence
        job = self.prepared.job
        checkpoint, model_map = runnable(self.prepared.checkpoint, self.prepared.model_map, self.directory)
        corpus = load_corpus(
            job.calibration,
            load_tokenizer(checkpoint.location),
            SAMPLES,
            min(SEQUENCE_LENGTH, job.sequence_length),
            job.seed,
            chat=uses_chat(job, self.prepared.model_map),
        )
        baseline = Baseline(
            checkpoint,
            checkpoint.location,
            corpus,
            work_dir=self.directory / "runs",
            device=job.device,
            threads=job.n_threads,
        )
        candidate = _Mixed(self._artifact(model_map), checkpoint, exact)
        scores = baseline.scores(candidate, key, progress=self.progress, should_stop=self.should_stop)
        divergence = float(scores[2].mean())
        with self.journal.open("a", encoding="utf-8") as journal:
            journal.write(json.dumps([key, divergence]) + "\n")
        return divergence

    def discard(self) -> None:
        """Delete what was encoded."""
        self._written = None
        shutil.rmtree(self.directory / self.digest, ignore_errors=True)

    def _artifact(self, model_map: ModelMap) -> DecodedArtifact:
        if self._written is None:
            directory = self.directory / self.digest
            directory.mkdir(exist_ok=True)
            job, plan = self.prepared.job, self.prepared.plan
            layouts = self.prepared.layouts(self.importance)
            with Encoder(self.prepared.checkpoint, plan, self.importance, job.n_threads) as encoder:
                writer = ArtifactWriter(encoder, layouts, directory, directory / "encoded.jsonl")
                self._written = DecodedArtifact(writer.write(self.progress, self.should_stop), model_map)
        return self._written


class _Mixed:
    """A source of weights: the candidate's, but the source's own for the tensors `exact` (GGUF names)."""

    def __init__(self, candidate: DecodedArtifact, source: "WeightSource", exact: Collection[str]):
        self._candidate, self._source, self._exact = candidate, source, set(exact)
        self.tensors = candidate.tensors

    def read(self, name: str) -> np.ndarray:
        spec, _ = self.tensors[name]
        return (self._source if spec.name in self._exact else self._candidate).read(name)
