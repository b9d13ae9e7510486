"""The search for super weights: look for spikes, set what makes them to zero, look again; then measure each removal.

Candidates are weights whose row and column spike together and which make much of their row's spike themselves; where
the Fisher factors are known, weights whose removal these expect to cost much as well. Every candidate, and every set of
candidates that share a neuron or a residual channel, is confirmed by running the model without it.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from bitwright.calibration import places
from bitwright.calibration.control import PassControl
from bitwright.calibration.sensitivity.fisher import FisherFactors
from bitwright.calibration.statistics.super_weights import JointSet, LargestSpike, Place, SuperWeight, SuperWeightReport
from bitwright.calibration.stream.forward import stream_past
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.stream.weights import ParameterReader, WeightSource
from bitwright.calibration.super_weights.removal_stream import Removal, WithoutWeights
from bitwright.calibration.super_weights.removals import Effect, Enough, Line, Removals
from bitwright.calibration.super_weights.spikes import (
    LEAST_DIVERGENCE,
    LEAST_EXPECTED,
    SPIKE_RATIO,
    Candidate,
    DownProjection,
    Peaks,
    find_spikes,
)
from bitwright.calibration.text.corpus import Corpus

MOST_LOOKS = 6
# Of all prompts, evenly, that are looked at once more.
_PROMPTS_AGAIN = 8
MOST_CANDIDATES = 24
MOST_MEMBERS = 6

# A divergence so far from what confirms, in its own standard errors, is told from it.
_STANDARD_ERRORS = 3.0

# A member of a joint set without which the set costs as much, up to this share, adds nothing to it.
_ADDS_NOTHING = 0.1


def stream_super_weights(
    streamable: StreamableModel,
    projections: Sequence[DownProjection],
    prompts: np.ndarray,
    corpus: Corpus,
    control: PassControl,
    factors: FisherFactors | None = None,
    known: Iterable[Line] = (),
) -> SuperWeightReport:
    """Run the model over the prompts to look for candidates, and over the corpus to measure what they are worth.

    projections: every down projection. prompts: int [n, length]. factors: for the second criterion, where known. known:
    what `stream_trials` has measured of the same. The work directory keeps the journal of removals beside the
    checkpoints.
    Raises Interrupted when the control, asked after every layer, says so.
    """
    search = _Search(streamable, projections, control)
    candidates, largest, looks = search.look_until_no_spike(prompts)
    if factors is not None:
        candidates = search.with_expected_costs(candidates, factors)
    to_try = _to_try(candidates)
    removals = Removals(streamable, corpus, control, known)
    tried = _tried(to_try, removals)
    sets = _joint_sets(tried, removals)
    together = {place for s in sets if s.confirmed for place in s.members}
    weights = [trial.weight for trial in tried]
    confirmed = [w for w in weights if w.divergence_when_removed >= LEAST_DIVERGENCE or w.place in together]
    perplexity, samples = removals.perplexity, removals.samples
    removals.discard()
    return SuperWeightReport(
        weights=tuple(confirmed),
        rejected=tuple(w for w in weights if w not in confirmed),
        joint_sets=tuple(sets),
        untried=len(candidates) - len(to_try),
        largest_spikes=tuple(largest),
        criteria=("spikes",) if factors is None else ("spikes", "gradients"),
        spike_ratio=SPIKE_RATIO,
        least_divergence=LEAST_DIVERGENCE,
        looks=looks,
        prompts=len(prompts),
        prompt_length=prompts.shape[1],
        perplexity=perplexity,
        **corpus.identity | {"samples": samples},
        model=streamable.name,
        revision=streamable.revision,
    )


def stream_trials(
    streamable: StreamableModel,
    projections: Sequence[DownProjection],
    prompts: np.ndarray,
    corpus: Corpus,
    control: PassControl,
    share: slice,
) -> list[Line]:
    """What `stream_super_weights` measures of some of its candidates by spikes, each for itself. share: of the
    candidates, the strongest first. All else is as it is there; the looks are this call's own."""
    candidates, _, _ = _Search(streamable, projections, control).look_until_no_spike(prompts)
    removals = Removals(streamable, corpus, control)
    _tried(_to_try(candidates)[share], removals)
    return removals.lines


