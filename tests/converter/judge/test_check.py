"""`bitwright check`: what it says of a directory that no engine loads. docs/walks/operator.md has one that does."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.converter.commands import convert, refused

PLAIN = ["--samples", "128", "--sequence-length", "16", "--calibration", "embedded", "--judge", "off"]


@pytest.fixture(scope="module")
def directory(tiny, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("check") / "fp8"
    done = convert("--profile", "fp8", *PLAIN, "--no-error-feedback", "--output", output, tiny("llama-256"))
    assert done.exit_code == 0, done.stderr
    return output


def test_a_runtime_that_is_not_there_is_named_with_what_installs_it(directory):
    said = refused("check", directory, "--runtime", "vllm")
    assert "vLLM is not installed there: the Python has no module 'vllm'" in said and sys.executable in said
    assert "pip install vllm" in said and "--python" in said
    assert "that is no Python" in refused("check", directory, "--runtime", "vllm", "--python", directory / "nothing")


def test_a_python_that_ends_without_an_answer(directory, tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'GLIBC is too old' >&2\nexit 3\n")
    os.chmod(program, 0o755)
    said = refused("check", directory, "--runtime", "vllm", "--python", program)
    assert "vLLM does not run it: GLIBC is too old" in said


def test_what_does_not_load_says_what_the_runtime_says(directory, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(directory, damaged)
    config = json.loads((damaged / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = "eight"
    (damaged / "config.json").write_text(json.dumps(config))
    said = refused("check", damaged, "--runtime", "transformers")
    assert "transformers does not run it: " in said and "num_bits" in said and str(damaged) in said


@pytest.mark.parametrize(
    ("answer", "message"), [("NaN", "predicts what is no number"), ("", "writes nothing"), ("-0.5", None)]
)
def test_what_an_engine_writes_has_to_be_something(directory, tmp_path, answer, message):
    program = tmp_path / "python"
    line = f'{{"runtime": "an engine", "text": "x", "log_probabilities": [{answer}]}}'
    program.write_text(
        f"#!{sys.executable}\nimport os, sys\nprint('noise')\nos.write(int(sys.argv[2]), {line!r}.encode())"
    )
    os.chmod(program, 0o755)
    arguments = ["check", directory, "--runtime", "vllm", "--python", program]
    if message is None:
        assert "an engine loads" in convert(*arguments).stdout
    else:
        assert f"an engine loads it, and {message}" in refused(*arguments)


def test_why_a_worker_ended_is_what_it_printed(directory, tmp_path):
    """vLLM's own words, as far as they matter: a worker prints the reason, and the engine points at it."""
    program = tmp_path / "python"
    told = "(Worker pid=1) ERROR [x.py:1] ValueError: 192 columns are no whole groups of 128"
    line = '{"error": "RuntimeError: Engine core initialization failed. See root cause above."}'
    text = f"import os, sys\nprint({told!r}, flush=True)\nos.write(int(sys.argv[2]), {line!r}.encode())"
    program.write_text(f"#!{sys.executable}\n{text}")
    os.chmod(program, 0o755)
    said = refused("check", directory, "--runtime", "vllm", "--python", program)
    assert "vLLM does not run it: ValueError: 192 columns are no whole groups of 128" in said


def test_a_gguf_is_no_directory(tmp_path):
    said = refused("check", tmp_path / "m.gguf", "--runtime", "vllm")
    assert "that is none" in said and "bitwright evaluate" in said


def test_gpus_are_held_against_the_plan(tiny, tmp_path):
    """16 heads of 16 over 3 GPUs; and no such thing of a GGUF."""
    done = convert("plan", "--profile", "fp8", "--tensor-parallel", 2, tiny("llama-256"))
    assert done.exit_code == 0 and "vLLM can cut this plan over 2 GPUs" in done.output
    said = refused("plan", "--profile", "fp8", "--tensor-parallel", 3, tiny("llama-256"))
    assert "vLLM cannot cut this plan over 3 GPUs: " in said and "attention heads" in said
    assert "remedy: use 1 or 2" in said
    said = refused("--profile", "uniform-8bit", "--tensor-parallel", 2, "-o", tmp_path / "m.gguf", tiny("llama-256"))
    assert "--tensor-parallel" in said and "for a directory for vLLM" in said
