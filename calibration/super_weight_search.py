"""The search for super weights: look for spikes, set what makes them to zero, look again; then measure each removal.

Candidates are weights whose row and column spike together and which make much of their row's spike themselves; where
the Fisher factors are known, weights whose removal these expect to cost much as well. Every candidate, and every set of
candidates that share a neuron or a residual channel, is confirmed by running the model without it.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibration.control import Progress, ShouldStop, never, silent
from calibration.fisher import FisherFactors
from calibration.model import load_config
from calibration.removals import Removals, WithoutWeights
from calibration.spikes import SPIKE_RATIO, Candidate, DownProjection, Peaks, find_spikes
from calibration.stream import LayerStream
from calibration.super_weights import JointSet, LargestSpike, Place, SuperWeight, SuperWeightReport

if TYPE_CHECKING:
    from calibration.corpus import Corpus
    from calibration.weights import WeightSource

LEAST_DIVERGENCE = 0.01
"""Nats per token, of a removal that confirms a candidate: what rounding all weights to 5 bits costs a model."""

MOST_LOOKS = 6
MOST_CANDIDATES = 24
MOST_MEMBERS = 6

# A member of a joint set without which the set costs as much, up to this share, adds nothing to it.
_ADDS_NOTHING = 0.1


def find_super_weights(
    source: "WeightSource",
    config_dir: Path,
    projections: Sequence[DownProjection],
    prompts: np.ndarray,
    corpus: "Corpus",
    *,
    work_dir: Path,
    factors: FisherFactors | None = None,
    model: str | None = None,
    revision: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress = silent,
    should_stop: ShouldStop = never,
) -> SuperWeightReport:
    """Look at the model over the prompts, and measure over the corpus what its candidates are worth.

    projections: every down projection. prompts: int [n, length]. factors: for the second criterion, where known.
    work_dir: checkpoints and the journal of removals; a call with the same arguments continues there.
    Raises Interrupted when should_stop, polled after every layer, says so.
    """
    search = _Search(source, config_dir, projections, work_dir, f"{model}@{revision}", device, threads)
    candidates, largest, looks = search.look_until_no_spike(prompts, progress, should_stop)
    if factors is not None:
        found = {candidate.place for candidate in candidates}
        candidates += [c for c in search.expected_to_cost(factors) if c.place not in found]
    candidates.sort(key=lambda c: (-c.strength, c.place))
    removals = Removals(
        source,
        config_dir,
        corpus,
        work_dir,
        identity=search.identity,
        device=device,
        threads=threads,
        progress=progress,
        should_stop=should_stop,
    )
    tried = [_removed(candidate, removals) for candidate in candidates[:MOST_CANDIDATES]]
    tried.sort(key=lambda pair: (-pair[1].divergence_when_removed, pair[1].place))
    sets = _joint_sets(tried, removals)
    together = {place for s in sets if s.confirmed for place in s.members}
    weights = [weight for _, weight in tried]
    confirmed = [w for w in weights if w.divergence_when_removed >= LEAST_DIVERGENCE or w.place in together]
    removals.discard()
    return SuperWeightReport(
        weights=tuple(confirmed),
        rejected=tuple(w for w in weights if w not in confirmed),
        joint_sets=tuple(sets),
        untried=len(candidates[MOST_CANDIDATES:]),
        largest_spikes=tuple(largest),
        criteria=("spikes",) if factors is None else ("spikes", "gradients"),
        spike_ratio=SPIKE_RATIO,
        least_divergence=LEAST_DIVERGENCE,
        looks=looks,
        prompts=len(prompts),
        prompt_length=prompts.shape[1],
        perplexity=removals.perplexity,
        corpus=corpus.name,
        corpus_sha256=corpus.sha256,
        samples=len(corpus.tokens),
        sequence_length=corpus.tokens.shape[1],
        model=model,
        revision=revision,
    )


class _Search:
    """The model, and the matrices that may hold a super weight."""

    def __init__(
        self,
        source: "WeightSource",
        config_dir: Path,
        projections: Sequence[DownProjection],
        work_dir: Path,
        identity: str,
        device: str,
        threads: int | None,
    ):
        self.source, self.config_dir, self.work_dir, self.identity = source, config_dir, work_dir, identity
        self.device, self.threads = device, threads
        self.projections = {projection.source: projection for projection in projections}
        # A down projection has as many rows as the residual stream has channels.
        self.n_rows = int(load_config(config_dir).hidden_size)

    def look_until_no_spike(
        self, prompts: np.ndarray, progress: Progress, should_stop: ShouldStop
    ) -> tuple[list[Candidate], list[LargestSpike], int]:
        """Candidates, the largest spike of every layer in the model as it is, and how often it was looked at, each
        time with all candidates at zero that had been found before."""
        found: dict[Place, Candidate] = {}
        largest: list[LargestSpike] = []
        for n_looks in range(1, MOST_LOOKS + 1):
            stream, peaks = self._observe(prompts, f"look-{n_looks}", list(found.values()), progress, should_stop)
            spikes, candidates = self._spikes(stream, peaks)
            largest = largest or spikes
            new = {candidate.place: candidate for candidate in candidates if candidate.place not in found}
            if not new:
                break
            found |= new
        return list(found.values()), largest, n_looks

    def expected_to_cost(self, factors: FisherFactors) -> list[Candidate]:
        """Weights w of which 1/2 rows[i] columns[j] w**2 is much: what they are worth to second order. That falls short
        of what large changes cost, which is why a tenth of what confirms is enough."""
        found = []
        for projection in self.projections.values():
            if projection.tensor not in factors.rows:
                continue
            for k, weights in enumerate(self._matrices(self.source, projection)):
                matrix = projection.matrix + k
                rows, columns = factors.rows[projection.tensor][matrix], factors.columns[projection.tensor][matrix]
                costs = 0.5 * rows[:, None] * columns * np.square(weights, dtype=np.float64)
                for row, column in np.argwhere(costs >= 0.1 * LEAST_DIVERGENCE).tolist():
                    place = Place(projection.layer, projection.tensor, matrix, row, column)
                    value, strength = float(weights[row, column]), float(costs[row, column] / LEAST_DIVERGENCE)
                    stored_row = k * self.n_rows + row
                    found.append(Candidate(place, projection.source, stored_row, value, strength, "gradients"))
        return found

    def _observe(
        self,
        prompts: np.ndarray,
        name: str,
        removed: list[Candidate],
        progress: Progress,
        should_stop: ShouldStop,
    ) -> tuple[LayerStream, Peaks]:
        peaks = Peaks()
        stream = LayerStream(
            WithoutWeights(self.source, map(_stored, removed)),
            self.config_dir,
            prompts,
            self.work_dir / name,
            observer=peaks,
            identity=f"{self.identity} without {sorted(c.place for c in removed)}",
            device=self.device,
            threads=self.threads,
        )
        stream.run(progress, should_stop, stage="look for spikes")
        stream.discard_hidden_states()
        return stream, peaks

    def _spikes(self, stream: LayerStream, peaks: Peaks) -> tuple[list[LargestSpike], list[Candidate]]:
        largest: dict[int, LargestSpike] = {}
        candidates: list[Candidate] = []
        for projection, stored_at, parameter in self._seen(stream, peaks):
            for k, weights in enumerate(self._matrices(stream.parameters.source, projection)):
                row_peaks, column_peaks = peaks.rows[parameter][stored_at + k], peaks.columns[parameter][stored_at + k]
                spike, found = find_spikes(projection, k, weights, row_peaks, column_peaks)
                candidates += found
                if spike is not None:
                    before = largest.get(projection.layer, spike)
                    largest[projection.layer] = max(before, spike, key=lambda s: s.row_ratio)
        return [largest[layer] for layer in sorted(largest)], candidates

    def _seen(self, stream: LayerStream, peaks: Peaks) -> Iterator[tuple[DownProjection, int, str]]:
        """The stored down projections, each with its first matrix's index in the parameter that holds it."""
        for parameter, rows in peaks.rows.items():
            stored = stream.parameters.matrices(parameter, len(rows))
            step = len(rows) // len(stored)
            for i, names in enumerate(stored):
                if len(names) == 1 and names[0] in self.projections:
                    yield self.projections[names[0]], i * step, parameter

    def _matrices(self, source: "WeightSource", projection: DownProjection) -> np.ndarray:
        """float32 [n_matrices, n_rows, n_columns] of the stored tensor."""
        weights = source.read(projection.source)
        return weights.reshape(-1, self.n_rows, weights.shape[-1])


