"""A file of conversions: each line for itself, with a log, and tried again where that helps."""

import json
import os
import sys
from pathlib import Path

import pytest

from bitwright.converter.several import batch
from bitwright.converter.several.batch import read_jobs, run_batch
from bitwright.formats.errors import ConvertError
from tests.converter.commands import convert

PLAIN = "--profile uniform-8bit --judge off"


def test_one_line_fails_and_the_others_are_done(tiny, tmp_path):
    jobs = tmp_path / "jobs.txt"
    jobs.write_text(
        f"# two models\n{PLAIN} --output {tmp_path}/a.gguf {tiny('llama')}\n\n"
        f"{PLAIN} --output {tmp_path}/b.gguf {tmp_path}/nothing\n{PLAIN} --output {tmp_path}/c.gguf {tiny('qwen2')}\n"
    )
    done = convert("batch", jobs, "--parallel", 2, "--json")
    assert done.exit_code == 1
    outcomes = json.loads(done.stdout)
    assert [outcome["code"] for outcome in outcomes] == [0, 1, 0] and outcomes[1]["tries"] == 1
    assert (tmp_path / "a.gguf").exists() and (tmp_path / "c.gguf").exists()
    logs = [Path(outcome["log"]).read_text() for outcome in outcomes]
    assert all(log.startswith("== 2") for log in logs) and "Verdict: not measured" in logs[0]
    assert "[1] " in done.stderr and "[3] " in done.stderr
    again = convert("batch", jobs, "-q")
    assert "2 of 3 conversions done" in again.stdout and "log: " in again.stdout and again.stderr == ""
    assert "already done" in (tmp_path / "jobs.txt.logs" / "1.log").read_text()


def test_what_failed_by_chance_is_tried_again(tmp_path, monkeypatch):
    """A command that succeeds at its third try."""
    counter = tmp_path / "counter"
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho x >> {counter}\n[ $(wc -l < {counter}) -ge 3 ] || exit 75\n")
    os.chmod(program, 0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(batch, "_FIRST_PAUSE_SECONDS", 0.01)
    (outcome,) = run_batch([["model"]], tmp_path / "logs", 1, 3, print)
    assert (outcome.code, outcome.tries) == (0, 3)
    counter.unlink()
    (outcome,) = run_batch([["model"]], tmp_path / "logs", 1, 1, print)
    assert (outcome.code, outcome.tries) == (75, 2)


def test_jobs_beside_each_other_share_the_cores(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(sys, "executable", "echo")
    monkeypatch.setattr(batch, "usable_cores", lambda: 8)
    run_batch([["a"], ["b", "--threads", "3"], ["publish", "c"]], tmp_path / "logs", 2, 0, said.append)
    assert sorted(line.partition("bitwright.converter ")[2] for line in said) == [
        "a --threads 4",
        "b --threads 3",
        "publish c",
    ]


@pytest.mark.parametrize(("text", "message"), [("# nothing\n", "no conversion"), ("'open\n", "line 1")])
def test_a_file_that_makes_no_sense_is_refused(tmp_path, text, message):
    (tmp_path / "jobs.txt").write_text(text)
    with pytest.raises(ConvertError) as caught:
        read_jobs(tmp_path / "jobs.txt")
    assert message in str(caught.value)
