"""Killed before any step that changes the disk and started again, a conversion ends as one that was never disturbed."""

import pytest

from tests.faults import scenarios
from tests.faults.disk import restore, sample
from tests.faults.scenarios import SCENARIOS, check_same


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_every_kind_of_step(name, undisturbed, models, root):
    """A plain conversion at every step, the others at the first and last step of each kind and at some between."""
    whole = undisturbed(name)
    for point in sample(whole.points, SCENARIOS[name].n_more):
        restore(point.state, root)
        scenarios.run(SCENARIOS[name], models, root)
        try:
            check_same(root, whole.end)
        except AssertionError as error:
            raise AssertionError(f"killed before {point.kind}") from error
