"""What people read fits a terminal of 80 columns; what they copy is on a line of its own."""

import json

import pytest

from bitwright.converter.report.text import WIDTH, table, wrapped
from scripts.frontier_models import write_frontier_model
from tests import tiny_models
from tests.converter.commands import TEXT, convert

PLAIN_TEXT = ["--calibration", "embedded"]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Headers of gpt-oss-120b."""
    directory = tmp_path_factory.mktemp("m")
    tiny_models.build("llama", directory / "tiny")
    write_frontier_model("gpt-oss-120b", directory / "gpt-oss-120b", directory / "tiny")
    return directory / "gpt-oss-120b"


def check(text: str, *copied: object) -> None:
    """copied: what a line may hold that is longer."""
    lines = text.splitlines()
    assert lines
    for line in lines:
        may_be_longer = any(str(word) in line for word in copied)
        assert len(line) <= WIDTH or may_be_longer, line


def said(*arguments: object) -> str:
    done = convert(*arguments)
    assert done.exit_code == 0, done.stderr
    return done.stdout


def test_a_plan(tiny, large, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for model in (tiny("llama-256"), tiny("qwen3_moe"), large):
        options = ["--calibration-dtype", "float32", "--no-error-feedback", *PLAIN_TEXT]
        check(said("plan", *options, model), "would write ")
        check(said("plan", "--explain", "*", *options, model))
        check(said("plan", "--target-bpw", 6, *options, model), "would write ", "bitwright imatrix", "--imatrix ")
    check(said("plan", "--profile", "smoothquant-w8a8", *PLAIN_TEXT, tiny("llama-256")), "would write ")


def test_advice(tiny, large):
    for model, machine in ((tiny("llama-256"), "RTX 4090"), (large, "gb10")):
        check(said("advise", "--hardware", machine, "--batch", 16, model), "convert --profile", model)


def test_profiles():
    check(said("profiles", "list"))


def test_a_report_and_an_evaluation(tiny, tmp_path):
    output = tmp_path / "m.gguf"
    options = ["--profile", "balanced-4bit", "--no-analysis", "--no-error-feedback", "--judge", "fast", *TEXT]
    check(said(*options, "--output", output, tiny("llama-256")), output, "m.bitwright", "sha256 ")
    report = json.loads((tmp_path / "m.bitwright" / "report.json").read_text())
    text = ["--samples", 2, "--sequence-length", 32]
    check(said("evaluate", output, "--against", tiny("llama-256"), *text))
    assert report["quality"] is not None and report["coherence"] is not None, "all lines were there"


def test_words_that_belong_together_are_not_parted():
    line = "memory " + "x" * 67 + " 16 GiB at most"
    assert wrapped(line).splitlines()[1].strip() == "16 GiB at most"
    text = table(["a", "formats", "b"], [["row", "Q4_K " * 30, "1"]], wide=1)
    assert max(map(len, text.splitlines())) <= WIDTH and text.count("Q4_K") == 30
    assert table(["a", "b"], [["x", "1"]]).splitlines()[2] == "x  1"
