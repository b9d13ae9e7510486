"""Losses by encoding sampled rows, against the dense sum over every weight of the checkpoint's own tensors."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bitwright.calibration.control import Interrupted
from bitwright.calibration.sensitivity.fisher import FisherFactors
from bitwright.calibration.sensitivity.layer_score import ScoreWeights, layer_scores
from bitwright.calibration.sensitivity.table import SensitivityTable, save_sensitivity
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.converter.measure.evidence import evidence_of
from bitwright.converter.measure.sensitivity import (
    CANDIDATE_FORMATS,
    Trials,
    build_sensitivity,
    check_sensitivity,
    sample_by_size,
)
from bitwright.converter.model.model_map import describe
from bitwright.converter.model.stored_rows import read_rows
from bitwright.converter.report.inspect import inspect_file, inspect_text
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.journal import read_lines
from bitwright.formats.registry import FORMATS, get_format
from bitwright.profiles.vocabulary import ModelMap
from tests import tiny_models
from tests.converter.runs import run_of

JOURNAL = "sensitivity.jsonl"
FORMAT_NAMES = ("Q4_0", "Q2_K", "IQ2_XXS", "NVFP4", "TQ2_0")


def opened(directory: Path) -> tuple[Checkpoint, ModelMap]:
    checkpoint = open_checkpoint(str(directory))
    return checkpoint, describe(checkpoint)


def random_factors(model_map: ModelMap) -> FisherFactors:
    """Factors over three orders of magnitude, as real ones are."""
    random = np.random.default_rng(1)
    shapes = {t.name: (t.n_matrices, t.n_rows // t.n_matrices, t.n_columns) for t in model_map.tensors if t.quantizable}
    magnitudes = dict.fromkeys(shapes, 1.0)
    return FisherFactors(
        rows={name: np.exp(random.normal(0, 1.5, (n, rows))) for name, (n, rows, _) in shapes.items()},
        columns={name: np.exp(random.normal(0, 1.5, (n, columns))) for name, (n, _, columns) in shapes.items()},
        gradient_magnitude=magnitudes,
        activation_variance=magnitudes,
        weight_magnitude=magnitudes,
        model="tiny",
        revision=None,
        corpus="random",
        corpus_sha256="0" * 64,
        samples=1,
        sequence_length=8,
        labels="sampled",
    )


def importance_of(factors: FisherFactors) -> ImportanceMatrix:
    """For the matrices of the layers; embedding and head have none."""
    sums = {name: columns**0.5 for name, columns in factors.columns.items() if name.startswith("blk.")}
    return ImportanceMatrix(sums, {name: np.ones(len(columns), np.int64) for name, columns in sums.items()})


def build(directory: Path, work_dir: Path, formats=FORMAT_NAMES, sampled_rows=10_000, **options) -> SensitivityTable:
    """options: of run_of."""
    run = run_of(directory, work_dir, **options)
    factors = random_factors(run.model_map)
    return build_sensitivity(run, factors, importance_of(factors), Trials(formats, sampled_rows=sampled_rows))


def dense_loss(directory: Path, name: str, format_name: str) -> float:
    """1/2 sum_ij rows[i] columns[j] E_ij**2 over the tensor's matrices."""
    checkpoint, model_map = opened(directory)
    factors = random_factors(model_map)
    spec, block_format = model_map.tensor(name), get_format(format_name)
    columns = importance_of(factors).columns(name) if name.startswith("blk.") else [None] * spec.n_matrices
    rows = read_rows(checkpoint, spec, 0, spec.n_rows).reshape(spec.n_matrices, -1, spec.n_columns)
    decoded = []
    for matrix, importance in zip(rows, columns, strict=True):
        scale = 1.0
        if format_name == "NVFP4" and name != "token_embd.weight" and not ("ffn" in name and "qwen2" in directory.name):
            scale = block_format.tensor_scale(np.abs(matrix).max())
        encoded = block_format.encode(matrix / np.float32(scale), importance, "fast")
        decoded.append(block_format.decode(encoded) * np.float32(scale))
    total = 0.0
    for matrix, (own, values) in enumerate(zip(rows, decoded, strict=True)):
        error = values.astype(np.float64) - own
        total += factors.rows[name][matrix] @ error**2 @ factors.columns[name][matrix]
    return total / 2


