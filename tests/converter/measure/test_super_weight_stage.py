"""Super weights on the command line: looked for, kept in the file, shown."""

import json

import pytest
from click.testing import CliRunner

from bitwright.calibration.statistics.imatrix_file import load_imatrix
from bitwright.converter.cli import main
from tests.converter.gguf import planted_model


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
    importance = directory / "imatrix.gguf"
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


def test_where_sensitivity_is_measured_gradients_look_too(planted, tmp_path):
    """Also where a search by spikes alone has left its report."""
    model, text, _ = planted
    options = ["--calibration", text, "--samples", 128, "--sequence-length", 16, "--output", tmp_path / "both.gguf"]
    run("imatrix", "--super-weights", *options, model)
    assert load_imatrix(tmp_path / "both.gguf").super_weights.criteria == ("spikes",)
    run("imatrix", "--super-weights", "--sensitivity", *options, model)
    report = load_imatrix(tmp_path / "both.gguf").super_weights
    assert report.criteria == ("spikes", "gradients") and report.looks > 0
    assert (2, "blk.2.ffn_down.weight", 0, 100, 300) in [weight.place for weight in report.weights]


def test_a_text_that_has_changed_is_another_computation(planted, tmp_path):
    model, text, _ = planted
    other = tmp_path / "text.txt"
    other.write_text(text.read_text())
    arguments = ["imatrix", "--calibration", other, "--samples", 128, "--sequence-length", 16]
    arguments += ["--output", tmp_path / "i.gguf", model]
    run(*arguments)
    before = (tmp_path / "i.gguf").read_bytes()
    other.write_text(text.read_text()[1000:] + "a quick brown fox")
    failed = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert failed.exit_code == 1 and "calibration_file differ" in failed.stderr and "--fresh" in failed.stderr
    run(*arguments, "--fresh")
    assert (tmp_path / "i.gguf").read_bytes() != before


@pytest.mark.parametrize("scheme", ["W4A16_G32", "W8A8"])
def test_a_directory_keeps_the_matrix_of_a_super_weight(planted, tmp_path, scheme):
    model, text, _ = planted
    profile = tmp_path / "profile.toml"
    smooth = "[activations]\nsmooth = true\nadapt = false\n" if scheme == "W8A8" else ""
    table = '[protection]\nsuper_weights = "exclude"\n'
    head = 'description = "d"\ngood_for = "g"\ntarget = "safetensors"\n'
    profile.write_text(f'{head}base = "{scheme}"\n{smooth}{table}')
    output = tmp_path / "out"
    options = ["--calibration", text, "--samples", 128, "--sequence-length", 32, "--no-chat", "--judge", "off"]
    arguments = ["--profile", profile, "--json", *options, "--output", output, model]
    report = json.loads(run(*arguments))
    (kept,) = report["protection"]
    assert kept["tensor"] == "model.layers.2.mlp.down_proj.weight" and "super weight 100,300" in kept["why"]
    assert report["super_weight_coverage"]["confirmed"] == report["super_weight_coverage"]["within"] == 1
    formats = {error["tensor"]: error["format"] for error in report["errors"]}
    assert formats["model.layers.2.mlp.down_proj.weight"] == "BF16"
    assert formats["model.layers.1.mlp.down_proj.weight"] == scheme
    assert "model.layers.2.mlp.down_proj" in str(
        json.loads((output / "config.json").read_text())["quantization_config"]
    )
    assert json.loads(run(*arguments))["protection"] == [kept]  # the second time it is done already
