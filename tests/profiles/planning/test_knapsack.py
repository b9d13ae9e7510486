"""The knapsack's choice is the best one: against all choices, and against dynamic programming over whole weights."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.profiles.planning.knapsack import choose, frontier, hull

option = st.tuples(st.integers(0, 12), st.integers(0, 30))
group = st.lists(option, min_size=1, max_size=5)


def arrays(groups) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return tuple([np.array([o[i] for o in options], np.float64) for options in groups] for i in (0, 1))


def least_cost(weights, costs, capacity: float) -> float:
    """By dynamic programming over whole weights; infinite when nothing fits."""
    best = np.full(int(capacity) + 1, np.inf)
    best[0] = 0.0
    for w, c in zip(weights, costs, strict=True):
        with_group = np.full_like(best, np.inf)
        for weight, cost in zip(w.astype(int), c, strict=True):
            if weight <= capacity:
                shifted = best[: len(best) - weight] + cost
                with_group[weight:] = np.minimum(with_group[weight:], shifted)
        best = with_group
    return float(best.min())


@settings(max_examples=200, deadline=None)
@given(st.lists(group, min_size=1, max_size=5), st.integers(0, 50))
def test_equals_trying_everything(groups, capacity):
    weights, costs = arrays(groups)
    tried = [
        sum(c[i] for c, i in zip(costs, choices, strict=True))
        for choices in product(*(range(len(options)) for options in groups))
        if sum(w[i] for w, i in zip(weights, choices, strict=True)) <= capacity
    ]
    found = choose(weights, costs, capacity)
    assert (found is None) == (not tried)
    if found is not None:
        assert found.exact
        assert found.cost == min(tried) == sum(c[i] for c, i in zip(costs, found.choices, strict=True))
        assert found.weight == sum(w[i] for w, i in zip(weights, found.choices, strict=True)) <= capacity
        assert found.bound <= found.cost


@pytest.mark.parametrize("seed", range(30))
def test_equals_dynamic_programming(seed):
    random = np.random.default_rng(seed)
    weights = [random.integers(0, 60, random.integers(1, 12)).astype(float) for _ in range(random.integers(5, 50))]
    # Costs that fall with the weight as losses do, that know nothing of it, and that all but equal it.
    costs = [
        [
            np.exp(-w / 20) * random.lognormal(0, 1) * random.lognormal(0, 0.1, len(w)),
            random.random(len(w)),
            60 - w + random.integers(0, 3, len(w)),
        ][seed % 3]
        for w in weights
    ]
    low, high = (sum(pick(w) for w in weights) for pick in (np.min, np.max))
    capacity = float(np.floor(random.uniform(low, high)))
    found = choose(weights, costs, capacity)
    assert found is not None and found.exact
    assert found.cost == pytest.approx(least_cost(weights, costs, capacity), rel=1e-12)
    assert found.bound <= found.cost * (1 + 1e-12)


def model_sized(n_groups: int = 1000, n_options: int = 25, seed: int = 0):
    """Weights and costs as a model has them: a few sizes of tensors, losses that fall by a quarter a bit."""
    random = np.random.default_rng(seed)
    bits = np.sort(random.uniform(1.5, 9, n_options))
    sizes = random.choice([4096 * 4096, 4096 * 1024, 4096 * 14336], n_groups)
    weights = [np.round(size * bits / 8) for size in sizes]
    costs = [random.lognormal(0, 1.5) * 4.0**-bits * random.lognormal(0, 0.15, n_options) for _ in sizes]
    return weights, costs


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_thousand_tensors_in_25_formats_are_solved_to_the_end(share):
    weights, costs = model_sized()
    low, high = (sum(pick(w) for w in weights) for pick in (np.min, np.max))
    found = choose(weights, costs, low + share * (high - low))
    assert found is not None and found.exact
    assert 0 <= found.cost - found.bound < 1e-4 * found.cost


def test_a_list_of_states_that_overflows_is_admitted(monkeypatch):
    weights, costs = model_sized(60)
    monkeypatch.setattr("bitwright.profiles.planning.knapsack._MOST_STATES", 2)
    capacity = 0.4 * sum(w.max() for w in weights)
    cut = choose(weights, costs, capacity)
    monkeypatch.undo()
    whole = choose(weights, costs, capacity)
    assert cut is not None and whole is not None and whole.exact and not cut.exact
    assert whole.bound == cut.bound <= whole.cost <= cut.cost <= whole.cost * 1.01
    assert cut.weight <= capacity


def test_the_same_problem_has_the_same_answer():
    weights, costs = model_sized(200)
    capacity = 0.3 * sum(w.max() for w in weights)
    assert choose(weights, costs, capacity) == choose(weights, costs, capacity)


def test_a_hull_has_falling_slopes_and_nothing_below_it():
    random = np.random.default_rng(1)
    for _ in range(50):
        weights, costs = random.integers(0, 20, (2, 15)).astype(float)
        points = hull(weights, costs)
        slopes = np.diff(costs[points]) / np.diff(weights[points])
        assert (np.diff(weights[points]) > 0).all() and (np.diff(slopes) > 0).all() and (slopes < 0).all()
        inside = weights <= weights[points[-1]]
        assert (np.interp(weights[inside], weights[points], costs[points]) <= costs[inside] + 1e-9).all()
        assert costs[points[-1]] == costs.min() and weights[points[0]] == weights.min()


def test_the_frontier_is_reached_by_choices():
    weights, costs = model_sized(20, 6)
    for weight, cost in frontier(weights, costs)[::7]:
        found = choose(weights, costs, weight * (1 + 1e-12))
        assert found is not None and found.cost == pytest.approx(cost, rel=1e-9)
