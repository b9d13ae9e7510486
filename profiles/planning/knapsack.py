"""One choice from every group, least total cost, total weight within a capacity: the multiple-choice knapsack problem.

First its Lagrangian relaxation: with a price on weight every group chooses for itself, and on the lower convex hulls of
the groups one sort finds the price at which the choices just fit (Sinha and Zoltners, 1979). That bounds what any
choice can reach, and gives a choice that leaves some capacity over. An exact search then closes the gap: groups enter a
core in the order in which another choice costs least (Pisinger, 1995), the core's undominated partial choices are kept
in a list, and those that the bound excludes are dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Partial choices kept at a time. When there are more, those with the worst bound go, and `exact` is no longer true.
_MOST_STATES = 20_000
# Below this share of the problem's own magnitude a difference of costs is rounding.
_ROUNDING = 1e-13


@dataclass(frozen=True)
class Choice:
    """choices: index of each group's option. bound: no choice within the capacity costs less (the value of the
    Lagrangian dual). exact: that none costs less than this one was proven."""

    choices: tuple[int, ...]
    weight: float
    cost: float
    bound: float
    exact: bool


def hull(weights: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Indices of the lower left convex hull of a group, by rising weight and falling cost, each slope less steep than
    the one before."""
    points: list[int] = []
    for i in np.lexsort((costs, weights)).tolist():
        if points and costs[i] >= costs[points[-1]]:
            continue
        while len(points) > 1:
            a, b = points[-2:]
            if (costs[a] - costs[b]) * (weights[i] - weights[b]) > (costs[b] - costs[i]) * (weights[b] - weights[a]):
                break
            points.pop()
        points.append(i)
    return np.array(points)


@dataclass(frozen=True)
class _Steps:
    """Every step from one point of a hull to the next, over all groups, the most cost saved per weight first."""

    group: np.ndarray
    option: np.ndarray
    weight: np.ndarray
    saving: np.ndarray

    @property
    def slope(self) -> np.ndarray:
        return np.asarray(self.saving / self.weight)


def _steps(weights: Sequence[np.ndarray], costs: Sequence[np.ndarray]) -> tuple[list[int], _Steps]:
    """The lightest option of every group, and the steps up from there."""
    lightest, parts = [], []
    for group, (w, c) in enumerate(zip(weights, costs, strict=True)):
        points = hull(w, c)
        lightest.append(int(points[0]))
        parts.append(np.stack([np.full(len(points) - 1, group), points[1:], np.diff(w[points]), -np.diff(c[points])]))
    group, option, weight, saving = np.concatenate(parts, axis=1)
    order = np.argsort(-(saving / weight), kind="stable")
    return lightest, _Steps(group[order].astype(int), option[order].astype(int), weight[order], saving[order])


def frontier(weights: Sequence[np.ndarray], costs: Sequence[np.ndarray]) -> np.ndarray:
    """float64 [n, 2]: weight and cost of the best choices for their weight, from the lightest to the cheapest."""
    lightest, steps = _steps(weights, costs)
    start = sum(float(w[i]) for w, i in zip(weights, lightest, strict=True))
    end = sum(float(c.min()) for c in costs)  # summed from here, small costs keep their digits
    points = [start + np.cumsum([0, *steps.weight]), end + np.cumsum([0, *steps.saving[::-1]])[::-1]]
    return np.stack(points, axis=1)


def choose(weights: Sequence[np.ndarray], costs: Sequence[np.ndarray], capacity: float) -> Choice | None:
    """The option of every group that costs least in total, with a total weight of at most capacity; None when even the
    lightest options weigh more.

    weights, costs: for each group float64 [n_options], finite, weights non-negative. Whole numbers up to 2**53 are
    added exactly.
    """
    lightest, steps = _steps(weights, costs)
    slack = capacity - sum(float(w[i]) for w, i in zip(weights, lightest, strict=True))
    if slack < 0:
        return None
    taken = int(np.searchsorted(np.cumsum(steps.weight), slack, side="right"))
    price = float(steps.slope[taken]) if taken < len(steps.weight) else 0.0
    base = list(lightest)
    for group, option in zip(steps.group[:taken].tolist(), steps.option[:taken].tolist(), strict=True):
        base[group] = option
    choices, exact = _Search(weights, costs, base, price, slack - float(steps.weight[:taken].sum())).run()
    relaxed = [float((c + price * w).min()) for w, c in zip(weights, costs, strict=True)]
    weight, cost = (sum(float(v[i]) for v, i in zip(of, choices, strict=True)) for of in (weights, costs))
    return Choice(tuple(choices), weight, cost, min(cost, sum(relaxed) - price * capacity), exact)


@dataclass(frozen=True)
class _Entry:
    """What a group brings to the core: its options that may matter, the relaxed choice first."""

    group: int
    options: np.ndarray
    extra: np.ndarray
    regret: np.ndarray

    def per_weight(self, sign: int) -> float:
        """The least regret for a unit of weight more (sign 1) or less (sign -1); infinite where no option is so."""
        of_sign = np.sign(self.extra) == sign
        return float((self.regret[of_sign] / np.abs(self.extra[of_sign])).min(initial=np.inf))


