"""The search for super weights: look for spikes, set what makes them to zero, look again; then measure each removal.

Candidates are weights whose row and column spike together and which make much of their row's spike themselves; where
the Fisher factors are known, weights whose removal these expect to cost much as well. Every candidate, and every set of
candidates that share a neuron or a residual channel, is confirmed by running the model without it.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from bitwright.calibration import places
from bitwright.calibration.control import PassControl
from bitwright.calibration.sensitivity.fisher import FisherFactors
from bitwright.calibration.statistics.super_weights import JointSet, LargestSpike, Place, SuperWeight, SuperWeightReport
from bitwright.calibration.stream.forward import stream_past
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.stream.weights import ParameterReader, WeightSource
from bitwright.calibration.super_weights.removals import Removals, WithoutWeights
from bitwright.calibration.super_weights.spikes import SPIKE_RATIO, Candidate, DownProjection, Peaks, find_spikes
from bitwright.calibration.text.corpus import Corpus

LEAST_DIVERGENCE = 0.01
"""Nats per token, of a removal that confirms a candidate: what rounding all weights to 5 bits costs a model."""

MOST_LOOKS = 6
MOST_CANDIDATES = 24
MOST_MEMBERS = 6

# A member of a joint set without which the set costs as much, up to this share, adds nothing to it.
_ADDS_NOTHING = 0.1


def stream_super_weights(
    streamable: StreamableModel,
    projections: Sequence[DownProjection],
    prompts: np.ndarray,
    corpus: Corpus,
    control: PassControl,
    factors: FisherFactors | None = None,
) -> SuperWeightReport:
    """Run the model over the prompts to look for candidates, and over the corpus to measure what they are worth.

    projections: every down projection. prompts: int [n, length]. factors: for the second criterion, where known. The
    work directory keeps the journal of removals beside the checkpoints.
    Raises Interrupted when the control, asked after every layer, says so.
    """
    search = _Search(streamable, projections, control)
    candidates, largest, looks = search.look_until_no_spike(prompts)
    if factors is not None:
        spiking = {candidate.place for candidate in candidates}
        candidates += [c for c in search.expected_to_cost(factors) if c.place not in spiking]
    candidates.sort(key=lambda c: (-c.strength, c.place))
    removals = Removals(streamable, corpus, control)
    to_try = candidates[:MOST_CANDIDATES]
    tried = [
        _removed(candidate, removals, f"super weights: try {i} of {len(to_try)}")
        for i, candidate in enumerate(to_try, start=1)
    ]
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
        **corpus.identity,
        model=streamable.name,
        revision=streamable.revision,
    )


class _Search:
    """The model, and the matrices that may hold a super weight."""

    def __init__(self, streamable: StreamableModel, projections: Sequence[DownProjection], control: PassControl):
        self._model, self._control = streamable, control
        self._projections = {projection.source: projection for projection in projections}

    def look_until_no_spike(self, prompts: np.ndarray) -> tuple[list[Candidate], list[LargestSpike], int]:
        """Candidates, the largest spike of every layer in the model as it is, and how often it was looked at, each
        time with all candidates at zero that had been found before."""
        candidates_by_place: dict[Place, Candidate] = {}
        largest: list[LargestSpike] = []
        for n_looks in range(1, MOST_LOOKS + 1):
            removed = list(candidates_by_place.values())
            without = f"without {sorted(c.place for c in removed)}"
            weights = WithoutWeights(self._model.weights, map(_stored, removed))
            peaks = Peaks()
            parameters = stream_past(
                peaks,
                replace(self._model, weights=weights, variant=f"{self._model.variant} {without}".lstrip()),
                prompts,
                self._control.within(f"look-{n_looks}"),
                stage="look for spikes",
            )
            spikes, candidates = self._spikes(parameters, peaks)
            largest = largest or spikes
            new = {candidate.place: candidate for candidate in candidates if candidate.place not in candidates_by_place}
            if not new:
                break
            candidates_by_place |= new
        return list(candidates_by_place.values()), largest, n_looks

    def expected_to_cost(self, factors: FisherFactors) -> list[Candidate]:
        """Weights w of which 1/2 rows[i] columns[j] w**2 is much: what they are worth to second order. That falls short
        of what large changes cost, which is why a tenth of what confirms is enough."""
        candidates = []
        for projection in self._projections.values():
            if projection.tensor not in factors.rows:
                continue
            for k, weights in enumerate(self._matrices(self._model.weights, projection)):
                matrix = projection.matrix + k
                rows, columns = factors.rows[projection.tensor][matrix], factors.columns[projection.tensor][matrix]
                costs = 0.5 * rows[:, None] * columns * np.square(weights, dtype=np.float64)
                for row, column in np.argwhere(costs >= 0.1 * LEAST_DIVERGENCE).tolist():
                    place = Place(projection.layer, projection.tensor, matrix, row, column)
                    value, strength = float(weights[row, column]), float(costs[row, column] / LEAST_DIVERGENCE)
                    at = projection.stored_at(k, row, column, weights.shape)
                    candidates.append(Candidate(place, projection.source, at, value, strength, "gradients"))
        return candidates

    def _spikes(self, parameters: ParameterReader, peaks: Peaks) -> tuple[list[LargestSpike], list[Candidate]]:
        largest: dict[int, LargestSpike] = {}
        candidates: list[Candidate] = []
        for projection, stored_at, parameter in self._seen(parameters, peaks):
            for k, weights in enumerate(self._matrices(parameters.source, projection)):
                row_peaks, column_peaks = peaks.rows[parameter][stored_at + k], peaks.columns[parameter][stored_at + k]
                spike, spiking = find_spikes(projection, k, weights, row_peaks, column_peaks)
                candidates += spiking
                if spike is not None:
                    before = largest.get(projection.layer, spike)
                    largest[projection.layer] = max(before, spike, key=lambda s: s.row_ratio)
        return [largest[layer] for layer in sorted(largest)], candidates

    def _seen(self, parameters: ParameterReader, peaks: Peaks) -> Iterator[tuple[DownProjection, int, str]]:
        """The stored down projections, each with its first matrix's index in the parameter that holds it."""
        by_name = {source: (places.Place(source, 0),) for source in self._projections}
        for parameter, rows in peaks.rows.items():
            for place, span, _ in parameters.places(parameter, len(rows), by_name):
                yield self._projections[place.tensor], span.start, parameter

    def _matrices(self, source: WeightSource, projection: DownProjection) -> np.ndarray:
        """float32 [n_matrices, n_rows, n_columns] of the products with the stored tensor."""
        return projection.matrices(source.read(projection.source))


_Tried = tuple[Candidate, SuperWeight]


def _stored(candidate: Candidate) -> tuple[str, int, int]:
    return candidate.source, *candidate.stored_at


def _without(candidates: Sequence[Candidate], removals: Removals) -> tuple[float, float]:
    return removals.stream_without(map(_stored, candidates), min(candidate.place.layer for candidate in candidates))


def _removed(candidate: Candidate, removals: Removals, stage: str) -> _Tried:
    loss, divergence = removals.stream_without([_stored(candidate)], candidate.place.layer, stage)
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
