"""Killed before any step that changes the disk and started again, a conversion ends as one that was never disturbed."""

import shutil
import tempfile
from fnmatch import fnmatch

import pytest

from bitwright.converter.job.scratch import scratch_directory
from tests.faults import scenarios
from tests.faults.disk import read_state, recorded, restore, sample
from tests.faults.scenarios import SCENARIOS, check_same, split_again


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_every_kind_of_step(name, undisturbed, models, root):
    """A plain conversion at every step, of many equal ones in a row at three; the others at every kind of step; those
    that take seconds at some."""
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
    foreign = [".bitwright-notes", ".bitwright-work", ".bitwright-scratch-notes", ".bitwright-scratch-my_notes"]
    for name in foreign:
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").touch()
    with scratch_directory() as living:
        left, unmarked = tmp_path / ".bitwright-scratch-left_123", tmp_path / ".bitwright-scratch-left_456"
        shutil.copytree(living, left)
        (left / "hidden-0.bin").write_bytes(bytes(1000))
        unmarked.mkdir()
        with scratch_directory() as other:
            assert living.is_dir() and other != living and not left.exists() and not unmarked.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(foreign)
    assert all((tmp_path / name / "precious").exists() for name in foreign)