class _Search:
    """From the relaxed choice to the best one.

    With the price, another option of a group has a regret: what the group pays more, weight included. A choice costs
    what the relaxation promises, plus its regrets, plus the price of the capacity that it leaves over. This sum, the
    gap, is what the search minimises; an option of a regret above the least gap known cannot matter.
    """

    def __init__(
        self, weights: Sequence[np.ndarray], costs: Sequence[np.ndarray], base: list[int], price: float, slack: float
    ):
        self.base, self.price, self.slack = base, price, slack
        self.extra = [w - w[b] for w, b in zip(weights, base, strict=True)]
        self.regret = [
            np.maximum((c - c[b]) + price * extra, 0.0) for c, b, extra in zip(costs, base, self.extra, strict=True)
        ]
        self.rounding = _ROUNDING * sum(float(np.abs(c).max()) for c in costs)

    def run(self) -> tuple[list[int], bool]:
        choices, gap = self._fill()
        if gap <= self.rounding:
            return choices, True
        entries = [entry for g in range(len(self.base)) if (entry := self._entry(g, gap)) is not None]
        entries.sort(key=lambda entry: min(entry.per_weight(1), entry.per_weight(-1)))
        found, exact = self._grow_core(entries, gap)
        return choices if found is None else found, exact

    def _fill(self) -> tuple[list[int], float]:
        """The relaxed choice, with the options taken that lower the gap most as long as there is one; and its gap."""
        choices, slack = list(self.base), self.slack
        while True:
            most, best = self.rounding, (-1, -1)
            for g, (extra, regret) in enumerate(zip(self.extra, self.regret, strict=True)):
                more = extra - extra[choices[g]]
                gain = np.where(more <= slack, self.price * more - (regret - regret[choices[g]]), 0.0)
                if gain.max() > most:
                    most, best = float(gain.max()), (g, int(gain.argmax()))
            g, option = best
            if g < 0:
                regrets = sum(float(r[i]) for r, i in zip(self.regret, choices, strict=True))
                return choices, regrets + self.price * slack
            slack -= float(self.extra[g][option] - self.extra[g][choices[g]])
            choices[g] = option

    def _entry(self, group: int, gap: float) -> _Entry | None:
        extra, regret = self.extra[group], self.regret[group]
        useful = np.flatnonzero((regret < gap) & (extra != 0))
        if not len(useful):
            return None
        options = np.array([self.base[group], *useful])
        return _Entry(group, options, extra[options], regret[options])

    def _grow_core(self, entries: list[_Entry], gap: float) -> tuple[list[int] | None, bool]:
        """The choice of the least gap below the one given, None when there is none; and whether that is proven."""
        extra, regret = np.zeros(1), np.zeros(1)
        trail: list[tuple[_Entry, np.ndarray]] = []
        best: tuple[int, int] | None = None
        dropped = np.inf
        # The least regrets per weight that the groups still to enter have, up and down.
        up, down = (np.minimum.accumulate([np.inf, *(e.per_weight(s) for e in entries[::-1])])[::-1] for s in (1, -1))
        for step, entry in enumerate(entries, start=1):
            extra, regret, came_from = _undominated(extra, regret, entry, self.price)
            slack = self.slack - extra
            gaps = np.where(slack >= 0, regret + self.price * slack, np.inf)
            filled = slack * min(self.price, up[step])
            emptied = -slack * down[step] if np.isfinite(down[step]) else np.full(len(slack), np.inf)
            bounds = regret + np.where(slack >= 0, filled, emptied)
            if gaps.min() < gap - self.rounding:
                gap, best = float(gaps.min()), (step, int(gaps.argmin()))
            kept = np.flatnonzero(bounds < gap - self.rounding)
            if len(kept) > _MOST_STATES:
                kept = kept[np.argsort(bounds[kept], kind="stable")]
                dropped = min(dropped, float(bounds[kept[_MOST_STATES]]))
                kept = np.sort(kept[:_MOST_STATES])
            if best is not None and best[0] == step:  # the best one stays, to be traced back from
                best = (step, len(kept))
                kept = np.append(kept, int(gaps.argmin()))
            trail.append((entry, came_from[kept]))
            extra, regret = extra[kept], regret[kept]
            if not len(kept):
                break
        exact = dropped >= gap - self.rounding
        return (None if best is None else self._traced(trail, *best)), exact

    def _traced(self, trail: list[tuple[_Entry, np.ndarray]], step: int, state: int) -> list[int]:
        choices = list(self.base)
        for entry, came_from in trail[:step][::-1]:
            state, option = divmod(int(came_from[state]), len(entry.options))
            choices[entry.group] = int(entry.options[option])
        return choices


def _undominated(
    extra: np.ndarray, regret: np.ndarray, entry: _Entry, price: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every state with every option of the group, but those that another one beats in weight and in cost: weight and
    regret, and state * n_options + option that each came from."""
    all_extra = (extra[:, None] + entry.extra).ravel()
    all_regret = (regret[:, None] + entry.regret).ravel()
    cost = all_regret - price * all_extra
    order = np.lexsort((cost, all_extra))
    sorted_cost = cost[order]
    least_before = np.minimum.accumulate(np.concatenate([[np.inf], sorted_cost[:-1]]))
    kept = order[sorted_cost < least_before]
    return all_extra[kept], all_regret[kept], kept
