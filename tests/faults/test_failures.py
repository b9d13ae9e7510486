"""A disk that fails at any kind of step is an error that says so; the same call then continues to the same bytes."""

import pytest

from bitwright.formats.errors import ConvertError
from tests.faults import scenarios
from tests.faults.disk import Kind, failing
from tests.faults.scenarios import SCENARIOS, begin, check_same


@pytest.mark.parametrize("name", ["plain", "in shards", "feedback", "smoothed directory"])
def test_a_disk_that_fails(name, undisturbed, models, root):
    """One call after the other fails, each at a kind of step that has not failed yet, until there is none."""
    whole = undisturbed(name)
    begin(root)
    failed: set[Kind] = set()
    while True:
        n_failed = len(failed)
        try:
            with failing(root, failed):
                scenarios.run(SCENARIOS[name], models, root)
        except ConvertError as error:
            assert "Input/output error" in error.what or "No space left on device" in error.what
            assert error.where and error.remedy
            assert len(failed) == n_failed + 1
        else:
            assert len(failed) == n_failed
            break
    assert failed >= {point.kind for point in whole.points}
    check_same(root, whole.end)