_Tried = tuple[Candidate, SuperWeight]


def _stored(candidate: Candidate) -> tuple[str, int, int]:
    return candidate.source, candidate.stored_row, candidate.place.column


def _without(candidates: Sequence[Candidate], removals: Removals) -> tuple[float, float]:
    return removals.of(map(_stored, candidates), min(candidate.place.layer for candidate in candidates))


def _removed(candidate: Candidate, removals: Removals) -> _Tried:
    loss, divergence = _without([candidate], removals)
    figures = candidate.row_ratio, candidate.column_ratio, candidate.share, candidate.found_by
    return candidate, SuperWeight(*candidate.place, candidate.value, loss, divergence, *figures)


def _joint_sets(tried: Sequence[_Tried], removals: Removals) -> list[JointSet]:
    """Sets of weights that share a neuron (their column) or a residual channel (their row) of a matrix; the strongest
    of all when none costs anything alone; and all together, for the record. tried: the most costly first."""
    groups: dict[tuple[str, str, int, int], list[_Tried]] = defaultdict(list)
    for candidate, weight in tried:
        groups["neuron", weight.tensor, weight.matrix, weight.column].append((candidate, weight))
        groups["row", weight.tensor, weight.matrix, weight.row].append((candidate, weight))
    sets = [_joint_set(members, key[0], removals) for key, members in sorted(groups.items()) if len(members) > 1]
    if len(tried) > 1:
        if tried[0][1].divergence_when_removed < LEAST_DIVERGENCE:
            sets.append(_joint_set(tried, "candidates", removals))
        every = [candidate for candidate, _ in tried]
        sets.append(JointSet(_places(every), "all candidates", *_without(every, removals), confirmed=False))
    return sets


def _joint_set(tried: Sequence[_Tried], why: str, removals: Removals) -> JointSet:
    """Members may do nothing alone and everything together. Those are left out, the weakest first, without whose
    removal the model suffers as much; a set that is worth no more than its strongest member is not confirmed."""
    members = [candidate for candidate, _ in tried[:MOST_MEMBERS]]
    loss, divergence = _without(members, removals)
    alone = tried[0][1].divergence_when_removed
    confirmed = divergence >= LEAST_DIVERGENCE and divergence > (1 + _ADDS_NOTHING) * alone
    enough = (1 - _ADDS_NOTHING) * divergence
    for candidate in reversed(members) if confirmed else ():
        rest = [member for member in members if member is not candidate]
        if len(rest) > 1 and _without(rest, removals)[1] >= enough:
            members = rest
            loss, divergence = _without(members, removals)
    return JointSet(_places(members), why, loss, divergence, confirmed)


def _places(candidates: Iterable[Candidate]) -> tuple[Place, ...]:
    return tuple(sorted(candidate.place for candidate in candidates))