@pytest.mark.parametrize("model", ["llama-256", "qwen3_moe", "qwen2"])
def test_losses_are_the_dense_sums(tiny, tmp_path, model):
    directory = tiny(model)
    table = build(directory, tmp_path / "work")
    _, model_map = opened(directory)
    checked = [t for t in model_map.tensors if t.quantizable and t.layer in (None, 1)]
    assert {t.name for t in model_map.tensors if t.quantizable} == set(table.losses)
    for tensor in checked:
        assert table.sampled_rows[tensor.name] == tensor.n_rows
        assert set(table.losses[tensor.name]) == {f for f in FORMAT_NAMES if get_format(f).fits(tensor.n_columns)}
        for format_name, loss in table.losses[tensor.name].items():
            assert loss == pytest.approx(dense_loss(directory, tensor.name, format_name), rel=1e-9)


def test_few_sampled_rows_tell_the_sum(tiny, tmp_path):
    whole, sampled = (build(tiny("llama-256"), tmp_path / str(n), sampled_rows=n) for n in (10_000, 64))
    ratios = []
    for name, losses in whole.losses.items():
        assert sampled.sampled_rows[name] <= 64
        ratios += [sampled.losses[name][format_name] / loss for format_name, loss in losses.items()]
    np.testing.assert_allclose(ratios, 1, rtol=0.15)
    assert np.mean(ratios) == pytest.approx(1, abs=0.01)


def test_candidates_are_all_lossy_formats_that_no_training_is_needed_for():
    assert set(FORMATS) - set(CANDIDATE_FORMATS) == {"F32", "F16", "BF16", "Q1_0", "Q2_0", "TQ1_0", "TQ2_0"}


def saved(table: SensitivityTable, path: Path) -> bytes:
    save_sensitivity(path, table)
    return path.read_bytes()


@pytest.mark.parametrize("share", [0.3, 0.7])
@pytest.mark.parametrize("threads", [1, 5])
def test_any_interruption_and_any_number_of_threads_give_the_same_bytes(tiny, tmp_path, share, threads):
    options = {"formats": ("Q4_K", "NVFP4"), "sampled_rows": 16}
    expected = saved(build(tiny("llama-256"), tmp_path / "whole", **options), tmp_path / "table.safetensors")
    lines = (tmp_path / "whole" / JOURNAL).read_bytes()
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    (resumed / JOURNAL).write_bytes(lines[: int(share * len(lines))])  # as a kill leaves it, amid a line
    stops = iter([False] * 25 + [True])
    with pytest.raises(Interrupted, match="stopped after 26 of 30 tensors"):
        build(tiny("llama-256"), resumed, threads=threads, should_stop=lambda: next(stops), **options)
    table = build(tiny("llama-256"), resumed, threads=threads, **options)
    assert saved(table, tmp_path / "again.safetensors") == expected
    finished = [entry["tensor"] for entry in read_lines(resumed / JOURNAL)]
    assert len(finished) == len(set(finished)) == 30


def test_progress_counts_tensors(tiny, tmp_path):
    seen = []
    run = replace(run_of(tiny("llama-256"), tmp_path), progress=lambda *counted: seen.append(counted))
    build_sensitivity(run, random_factors(run.model_map), None, Trials(("Q4_0",), sampled_rows=1))
    assert seen[0] == ("sensitivity", 1, 30, "tensors")
    assert seen[-1] == ("sensitivity", 30, 30, "tensors")


def test_tensor_without_signal_costs_nothing(tiny, tmp_path):
    run = run_of(tiny("llama-256"), tmp_path)
    factors = random_factors(run.model_map)
    factors.rows["output.weight"][:] = 0
    table = build_sensitivity(run, factors, None, Trials(("Q4_0",)))
    assert table.losses["output.weight"] == {"Q4_0": 0.0}
    assert saved(table, tmp_path / "table.safetensors")


def test_tensor_without_factors_is_an_error(tiny, tmp_path):
    run = run_of(tiny("llama-256"), tmp_path)
    factors = random_factors(run.model_map)
    rows = {name: values for name, values in factors.rows.items() if name != "blk.2.ffn_up.weight"}
    columns = {name: factors.columns[name] for name in rows}
    with pytest.raises(ConvertError, match="lack this tensor") as caught:
        build_sensitivity(run, replace(factors, rows=rows, columns=columns), None, Trials())
    assert "blk.2.ffn_up.weight" in caught.value.where


def test_weight_that_is_no_number_is_named(tmp_path):
    tiny_models.build("llama-256", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][7, 3] = torch.nan
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    run = run_of(tmp_path / "model", tmp_path / "work")
    with pytest.raises(ConvertError, match="nan is not a finite number") as caught:
        build_sensitivity(run, random_factors(run.model_map), None, Trials(("Q4_0",)))
    assert "tensor model.layers.1.mlp.down_proj.weight, row 7, column 3" in caught.value.where