def _to_try(candidates: list[Candidate]) -> list[Candidate]:
    """Puts the strongest first; returns those that are tried."""
    candidates.sort(key=lambda c: (-c.strength, c.place))
    return [candidate for candidate in candidates[:MOST_CANDIDATES] if candidate.may_cost]


class _Search:
    """The model, and the matrices that may hold a super weight."""

    def __init__(self, streamable: StreamableModel, projections: Sequence[DownProjection], control: PassControl):
        self._model, self._control = streamable, control
        self._projections = {projection.source: projection for projection in projections}

    def look_until_no_spike(self, prompts: np.ndarray) -> tuple[list[Candidate], list[LargestSpike], int]:
        """Candidates, the largest spike of every layer in the model as it is, and how often it was looked at, each
        time with all candidates at zero that had been found before. Later looks are at some of the prompts: what hides
        behind a candidate spikes where that did."""
        candidates_by_place: dict[Place, Candidate] = {}
        largest: list[LargestSpike] = []
        for n_looks in range(1, MOST_LOOKS + 1):
            removed = list(candidates_by_place.values())
            without = f"without {sorted(c.place for c in removed)}"
            weights = WithoutWeights(self._model.weights, _without(removed).weights if removed else ())
            peaks = Peaks()
            parameters = stream_past(
                peaks,
                replace(self._model, weights=weights, variant=f"{self._model.variant} {without}".lstrip()),
                prompts if n_looks == 1 else prompts[:: max(1, len(prompts) // _PROMPTS_AGAIN)],
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

    def with_expected_costs(self, spiking: Sequence[Candidate], factors: FisherFactors) -> list[Candidate]:
        """These with what their removal is expected to cost to second order, 1/2 rows[i] columns[j] w**2 of a weight w,
        which adds to their strength, and all other weights of which that is much."""
        by_place, others = {candidate.place: candidate for candidate in spiking}, list[Candidate]()
        for projection in self._projections.values():
            if projection.tensor not in factors.rows:
                continue
            for k, weights in enumerate(self._matrices(self._model.weights, projection)):
                matrix = projection.matrix + k
                rows, columns = factors.rows[projection.tensor][matrix], factors.columns[projection.tensor][matrix]
                costs = 0.5 * rows[:, None] * columns * np.square(weights, dtype=np.float64)
                here = [c.place for c in by_place.values() if c.place[1:3] == (projection.tensor, matrix)]
                for place in here:
                    by_place[place] = by_place[place].expected(float(costs[place.row, place.column]))
                for row, column in np.argwhere(costs >= LEAST_EXPECTED).tolist():
                    place = Place(projection.layer, projection.tensor, matrix, row, column)
                    if place not in by_place:
                        at, value = projection.stored_at(k, row, column, weights.shape), float(weights[row, column])
                        found = Candidate(place, projection.source, at, value, 0.0, "gradients")
                        others.append(found.expected(float(costs[row, column])))
        return [*by_place.values(), *others]

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


@dataclass(frozen=True)
class _Trial:
    """A candidate, what its removal does, and the weight as the report has it."""

    candidate: Candidate
    effect: Effect

    @property
    def weight(self) -> SuperWeight:
        c, effect = self.candidate, self.effect
        figures = c.row_ratio, c.column_ratio, c.share, c.found_by
        return SuperWeight(*c.place, c.value, effect.loss, effect.divergence, *figures)


def _is_clear(effect: Effect) -> bool:
    """Whether the divergence is beyond doubt on one side of what confirms a candidate."""
    return abs(effect.divergence - LEAST_DIVERGENCE) > _STANDARD_ERRORS * effect.error


def _without(candidates: Iterable[Candidate]) -> Removal:
    members = list(candidates)
    weights = sorted((candidate.source, *candidate.stored_at) for candidate in members)
    return Removal(min(candidate.place.layer for candidate in members), tuple(weights))


def _tried(candidates: Sequence[Candidate], removals: Removals) -> list[_Trial]:
    """The most costly first."""
    wanted = [(_without([candidate]), _is_clear) for candidate in candidates]
    effects = removals.stream_effects(wanted, "super weights: try candidates")
    trials = [_Trial(*pair) for pair in zip(candidates, effects, strict=True)]
    return sorted(trials, key=lambda trial: (-trial.effect.divergence, trial.candidate.place))


@dataclass
class _Group:
    """Trials that share something, the most costly first, and what it does to remove all of them."""

    why: str
    members: list[_Trial]
    effect: Effect = field(default_factory=Effect)

    @property
    def removal(self) -> Removal:
        return _without(trial.candidate for trial in self.members)

    def is_told(self, effect: Effect) -> bool:
        """Whether this effect of the removal of all tells whether they cost anything, or that they do not cost more
        than one alone."""
        return _is_clear(effect) or self._times_alone(effect) < 1

    @property
    def confirmed(self) -> bool:
        """Whether it costs anything, and more than its strongest member alone."""
        return self.effect.divergence >= LEAST_DIVERGENCE and self._times_alone(self.effect) > 1 + _ADDS_NOTHING

    def _times_alone(self, effect: Effect) -> float:
        """The divergence over that of the strongest member, on the parts of the text that both were measured on."""
        alone = self.members[0].effect
        n_parts = min(len(effect.parts), len(alone.parts))
        together, least = effect.over(n_parts).divergence, alone.over(n_parts).divergence
        return together / least if least > 0 else np.inf

    def joint_set(self, confirmed: bool) -> JointSet:
        places = tuple(sorted(trial.candidate.place for trial in self.members))
        return JointSet(places, self.why, self.effect.loss, self.effect.divergence, confirmed)


def _joint_sets(tried: Sequence[_Trial], removals: Removals) -> list[JointSet]:
    """Sets of weights that share a neuron (their column) or a residual channel (their row) of a matrix; the strongest
    of all when none costs anything alone; and all together, for the record. tried: the most costly first."""
    if len(tried) < 2:
        return []
    sharing: dict[tuple[str, str, int, int], list[_Trial]] = defaultdict(list)
    for trial in tried:
        place = trial.candidate.place
        sharing["neuron", place.tensor, place.matrix, place.column].append(trial)
        sharing["row", place.tensor, place.matrix, place.row].append(trial)
    groups = [_Group(key[0], members[:MOST_MEMBERS]) for key, members in sorted(sharing.items()) if len(members) > 1]
    if _costs_little(tried[0]):
        groups.append(_Group("candidates", list(tried[:MOST_MEMBERS])))
    every = _Group("all candidates", list(tried))
    wanted: list[tuple[Removal, Enough]] = [(group.removal, group.is_told) for group in groups]
    wanted.append((every.removal, partial(_has_parts, 1)))
    effects = removals.stream_effects(wanted, "super weights: try sets")
    for group, effect in zip([*groups, every], effects, strict=True):
        group.effect = effect
    confirmed = [group for group in groups if group.confirmed]
    _leave_out(confirmed, removals)
    return [*(group.joint_set(group in confirmed) for group in groups), every.joint_set(False)]


def _costs_little(trial: _Trial) -> bool:
    return trial.effect.divergence < LEAST_DIVERGENCE


def _leave_out(groups: Sequence[_Group], removals: Removals) -> None:
    """Members may do nothing alone and everything together. Of those that cost little alone, these are left out, the
    weakest first, without whose removal the model suffers as much."""
    waiting = [(group, [m for m in group.members if _costs_little(m)], group.effect.divergence) for group in groups]
    while waiting := [entry for entry in waiting if entry[1] and len(entry[0].members) > 2]:
        smaller = []
        for group, weak, _ in waiting:
            weakest = weak.pop()
            smaller.append(_Group(group.why, [member for member in group.members if member is not weakest]))
        wanted = [
            (rest.removal, partial(_has_parts, len(group.effect.parts)))
            for rest, (group, _, _) in zip(smaller, waiting, strict=True)
        ]
        effects = removals.stream_effects(wanted, "super weights: try smaller sets")
        for (group, _, whole), rest, effect in zip(waiting, smaller, effects, strict=True):
            if effect.divergence >= (1 - _ADDS_NOTHING) * whole:
                group.members, group.effect = rest.members, effect


def _has_parts(n_parts: int, effect: Effect) -> bool:
    return len(effect.parts) >= n_parts
