"""The whole job on the real model: what is measured here is what llama.cpp computes from the file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch

from bitwright.calibration.statistics.imatrix_file import save_imatrix
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.converter.cli import main
from bitwright.converter.judge.llama_cpp import LlamaCpp
from bitwright.converter.model.model_map import describe
from bitwright.converter.source.open import open_checkpoint
from scripts.demo import PROMPT

TEXT = (
    "The history of the bicycle is longer than one may think. Early machines had no pedals: the rider pushed the ground"
    " with both feet and coasted downhill. When the pedals came they sat on the front wheel, which for that reason grew"
    " and grew, until a chain made the rear wheel turn and both wheels shrank to the same size again."
)


@pytest.fixture(scope="module")
def conversion(smollm2_wide, tmp_path_factory) -> dict:
    """The report of `bitwright --profile mlp-low-precision --judge fast` with a short calibration."""
    directory = tmp_path_factory.mktemp("conversion")
    arguments = [
        "--profile",
        "mlp-low-precision",
        "--no-analysis",
        "--no-error-feedback",
        "--calibration",
        "embedded",
        "--samples",
        "128",
    ]
    arguments += [
        "--sequence-length",
        "32",
        "--effort",
        "fast",
        "--judge",
        "fast",
        "--output",
        str(directory),
        "--json",
        str(smollm2_wide),
    ]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def unquantized(smollm2_wide, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("unquantized") / "f16.gguf"
    arguments = [
        "--profile",
        "uniform-8bit",
        "--set",
        "*=F16",
        "--judge",
        "off",
        "--output",
        str(path),
        str(smollm2_wide),
    ]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.stderr
    return str(path)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_the_report_is_complete(conversion):
    quality = conversion["quality"]
    assert 1 < quality["source_perplexity"] < quality["perplexity"]
    assert 0 < quality["mean_kld"] < 0.5
    assert 0.5 < quality["top1_agreement"] < 1
    assert {row["group"] for row in conversion["groups"]} == {
        "embedding",
        "output",
        "attention",
        "mlp",
        "norms, routers",
    }
    assert len(conversion["errors"]) == sum(row["tensors"] for row in conversion["groups"])
    assert sum(row["bytes"] for row in conversion["groups"]) < conversion["artifact"]["bytes"]


def test_llama_cpp_answers_from_the_artifact(conversion, unquantized):
    (file,) = conversion["artifact"]["files"]
    with LlamaCpp(file["path"]) as quantized, LlamaCpp(unquantized) as source:
        answer = quantized.detokenize(quantized.generate(quantized.tokenize(PROMPT), 40))
        assert len(answer.split()) > 15 and any(word in answer for word in ("sky", "light", "scatter")), answer
        tokens = source.tokenize(TEXT)
        before, after = log_softmax(source.logits(tokens)), log_softmax(quantized.logits(tokens))
    divergence = (np.exp(before) * (before - after)).sum(axis=1)[len(tokens) // 2 :].mean()
    assert 0 < divergence < 2 * conversion["quality"]["mean_kld"] + 0.05


def test_evaluate_agrees_with_the_report_and_tells_a_better_file(conversion, unquantized, smollm2_wide):
    (file,) = conversion["artifact"]["files"]

    def evaluate(path: str) -> dict:
        arguments = [
            "evaluate",
            path,
            "--against",
            str(smollm2_wide),
            "--samples",
            "4",
            "--sequence-length",
            "32",
            "--json",
        ]
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)

    converted, exact = evaluate(file["path"]), evaluate(unquantized)
    assert exact["mean_kld"] < 1e-6 and exact["top1_agreement"] == 1
    assert converted["mean_kld"] == pytest.approx(conversion["quality"]["mean_kld"], rel=0.5)
    assert converted["agreement"]["verdict"] == exact["agreement"]["verdict"] == "agrees"
    assert exact["agreement"]["logits"]["mean_kld"] < 1e-3


def test_the_computed_importance_can_be_used_again(conversion, smollm2_wide, tmp_path):
    """The imatrix that the conversion leaves gives the same artifact, but for the file's name in the metadata."""
    (file,) = conversion["artifact"]["files"]
    work_dir = conversion["path"].removesuffix("report.json")
    again = tmp_path / "again.gguf"
    arguments = [
        "--profile",
        "mlp-low-precision",
        "--no-analysis",
        "--imatrix",
        f"{work_dir}imatrix.gguf",
        "--samples",
        "128",
    ]
    arguments += [
        "--sequence-length",
        "32",
        "--effort",
        "fast",
        "--judge",
        "off",
        "--output",
        str(again),
        str(smollm2_wide),
    ]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.stderr
    assert again.stat().st_size == file["bytes"]
    assert again.read_bytes() == Path(file["path"]).read_bytes()


