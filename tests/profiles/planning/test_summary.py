"""The groups of a plan hold every tensor once, and their figures add up."""

from collections import Counter

import pytest

from bitwright.profiles.planning.assign import assign
from bitwright.profiles.planning.summary import _GROUPS, fallback_lines, tensor_groups
from bitwright.profiles.reading.schema import load_profile
from bitwright.profiles.vocabulary import Role
from tests.profiles.models import KINDS, model_map


def test_every_role_is_in_one_group():
    assert Counter(role for roles in _GROUPS.values() for role in roles) == Counter(Role)


@pytest.mark.parametrize("kind", list(KINDS))
def test_figures_add_up_to_the_plans(kind):
    plan = assign(load_profile("balanced-4bit").by_rules(), model_map(kind))
    groups = tensor_groups(plan)
    assert sum(group.tensors for group in groups) == len(plan.tensors)
    assert sum(group.bytes for group in groups) == plan.n_bytes
    assert sum(group.weights for group in groups) == plan.n_weights
    assert sum(group.share for group in groups) == pytest.approx(1)
    assert [group.group for group in groups if group.group == "experts"] == ["experts"] * ("experts" in kind)
    for group in groups:
        assert sum(group.formats.values()) == group.tensors
        assert group.bits_per_weight == group.bytes * 8 / group.weights


def test_a_kind_of_fallback_is_one_line():
    plan = assign(load_profile("balanced-4bit").by_rules(), model_map(width=96))
    wanted = {(row.wanted, row.format, row.tensor.n_columns) for row in plan.tensors if row.wanted is not None}
    assert len(fallback_lines(plan)) == len(wanted) > 0
    assert fallback_lines(assign(load_profile("balanced-4bit").by_rules(), model_map())) == []
