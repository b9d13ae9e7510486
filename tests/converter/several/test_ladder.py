"""A ladder: artifacts of one model that is measured once, each the same as by itself."""

import json
import re
from typing import Any

import pytest

from bitwright import converter
from bitwright.calibration.control import never
from bitwright.converter.forecast.rates import RateKeeper
from bitwright.converter.job.progress import Progress
from bitwright.converter.several.ladder import PAGE, SUMMARY, climb, parse_rungs
from bitwright.formats.errors import ConvertError
from tests.converter.commands import convert, refused

SHORT: dict[str, Any] = {
    "samples": 128,
    "sequence_length": 16,
    "calibration": "embedded",
    "threads": 1,
    "device": "cpu",
}
RUNGS = "uniform-8bit,balanced-4bit,5.5bpw,5.6bpw"


def sizes(rungs: str) -> list[dict[str, Any]]:
    return [rung.options for rung in parse_rungs(rungs)]


def test_rungs_are_profiles_sizes_and_bits_per_weight():
    assert sizes("two-bit, 1.2GiB,700K,4.5bpw,own.toml") == [
        {"profile": "two-bit"},
        {"target_size": int(1.2 * 2**30)},
        {"target_size": 700_000},
        {"target_bpw": 4.5},
        {"profile": "own.toml"},
    ]
    for wrong in ("", " , ", "two-bit,two-bit"):
        with pytest.raises(ConvertError, match="the ladder names"):
            parse_rungs(wrong)


def test_every_rung_is_what_it_is_alone_and_the_model_is_measured_once(tiny, tmp_path, capsys, monkeypatch):
    model, ladder, timed = str(tiny("llama")), tmp_path / "ladder", []
    monkeypatch.setattr(RateKeeper, "took", lambda self, tensor, n_weights, seconds: timed.append(tensor))
    reports = climb(model, parse_rungs(RUNGS), ladder, Progress(), never, judge="off", **SHORT)
    said = capsys.readouterr().err
    assert re.search(r"\d+ tensors \(.* bytes\) are those of earlier artifacts", said)
    copied = sum(map(int, re.findall(r"(\d+) tensors \(.* bytes\) are those of earlier artifacts", said)))
    written = [line for path in ladder.glob("*.bitwright/encoded.jsonl") for line in path.read_text().splitlines()]
    assert len(timed) == len(written) - copied, "the time of a copy is no measure of encoding"
    assert [report.profile for report in reports] == ["uniform-8bit", "balanced-4bit", "budget", "budget"]
    artifacts = [report.artifact.location for report in reports]
    assert not list(ladder.glob("*.bitwright/calibration/*")) or len(list(ladder.glob("*.bitwright/calibration"))) == 1
    imatrix, sensitivity = next(ladder.glob("*.imatrix.gguf")), next(ladder.glob("*.sensitivity.safetensors"))
    assert imatrix.exists() and {report.feedback is None for report in reports} == {True, False}
    given = {"sensitivity": sensitivity, "judge": "off", "quiet": True}
    for options, artifact in zip(sizes(RUNGS), artifacts, strict=True):
        converter.convert(model, output=tmp_path / "alone" / artifact.name, **options, **given, **SHORT)
        assert (tmp_path / "alone" / artifact.name).read_bytes() == artifact.read_bytes()
    summary = json.loads((ladder / SUMMARY).read_text())
    assert [entry["artifact"]["bytes"] for entry in summary] == [path.stat().st_size for path in artifacts]
    page = (ladder / PAGE).read_text()
    assert all(path.name in page for path in artifacts)
    before = {path: path.stat().st_mtime_ns for path in artifacts}
    climb(model, parse_rungs(RUNGS), ladder, Progress(quiet=True), never, judge="off", **SHORT)
    assert before == {path: path.stat().st_mtime_ns for path in artifacts}


def test_a_rung_that_cannot_be_had_stops_the_ladder_before_anything_is_written(tiny, tmp_path):
    arguments = ["--calibration", "embedded", "--samples", 128, "--sequence-length", 16, "--judge", "off"]
    said = refused("--ladder", "balanced-4bit,1bpw", *arguments, "--output", tmp_path, tiny("llama"))
    assert "the rung 1bpw cannot be had" in said and "the smallest file takes" in said
    assert not list(tmp_path.glob("*.gguf")), "not even what the other rung needs is measured"


@pytest.mark.parametrize("options", [["--dry-run"], ["--profile", "two-bit"], ["--target-bpw", "4"]])
def test_what_is_one_artifacts_own_is_refused(tiny, tmp_path, options):
    assert "--ladder" in refused("--ladder", "two-bit,4bpw", *options, "--output", tmp_path / "out", tiny("llama"))


def test_the_command_prints_a_line_for_each_rung(tiny, tmp_path):
    arguments = ["--calibration", "embedded", "--samples", 128, "--sequence-length", 16, "--judge", "off"]
    result = convert("--ladder", "uniform-8bit,fp16-baseline", *arguments, "--output", tmp_path, tiny("llama"))
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split()[:3] == ["size", "bits", "mean"] and len(lines) == 5
    assert not list(tmp_path.glob("*.imatrix.gguf")), "neither rung needs importance"