def float_gguf(model: Path, path: Path) -> Path:
    """The model as a GGUF in F32."""
    arguments = ["--profile", "uniform-8bit", "--set", "*=F32", "--judge", "off", "--output", str(path), str(model)]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    return path


@pytest.fixture
def short_calibration(tmp_path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    return ["--calibration", str(text), "--samples", "128", "--sequence-length", "16", "--json"]


@pytest.mark.parametrize(("name", "by"), [("llama-256", "--no-analysis"), ("qwen2", "--analysis")])
def test_a_float_gguf_is_a_source_too(tiny, tmp_path, name, by, short_calibration):
    """Calibrated and measured through transformers' reading of the GGUF, planned by rules and by what is measured, and
    quantized as the checkpoint itself is, but for folding, which goes by the checkpoint's own names."""
    reports, options = [], [*short_calibration, by, "--no-folding", "--judge", "fast", "--effort", "fast"]
    for model, output in ((float_gguf(tiny(name), tmp_path / "f32.gguf"), "one.gguf"), (tiny(name), "two.gguf")):
        done = CliRunner().invoke(main, [*options, "--output", str(tmp_path / output), str(model)])
        assert done.exit_code == 0, done.stderr
        reports.append(sorted(json.loads(done.stdout)["errors"], key=lambda error: error["tensor"]))
    for one, two in zip(*reports, strict=True):
        assert (one["tensor"], one["format"]) == (two["tensor"], two["format"])
        assert one["relative_error"] == pytest.approx(two["relative_error"], rel=0.02)


def test_a_gguf_that_transformers_misreads_is_refused(tiny, tmp_path, short_calibration):
    """Of a qwen3 whose heads are not 128 wide, transformers takes the wrong shapes and random weights for them."""
    source = float_gguf(tiny("qwen3"), tmp_path / "f32.gguf")
    failed = CliRunner().invoke(main, [*short_calibration, "--output", str(tmp_path / "m.gguf"), str(source)])
    assert failed.exit_code == 1
    assert "transformers cannot run this GGUF" in failed.stderr and "--imatrix" in failed.stderr
    assert not (tmp_path / "m.gguf").exists()


def test_ternary_formats_warn_unless_the_model_is_ternary(tiny, tmp_path):
    """A model whose matrices are -s, 0 or s row by row is kept bit for bit, without a word; another is warned about."""
    arguments = ["--profile", "uniform-8bit", "--set", "mlp_*=TQ2_0", "--set", "attention_*=TQ1_0", "--judge", "off"]
    arguments += ["--imatrix", str(uniform_importance(tiny("llama-256"), tmp_path / "i.gguf")), "--json"]
    done = CliRunner().invoke(main, [*arguments, "--output", str(tmp_path / "m.gguf"), str(tiny("llama-256"))])
    assert done.exit_code == 0 and "not ternary" in done.stderr

    ternary = shutil.copytree(tiny("llama-256"), tmp_path / "ternary")
    weights = load_file(ternary / "model.safetensors")
    for name, weight in weights.items():
        if "_proj" in name:
            weights[name] = torch.sign(weight) * (weight.abs() > 0.05) * torch.tensor(0.0625, dtype=weight.dtype)
    save_torch(weights, ternary / "model.safetensors", metadata={"format": "pt"})
    done = CliRunner().invoke(main, [*arguments, "--output", str(tmp_path / "t.gguf"), str(ternary)])
    assert done.exit_code == 0 and "not ternary" not in done.stderr
    errors = {
        e["tensor"]: e["relative_error"] for e in json.loads(done.stdout)["errors"] if e["format"].startswith("TQ")
    }
    assert len(errors) == 4 * 7 and not any(errors.values())


def uniform_importance(model: Path, path: Path) -> Path:
    matrices = [t for t in describe(open_checkpoint(str(model))).tensors if t.layer is not None and len(t.shape) > 1]
    sums = {t.name: np.ones((t.n_matrices, t.n_columns)) for t in matrices}
    save_imatrix(path, ImportanceMatrix(sums, {name: np.ones(len(s), np.int64) for name, s in sums.items()}))
    return path
