"""What a plan predicts is what is written, to the byte."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bitwright.calibration.statistics.imatrix_file import save_imatrix
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.converter.cli import main
from bitwright.converter.model.model_map import describe
from bitwright.converter.source.open import open_checkpoint


def run_json(*arguments: object) -> dict:
    done = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def some_importance(model: Path, path: Path) -> Path:
    """A log-normal importance of every matrix of the model."""
    random = np.random.default_rng(0)
    matrices = [t for t in describe(open_checkpoint(str(model))).tensors if t.layer is not None and len(t.shape) > 1]
    sums = {t.name: random.lognormal(0, 1, (t.n_matrices, t.n_columns)) for t in matrices}
    save_imatrix(path, ImportanceMatrix(sums, {name: np.ones(len(s), np.int64) for name, s in sums.items()}))
    return path


@pytest.mark.parametrize("model", ["smollm2", "smollm2_wide"])
@pytest.mark.parametrize("preset", ["mlp-low-precision", "attention-high-precision", "balanced-4bit", "uniform-8bit"])
def test_presets_on_the_real_model(request, tmp_path, model, preset):
    directory = request.getfixturevalue(model)
    output = tmp_path / "model.gguf"
    arguments = ["--profile", preset, "--output", output, "--effort", "fast", "--judge", "off"]
    arguments += ["--no-analysis", "--imatrix", some_importance(directory, tmp_path / "imatrix.gguf"), directory]
    predicted = run_json("plan", *arguments)["bytes"]
    report = run_json(*arguments)
    assert output.stat().st_size == predicted == report["artifact"]["bytes"]


@pytest.mark.parametrize("model", ["llama", "qwen3_moe", "phi3"])
def test_with_a_calibration_that_is_still_to_come(tiny, tmp_path, model):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    arguments = [
        "--samples",
        "128",
        "--sequence-length",
        "16",
        "--calibration",
        text,
        "--judge",
        "off",
        "--no-analysis",
    ]
    arguments += ["--output", tmp_path / "model.gguf", tiny(model)]
    predicted = run_json("plan", *arguments)["bytes"]
    assert run_json(*arguments)["artifact"]["bytes"] == predicted == (tmp_path / "model.gguf").stat().st_size


def test_a_width_that_no_k_format_divides_is_stated(smollm2):
    done = CliRunner().invoke(main, ["plan", "--profile", "mlp-low-precision", str(smollm2)])
    said = " ".join(done.stdout.split())
    assert "tensors with rows of 576 cannot be IQ4_XS: IQ4_NL instead, +" in said
    assert "tensors with rows of 576 cannot be Q6_K: Q8_0 instead, +" in said
