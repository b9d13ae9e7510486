"""A process that is really killed, at named points, and what a job knows of itself afterwards."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from bitwright.converter.artifact.layout import partial_path
from bitwright.converter.artifact.writer import JOURNAL
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import Step, observed
from bitwright.formats.files.journal import read_lines
from tests.faults import scenarios
from tests.faults.disk import State, read_state
from tests.faults.scenarios import SCENARIOS, WORK, begin, check_same

# Children are forked from a server that has imported everything and started nothing.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    ["bitwright.calibration.stream.forward", "bitwright.converter.pipeline", "tests.faults.scenarios"]
)

# (step, end of the path, how many of these are taken): the process is killed before the step that follows them.
AFTER_THREE_JOURNAL_LINES = ("sync", JOURNAL, 3)
BETWEEN_WRITE_AND_SYNC = ("write", ".partial", 9)
AFTER_A_RENAME = ("rename", "m.gguf", 1)
AFTER_A_RENAME_OF_A_DIRECTORY = ("rename", "/m", 1)


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory) -> dict[str, Path]:
    return scenarios.build_models(tiny, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("resume") / "root"


@pytest.fixture(scope="module")
def undisturbed(models, root):
    known: dict[str, State] = {}

    def of(name: str) -> State:
        if name not in known:
            begin(root)
            scenarios.run(SCENARIOS[name], models, root)
            known[name] = read_state(root)
        return known[name]

    return of


def run_until(point: tuple[Step, str, int], *arguments) -> None:
    """In a process of its own: run the scenario, and be killed."""
    step, end, left = point

    def observe(taken: Step, path: Path) -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= taken == step and str(path).endswith(end)

    with observed(observe):
        scenarios.run(*arguments)


def killed(point: tuple[Step, str, int], *arguments) -> None:
    process = _PROCESSES.Process(target=run_until, args=(point, *arguments))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("name", ["plain", "refined budget", "feedback", "protection", "smoothed directory"])
@pytest.mark.parametrize("point", [AFTER_THREE_JOURNAL_LINES, BETWEEN_WRITE_AND_SYNC, AFTER_A_RENAME])
def test_killed_at_a_named_point(name, point, models, root, undisturbed):
    if SCENARIOS[name].output == "m" and point == AFTER_A_RENAME:
        point = AFTER_A_RENAME_OF_A_DIRECTORY
    expected = undisturbed(name)
    begin(root)
    killed(point, SCENARIOS[name], models, root)
    assert not (root / WORK / "report.json").exists()
    scenarios.run(SCENARIOS[name], models, root)
    check_same(root, expected)


@pytest.mark.parametrize("threads", [2, 8])
def test_the_number_of_threads_changes_no_byte(models, root, undisturbed, threads):
    expected = undisturbed("plain")
    begin(root)
    scenarios.run(SCENARIOS["plain"], models, root, threads=threads)
    check_same(root, expected)


def test_a_damaged_partial_file_is_not_trusted(models, root, undisturbed):
    """The journal says finished, the disk lost the data: the tensors are encoded again."""
    expected = undisturbed("plain")
    begin(root)
    killed(AFTER_THREE_JOURNAL_LINES, SCENARIOS["plain"], models, root)
    partial = partial_path(root / "m.gguf")
    assert len(list(read_lines(root / WORK / JOURNAL))) == 3
    content = partial.read_bytes()
    partial.write_bytes(content[:-4000] + b"\xff" * 64 + content[-3936:])
    scenarios.run(SCENARIOS["plain"], models, root)
    check_same(root, expected)


def test_a_finished_job_says_so_and_a_changed_artifact_is_noticed(tiny, tmp_path, capsys):
    from bitwright import converter

    options = {
        "model": str(tiny("llama")),
        "profile": "uniform-8bit",
        "output": tmp_path / "model.gguf",
        "judge": "off",
    }
    first = converter.convert(**options)
    assert first["quality"] is None
    assert converter.convert(**options) == first
    measured = converter.convert(**{**options, "judge": "full"}, calibration=None)
    assert measured["quality"]["mean_kld"] >= 0 and measured["artifact"] == first["artifact"]
    assert "already done" in capsys.readouterr().err
    with (tmp_path / "model.gguf").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    with pytest.raises(ConvertError, match="removed or changed"):
        converter.convert(**options)
    assert (
        converter.convert(**options, fresh=True)["artifact"]["files"][0]["sha256"]
        == first["artifact"]["files"][0]["sha256"]
    )
