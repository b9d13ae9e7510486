"""Killed at any moment and started again, a conversion ends with the bytes of one that was never interrupted."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from converter.write import partial_path
from formats.errors import ConvertError

N_KILLS = 20
PROFILE = "mlp-low-precision"

# Children are forked from a server that has imported everything and started nothing: a kill hits work, not imports.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    ["calibration.stream", "calibration.quality", "converter.pipeline", "tests.tiny_models"]
)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Calibration text for 128 samples of 16 tokens, of nothing but printable characters."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    characters = random.Random(1)
    path.write_text("".join(characters.choice("abc defghij klmnop 0123456789.\n") for _ in range(8000)))
    return path


def convert(model: Path, text: Path, directory: Path, threads: int = 2) -> None:
    """One conversion into the directory, through the Python interface."""
    import converter

    converter.convert(
        str(model),
        profile=PROFILE,
        output=directory / "model.gguf",
        calibration=str(text),
        samples=128,
        sequence_length=16,
        threads=threads,
        quiet=True,
    )


def run(*arguments) -> float:
    """convert(*arguments) in a process of its own; returns the seconds it took."""
    start = time.monotonic()
    process = _PROCESSES.Process(target=convert, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - start


def kill_after(seconds: float, *arguments) -> bool:
    """Start convert(*arguments) and kill it; False when it was done before."""
    process = _PROCESSES.Process(target=convert, args=arguments)
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.fixture(scope="module")
def uninterrupted(tiny, text, tmp_path_factory) -> tuple[bytes, float]:
    """The artifact's bytes, and the seconds that the conversion takes."""
    model = tiny("llama-256")
    run(model, text, tmp_path_factory.mktemp("warm-up"))
    directory = tmp_path_factory.mktemp("uninterrupted")
    seconds = run(model, text, directory)
    return (directory / "model.gguf").read_bytes(), seconds


def test_killed_at_random_moments(tiny, text, tmp_path, uninterrupted):
    expected, seconds = uninterrupted
    moments = random.Random(0)
    killed = 0
    while killed < N_KILLS:
        directory = tmp_path / str(killed)
        # One to three kills in a row, spread over the whole run, then to the end.
        for _ in range(moments.randint(1, 3)):
            killed += kill_after(moments.uniform(0, seconds), tiny("llama-256"), text, directory)
            assert not (directory / "model.gguf").exists() or (directory / "model.gguf").read_bytes() == expected
        run(tiny("llama-256"), text, directory)
        assert (directory / "model.gguf").read_bytes() == expected
        assert not partial_path(directory / "model.gguf").exists()


@pytest.mark.parametrize("threads", [1, 8])
def test_the_number_of_threads_changes_no_byte(tiny, text, tmp_path, uninterrupted, threads):
    run(tiny("llama-256"), text, tmp_path, threads)
    assert (tmp_path / "model.gguf").read_bytes() == uninterrupted[0]


def test_a_damaged_partial_file_is_not_trusted(tiny, text, tmp_path, uninterrupted):
    """The journal says finished, the disk lost the data: the tensors are encoded again."""
    expected, seconds = uninterrupted
    partial = partial_path(tmp_path / "model.gguf")
    for fraction in range(20):
        kill_after(seconds * (0.5 + fraction / 40), tiny("llama-256"), text, tmp_path)
        if partial.exists() and partial.stat().st_size > len(expected) // 4:
            break
    if partial.exists():
        with partial.open("r+b") as file:
            file.seek(-len(expected) // 8, os.SEEK_END)
            file.write(b"\xff" * 64)
    run(tiny("llama-256"), text, tmp_path)
    assert (tmp_path / "model.gguf").read_bytes() == expected


def test_a_finished_job_says_so_and_a_changed_artifact_is_noticed(tiny, text, tmp_path, capsys):
    import converter

    options = {
        "model": str(tiny("llama")),
        "profile": "uniform-8bit",
        "output": tmp_path / "model.gguf",
        "quality": False,
    }
    first = converter.convert(**options)
    assert first["quality"] is None
    assert converter.convert(**options) == first
    measured = converter.convert(**{**options, "quality": True}, calibration=None)
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
