"""Which part a process does, by its option or by a scheduler; and the exit codes that a scheduler reads."""

import pytest

from bitwright.converter.job.work_directory import WorkDirectory
from bitwright.converter.machines.part import Part, part_of
from bitwright.formats.errors import ConvertError, TryAgain
from tests.converter.commands import convert


def array(index: int, count: int, first: int, last: int) -> dict[str, str]:
    """What Slurm tells a task of an array."""
    values = {"ID": index, "COUNT": count, "MIN": first, "MAX": last}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("text", "environment", "part"),
    [
        ("3/16", {}, Part(3, 16)),
        ("3/16", array(7, 8, 0, 7), Part(3, 16)),
        (None, array(3, 16, 1, 16), Part(3, 16)),
        (None, array(3, 16, 0, 15), Part(4, 16)),
        (None, {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"}, Part(3, 16)),
        ("/16", array(3, 16, 0, 15), Part(4, 16)),
        ("/16", array(3, 2, 3, 7), Part(3, 16)),
        ("/16", array(3, 1, 3, 3), Part(3, 16)),
        ("/16", {"JOB_COMPLETION_INDEX": "0"}, Part(1, 16)),
        ("/16", {"JOB_COMPLETION_INDEX": "15"}, Part(16, 16)),
    ],
)
def test_the_part_of_a_process(text, environment, part):
    assert part_of(text, environment) == part


@pytest.mark.parametrize(
    ("text", "environment", "message"),
    [
        (None, {}, "nothing tells"),
        ("/16", {}, "nothing tells"),
        ("3", {}, "is no part"),
        ("3/16/2", {}, "is no part"),
        ("0/16", {}, "no part 0 of 16"),
        ("17/16", {}, "no part 17 of 16"),
        (None, {"JOB_COMPLETION_INDEX": "3"}, "does not tell how many"),
        ("/16", {"JOB_COMPLETION_INDEX": "16"}, "no part 17 of 16"),
        ("/16", {"JOB_COMPLETION_INDEX": "x"}, "no number"),
        (None, array(3, 2, 3, 7), "names some of its tasks"),
        (None, array(1, 2, 1, 7), "names some of its tasks"),
        (None, array(3, 1, 3, 3), "names some of its tasks"),
        (None, {"SLURM_ARRAY_TASK_ID": "3"}, "no number"),
    ],
)
def test_what_tells_no_part_is_refused(text, environment, message):
    with pytest.raises(ConvertError, match=message):
        part_of(text, environment)


def test_exit_codes_tell_what_to_run_again(tiny, tmp_path, monkeypatch):
    arguments = ["plan", "-p", "uniform-8bit", "--judge", "off", "-q", "--save", tmp_path / "plan.json", tiny("llama")]
    assert convert(*arguments).exit_code == 0
    part = ["encode", "--plan", tmp_path / "plan.json", "-q"]
    for name, value in array(2, 3, 1, 3).items():
        monkeypatch.setenv(name, value)
    done = convert(*part)
    assert done.exit_code == 0 and done.stdout.strip() == str(tmp_path / "plan.parts" / "2-of-3.json")
    with WorkDirectory(tmp_path / "plan.parts" / "1-of-3.json.bitwright-work").locked():
        assert convert(*part, "--part", "1/3").exit_code == TryAgain.exit_code == 75
    assert convert(*part, "--part", "4/3").exit_code == ConvertError.exit_code == 1
    assert convert("encode", "--nonsense").exit_code == 2
