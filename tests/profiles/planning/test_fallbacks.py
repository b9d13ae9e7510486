"""Fallbacks name what exists, end, and never lead back to what was wanted."""

import pytest

from bitwright.formats.schemes.registry import SCHEMES
from bitwright.profiles.planning import fallbacks
from bitwright.profiles.planning.precision import LIMITS


@pytest.mark.parametrize("chain_of", [fallbacks.schemes_by_shape, fallbacks.schemes_by_inputs])
def test_chains_are_of_schemes_and_have_none_twice(chain_of):
    chains = [chain_of(name) for name in SCHEMES]
    assert [chain[0] for chain in chains] == list(SCHEMES)
    assert all(set(chain) <= SCHEMES.keys() and len(set(chain)) == len(chain) for chain in chains)
    assert max(map(len, chains)) > 1


def test_tables_speak_of_schemes():
    assert fallbacks._OF_SHAPES.keys() | fallbacks._OF_EXPERTS.keys() | fallbacks._OF_INPUTS.keys() <= SCHEMES.keys()


def test_what_rounds_inputs_falls_back_to_what_has_a_limit_too():
    assert all(set(fallbacks.schemes_by_inputs(name)) <= LIMITS.keys() for name in LIMITS)


def test_experts_keep_the_scheme_that_takes_the_place_of_another():
    replaced = {name: fallbacks.scheme_of_experts(name) for name in SCHEMES}
    assert set(replaced.values()) <= SCHEMES.keys() and replaced["W8A8_STATIC"] == "W8A8"
    assert all(fallbacks.scheme_of_experts(other) == other for other in replaced.values())