def test_a_table_of_another_model_is_refused(tiny, tmp_path):
    table = build(tiny("llama-256"), tmp_path / "work", formats=("Q4_0",), sampled_rows=1)
    check_sensitivity(table, *opened(tiny("llama-256")))
    with pytest.raises(ConvertError, match="it is of a llama, the model is a qwen3"):
        check_sensitivity(table, *opened(tiny("qwen3")))
    with pytest.raises(
        ConvertError, match=r"of blk.0.attn_k.weight it has \(1, 128, 256\), the model has \(1, 32, 64\)"
    ):
        check_sensitivity(table, *opened(tiny("llama")))
    with pytest.raises(ConvertError, match="the weights are others"):
        check_sensitivity(replace(table, weights_sha256="0" * 64), *opened(tiny("llama-256")))
    losses = {name: values for name, values in table.losses.items() if name != "output.weight"}
    with pytest.raises(ConvertError, match=r"of output\.weight it has nothing"):
        check_sensitivity(replace(table, losses=losses), *opened(tiny("llama-256")))


def test_weights_that_are_not_here_are_not_asked_for(tiny, tmp_path):
    table = build(tiny("llama-256"), tmp_path / "work", formats=("Q4_0",), sampled_rows=1)
    checkpoint, model_map = opened(tiny("llama-256"))
    elsewhere = replace(checkpoint, fetch_weights=lambda: checkpoint, tensors={})
    check_sensitivity(replace(table, weights_sha256="0" * 64), elsewhere, model_map)


@pytest.mark.parametrize("n_wanted", [1, 7, 50])
def test_sampling_by_size_is_unbiased(n_wanted):
    random = np.random.default_rng(0)
    sizes = np.exp(random.normal(0, 2, 200))
    sizes[::10] = 0
    values = sizes * random.uniform(0.5, 1.5, 200)
    estimates = []
    for seed in range(2000):
        indices, shares = sample_by_size(sizes, n_wanted, seed)
        assert sizes[indices].all()
        assert (np.diff(indices) > 0).all()
        assert shares @ sizes[indices] == pytest.approx(sizes.sum())
        estimates.append(shares @ values[indices])
    assert np.mean(estimates) == pytest.approx(values.sum(), rel=4 * np.std(estimates) / values.sum() / 2000**0.5)


def test_sampling_more_than_there_are_takes_all():
    indices, shares = sample_by_size(np.array([1.0, 0.0, 3.0]), 2, 0)
    np.testing.assert_array_equal(indices, [0, 2])
    np.testing.assert_array_equal(shares, [1, 1])
    assert len(sample_by_size(np.zeros(5), 2, 0)[0]) == 0


def test_inspect_prints_losses_and_layer_scores(tiny, tmp_path):
    path = tmp_path / "importance.sensitivity.safetensors"
    table = build(tiny("llama-256"), tmp_path / "work", formats=("Q4_K", "Q4_0", "IQ2_XXS"), sampled_rows=4)
    save_sensitivity(path, table)
    data = inspect_file(path)
    assert data["kind"] == "sensitivity"
    assert (data["model"], data["corpus"], data["effort"]) == ("tiny", "random", "fast")
    assert {t["tensor"]: t["losses"] for t in data["tensors"]} == table.losses
    assert list(data["tensors"][0]["losses"]) == ["IQ2_XXS", "Q4_0", "Q4_K"]
    layers = {name: int(name.split(".")[1]) for name in table.losses if name.startswith("blk.")}
    assert {row["layer"]: row["score"] for row in data["layers"]} == layer_scores(table.factors, layers)
    lines = inspect_text(data).splitlines()
    assert "corpus: random" in lines
    (line,) = (line for line in lines if line.startswith("blk.3.ffn_down.weight"))
    losses = table.losses["blk.3.ffn_down.weight"]
    assert line.split()[1:] == ["4", *(f"{1000 * losses[name]:.3g}" for name in ("IQ2_XXS", "Q4_0", "Q4_K"))]


def test_a_profiles_score_ranks_the_layers(tiny, tmp_path):
    checkpoint, model_map = opened(tiny("llama-256"))
    table = build(tiny("llama-256"), tmp_path / "work", formats=("Q4_0",), sampled_rows=4)
    magnitudes = {name: float(i) for i, name in enumerate(table.factors.weight_magnitude)}
    table = replace(table, factors=replace(table.factors, weight_magnitude=magnitudes))
    layers = {tensor.name: tensor.layer for tensor in model_map.tensors if tensor.layer is not None}
    given = evidence_of(table, checkpoint, model_map, {"gradient_magnitude": 0.0, "activation_variance": 0.0})
    assert given.layer_scores == layer_scores(table.factors, layers, ScoreWeights(0, 0, 0.2))
    assert given.layer_scores != evidence_of(table, checkpoint, model_map).layer_scores
