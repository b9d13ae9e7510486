"""Killed before any step that changes the disk and started again, a conversion ends as one that was never disturbed."""

import tempfile
from fnmatch import fnmatch

import pytest

from converter.scratch import scratch_directory
from tests.faults import scenarios
from tests.faults.disk import read_state, recorded, restore, sample
from tests.faults.scenarios import SCENARIOS, check_same, split_again


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_every_kind_of_step(name, undisturbed, models, root):
    """A plain conversion at every step, the others at every kind of step; those that take seconds at some."""
    whole = undisturbed(name)
    for point in sample(whole.points, SCENARIOS[name].points):
        restore(point.state, root)
        scenarios.run(SCENARIOS[name], models, root)
        try:
            check_same(root, whole.end)
        except AssertionError as error:
            raise AssertionError(f"killed before {point.kind}") from error


def test_split_is_killed_at_every_step(undisturbed, root):
    restore(undisturbed("plain").end, root)
    points = recorded(root, lambda: split_again(root))
    end = read_state(root)
    shards = [name for name in end if fnmatch(name, "m-0000?-of-0000?.gguf")]
    assert len(shards) > 1
    for point in sample(points, "every"):
        restore(point.state, root)
        split_again(root)
        check_same(root, end)


def test_what_a_killed_evaluation_has_left_goes_with_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    foreign = tmp_path / "bitwright-of-the-user"
    foreign.mkdir()
    with scratch_directory() as living:
        (left := tmp_path / ".bitwright-left").mkdir()
        (left / "hidden-0.bin").write_bytes(bytes(1000))
        with scratch_directory() as other:
            assert living.is_dir() and other != living and not left.exists()
    assert list(tmp_path.iterdir()) == [foreign]
