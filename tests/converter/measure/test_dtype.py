"""In which dtype a job calibrates: measured once where nothing says it, then kept, and said."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from bitwright.calibration import fastest_dtype
from bitwright.calibration.fastest_dtype import INSTRUCTIONS
from bitwright.converter.cli import main
from bitwright.converter.measure import dtype

OPTIONS = ["--samples", "128", "--sequence-length", "16", "--no-chat"]


def run(*arguments: object) -> str:
    """Returns what it says."""
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.stderr
    return done.stderr


@pytest.fixture
def cpu(monkeypatch):
    """cpu(instructions, gain) pretends that the CPU reports these, and that products are so many times as fast with
    them; returns a list that has the gain as often as it is measured. Every model is large enough."""
    monkeypatch.setattr(dtype, "WORTH_MEASURING", 0)

    def pretend(instructions: str | None, gain: float | None = None) -> list[float | None]:
        measured: list[float | None] = []
        for module in (fastest_dtype, dtype):
            monkeypatch.setattr(module, "bfloat16_instructions", lambda: instructions)
        monkeypatch.setattr(fastest_dtype, "measured_gain", lambda: measured.append(gain) or gain)
        return measured

    return pretend


def imatrix(model: Path, output: Path, *options: str) -> tuple[str, bytes, str]:
    """What is said, the file, and the dtype that the work directory states."""
    said = run("imatrix", *OPTIONS, *options, "--output", output, model)
    described = json.loads((output.with_suffix(".bitwright") / "job.json").read_text())
    return said, output.read_bytes(), described["calibration_dtype"]


def test_a_faster_cpu_calibrates_in_bfloat16_and_a_resumed_job_stays_with_it(tiny, tmp_path, cpu):
    measured = cpu("amx-bf16", 2.5)
    said, by_default, stated = imatrix(tiny("llama"), tmp_path / "default.gguf")
    assert stated == "bfloat16" and measured == [2.5]
    assert "calibration in bfloat16: products in bfloat16 are 2.5 times as fast" in said and "amx-bf16" in said
    asked = imatrix(tiny("llama"), tmp_path / "asked.gguf", "--calibration-dtype", "bfloat16")
    assert asked[1:] == (by_default, "bfloat16")
    slower = cpu("amx-bf16", 0.9)
    (tmp_path / "default.bitwright" / "imatrix.gguf").unlink()
    said, again, stated = imatrix(tiny("llama"), tmp_path / "default.gguf")
    assert stated == "bfloat16" and again == by_default and slower == []
    assert "calibration in" not in said
    said, fresh, stated = imatrix(tiny("llama"), tmp_path / "default.gguf", "--fresh")
    assert stated == "float32" and fresh != by_default and slower == [0.9]


@pytest.mark.parametrize(
    ("instructions", "gain", "why"),
    [
        (None, None, "the CPU has no instructions for bfloat16"),
        ("avx512bf16", None, "the CPU reports avx512bf16, and does not carry it out"),
        ("avx512bf16", 1.1, "products in bfloat16 are 1.1 times as fast as in float32 here (avx512bf16)"),
    ],
)
def test_any_other_cpu_calibrates_in_float32(instructions, gain, why, tiny, tmp_path, cpu):
    measured = cpu(instructions, gain)
    said, by_default, stated = imatrix(tiny("llama"), tmp_path / "default.gguf")
    assert stated == "float32" and f"calibration in float32: {why}" in said
    assert measured == ([] if instructions is None else [gain])
    asked = imatrix(tiny("llama"), tmp_path / "asked.gguf", "--calibration-dtype", "float32")
    assert asked[1:] == (by_default, "float32") and "calibration in" not in asked[0]


def test_what_is_done_in_a_moment_is_not_worth_a_measurement(tiny, tmp_path, cpu, monkeypatch):
    monkeypatch.setattr(dtype, "WORTH_MEASURING", 5e12)
    measured = cpu("amx-bf16", 2.5)
    said, _, stated = imatrix(tiny("llama"), tmp_path / "default.gguf")
    assert stated == "float32" and measured == [] and "calibration in" not in said


def test_attention_that_is_not_torchs_stays_in_float32(tiny, tmp_path, cpu):
    measured = cpu("amx-bf16", 2.5)
    said, _, stated = imatrix(tiny("gpt_oss"), tmp_path / "default.gguf")
    assert stated == "float32" and measured == [] and "the model's own attention" in said


def test_report_and_recipe_state_it(tiny, tmp_path, cpu, cache_dir):
    cpu("avx512bf16", 2.0)
    options = [*OPTIONS, "--no-analysis", "--no-error-feedback", "--judge", "off", "--profile", "balanced-4bit"]
    run(*options, "--output", tmp_path / "a.gguf", tiny("llama"))
    report = json.loads((tmp_path / "a.bitwright" / "report.json").read_text())
    assert report["calibration"]["dtype"] == "bfloat16"
    assert "--calibration-dtype=bfloat16" in report["arguments"]
    cpu(None)  # what was measured of the source in another dtype is not taken
    said = run(*options, "--output", tmp_path / "b.gguf", tiny("llama"))
    assert "from the cache" not in said
    asked = ["--calibration-dtype", "bfloat16", "--output", tmp_path / "c.gguf", tiny("llama")]
    assert "importance: from the cache" in run(*options, *asked)
    assert (tmp_path / "c.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_conversions_of_one_source_decide_alike(tiny, tmp_path, cpu, cache_dir):
    """What the first has measured of it serves the second, whatever another measurement would say."""
    cpu("avx512bf16", 1.3)
    first = imatrix(tiny("llama"), tmp_path / "first.gguf")
    measured = cpu("avx512bf16", 1.1)
    said, again, stated = imatrix(tiny("llama"), tmp_path / "second.gguf")
    assert (again, stated) == first[1:] and stated == "bfloat16" and measured == []
    assert "importance: from the cache" in said


def test_the_measurement_is_a_real_one():
    gain = fastest_dtype.measured_gain()
    assert gain is not None and 0.01 < gain < 100
    assert fastest_dtype.bfloat16_instructions() in (None, *INSTRUCTIONS)


def test_a_process_that_the_instructions_end_is_an_answer(monkeypatch):
    def start(module: str) -> "subprocess.Popen[bytes]":
        kill = f"import os; os.kill(os.getpid(), {int(signal.SIGILL)})"
        return subprocess.Popen([sys.executable, "-c", kill], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    monkeypatch.setattr(fastest_dtype, "start_child", start)
    assert fastest_dtype.measured_gain() is None
