"""Super weights on the command line: looked for, kept in the file, shown."""

import json

import pytest
from click.testing import CliRunner

from calibration.imatrix_file import load_imatrix
from converter.cli import main
from tests.converter import planted_model


def run(*arguments: object) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def planted(tiny, tmp_path_factory):
    """A model with one super weight, a text, and its importance with what was found."""
    directory = tmp_path_factory.mktemp("planted")
    model = planted_model.build(tiny("llama-256"), directory / "model", 2, {(100, 300): 9.0})
    text = planted_model.text(model, directory / "text.txt")
    importance = directory / "importance.gguf"
    options = ["--calibration", text, "--samples", 128, "--sequence-length", 32, "--no-chat"]
    run("imatrix", "--super-weights", *options, "--output", importance, model)
    return model, text, importance


def test_the_command_finds_keeps_and_shows_them(planted):
    _, _, importance = planted
    report = load_imatrix(importance).super_weights
    assert [weight.place for weight in report.weights] == [(2, "blk.2.ffn_down.weight", 0, 100, 300)]
    shown = json.loads(run("inspect", "--json", importance))["super_weights"]
    assert shown["weights"][0]["value"] == 9.0 and shown["weights"][0]["divergence_when_removed"] > 0.1
    (line,) = [
        line
        for line in run("inspect", importance).splitlines()
        if line.startswith("blk.2.ffn_down.weight  ") and "yes" in line
    ]
    assert line.split()[1:5] == ["0", "100", "300", "9"]


def test_none_is_an_answer_and_says_what_was_looked_at(tiny, planted, tmp_path):
    _, text, _ = planted
    options = ["--calibration", text, "--samples", 128, "--sequence-length", 16]
    run("imatrix", "--super-weights", *options, "--output", tmp_path / "none.gguf", tiny("llama"))
    shown = run("inspect", tmp_path / "none.gguf")
    assert "super weights: none; 0 candidates" in shown and "largest row" in shown


def test_a_dat_file_cannot_hold_them(planted, tmp_path):
    model, _, importance = planted
    for source in (model, importance):
        failed = CliRunner().invoke(
            main, ["imatrix", "--super-weights", "--output", str(tmp_path / "x.dat"), str(source)]
        )
        assert failed.exit_code == 1 and "cannot hold super weights" in failed.stderr
    done = CliRunner().invoke(main, ["imatrix", "--output", str(tmp_path / "x.dat"), str(importance)])
    assert done.exit_code == 0 and "stays behind" in done.stderr


def test_importance_without_a_look_says_so(planted, tmp_path):
    model, text, _ = planted
    options = ["--calibration", text, "--samples", 128, "--sequence-length", 16]
    run("imatrix", *options, "--output", tmp_path / "plain.gguf", model)
    assert "nobody has looked" in run("inspect", tmp_path / "plain.gguf")
    failed = CliRunner().invoke(
        main, ["imatrix", "--super-weights", "--output", str(tmp_path / "x.gguf"), str(tmp_path / "plain.gguf")]
    )
    assert failed.exit_code == 1 and "give the model" in failed.stderr
