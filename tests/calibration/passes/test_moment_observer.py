"""Second moments by streaming: those of hooks on the whole model; shared, held out, resumed, budgeted as said."""

import json

import numpy as np
import pytest
import torch

from bitwright.calibration.control import Interrupted
from bitwright.calibration.passes.moment_observer import InputMoments
from bitwright.calibration.statistics import second_moments
from bitwright.calibration.statistics.second_moments import (
    INDEX_NAME,
    SecondMoments,
    open_moments,
    pack,
    unpack,
    write_moments,
)
from bitwright.calibration.stream import micro_batches
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.seals import write_sealed
from tests.calibration.stream.streaming import DictSource, StopAfter, compute, load_whole, random_corpus

SUMMED, HELD_OUT = (0, 3, 4, 5, 6), (1, 2)


def moments_of(directory, work_dir, **options) -> SecondMoments:
    moments_dir = work_dir.parent / f"{work_dir.name}-moments"
    corpus = options.pop("corpus", None) or random_corpus(n_samples=7)
    compute(directory, work_dir, moments_dir=moments_dir, corpus=corpus, **options)
    return open_moments(moments_dir)


def hooked_inputs(directory, parameter: str, samples) -> np.ndarray:
    """The inputs of a linear layer, float32 [n_tokens, n_columns], on those samples."""
    seen = []
    model = load_whole(directory)
    module = model.get_submodule(parameter.removesuffix(".weight"))
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        model(torch.from_numpy(random_corpus(n_samples=7).tokens[list(samples)]).long(), use_cache=False)
    return seen[0].reshape(-1, seen[0].shape[-1]).numpy()


def files_of(moments: SecondMoments) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(moments.directory.iterdir())}


@pytest.mark.parametrize("kind", ["self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_sums_and_held_out_rows_are_those_of_the_whole_model(kind, tiny, tmp_path):
    name = f"model.layers.1.{kind}.weight"
    moments = moments_of(tiny("llama"), tmp_path / "work")
    matrix, held_out = moments.load(moments.group(name, 0))
    inputs = hooked_inputs(tiny("llama"), name, SUMMED)
    expected = inputs.T.astype(np.float64) @ inputs.astype(np.float64)
    np.testing.assert_allclose(matrix, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(matrix, matrix.T)
    unseen = second_moments.thinned(hooked_inputs(tiny("llama"), name, HELD_OUT))
    np.testing.assert_allclose(held_out, unseen, rtol=1e-3, atol=1e-4 * np.abs(unseen).max())


def test_matrices_that_are_fed_the_same_share_a_file(tiny, tmp_path):
    moments = moments_of(tiny("llama"), tmp_path / "work")
    layer = "model.layers.0."
    groups = {
        kind: moments.group(f"{layer}{kind}.weight", 0)
        for kind in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    }
    assert groups["self_attn.q_proj"] == groups["self_attn.k_proj"] == groups["self_attn.v_proj"]
    assert groups["self_attn.o_proj"] != groups["self_attn.q_proj"]
    assert moments.group(f"{layer}mlp.gate_proj.weight", 0) == moments.group(f"{layer}mlp.up_proj.weight", 0)
    assert len(list(moments.directory.glob("*.npz"))) == 2 * 4
    assert moments.group("lm_head.weight", 0) is None
    assert moments.group("no.such.tensor", 0) is None


def test_the_importance_is_the_diagonal_and_what_was_held_out(tiny, tmp_path):
    """Observing more changes nothing of what the importance matrix says."""
    plain = compute(tiny("llama"), tmp_path / "plain", corpus=random_corpus(n_samples=7))
    both = compute(
        tiny("llama"), tmp_path / "both", corpus=random_corpus(n_samples=7), moments_dir=tmp_path / "moments"
    )
    for name, sums in plain.sums.items():
        np.testing.assert_array_equal(both.sums[name], sums)
    name = "model.layers.0.mlp.down_proj.weight"
    moments = open_moments(tmp_path / "moments")
    diagonal = moments.load(moments.group(name, 0)).matrix.diagonal()
    assert (diagonal < both.sums[name][0]).all()
    assert diagonal.sum() > 0.5 * both.sums[name].sum()


def test_experts_share_what_the_router_sees_and_keep_their_own_otherwise(tiny, tmp_path):
    moments = moments_of(tiny("qwen3_moe"), tmp_path / "work")
    stem = "model.layers.0.mlp.experts"
    up = {moments.group(f"{stem}.up_proj.weight", expert) for expert in range(8)}
    assert up == {moments.group(f"{stem}.gate_proj.weight", 0)} and None not in up
    down = [moments.group(f"{stem}.down_proj.weight", expert) for expert in range(8)]
    assert len(set(down) - {None}) == sum(group is not None for group in down) > 4
    # Each of a token's three experts adds its row to what they share.
    router = moments.load(moments.group("model.layers.0.mlp.gate.weight", 0)).matrix
    np.testing.assert_allclose(moments.load(up.pop()).matrix, 3 * router, rtol=1e-3, atol=1e-4 * router.max())


def test_experts_beyond_the_budget_have_no_moments(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(InputMoments.__init__, "__defaults__", (8 * 32**2 * 4 - 1,))
    moments = moments_of(tiny("qwen3_moe"), tmp_path / "work")
    stem = "model.layers.0.mlp.experts"
    assert [moments.group(f"{stem}.down_proj.weight", expert) for expert in range(8)] == [None] * 8
    assert moments.group(f"{stem}.up_proj.weight", 3) is not None


@pytest.mark.parametrize("name", ["gemma3", "qwen3_moe"])
def test_threads_and_interruptions_change_no_byte(name, tiny, tmp_path):
    whole = files_of(moments_of(tiny(name), tmp_path / "one", threads=1))
    assert files_of(moments_of(tiny(name), tmp_path / "many", threads=5)) == whole
    with pytest.raises(Interrupted):
        moments_of(tiny(name), tmp_path / "stopped", should_stop=StopAfter(1))
    source = DictSource.of(tiny(name))
    assert files_of(moments_of(tiny(name), tmp_path / "stopped", source=source)) == whole
    assert source.reads["model.layers.0.self_attn.q_proj.weight"] == 0


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_what_is_held_out_goes_by_sample_whatever_the_micro_batch(name, tiny, tmp_path, monkeypatch):
    found = []
    for n_tokens in (200, 1400):
        monkeypatch.setitem(micro_batches._TOKENS, "cpu", n_tokens)
        found.append(moments_of(tiny(name), tmp_path / f"{n_tokens}"))
    assert found[0].groups == found[1].groups
    for group in {group for groups in found[0].groups.values() for group in groups if group is not None}:
        one, other = (moments.load(group) for moments in found)
        np.testing.assert_allclose(one.matrix, other.matrix, rtol=1e-3, atol=1e-4 * one.matrix.max())
        assert len(one.held_out) and one.held_out.shape == other.held_out.shape
        if name == "llama":  # rows of experts come in another order
            np.testing.assert_allclose(one.held_out, other.held_out, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batch", [1, 3, 32, 1000])
def test_micro_batches_keep_apart_what_is_held_out(batch):
    spans = micro_batches.spans_of_samples(100, batch, micro_batches.Excerpt.whole(100))
    assert [i for span in spans for i in range(*span)] == list(range(100))
    for start, stop in spans:
        assert 0 < stop - start <= batch
        assert len({micro_batches.is_held_out(i) for i in range(start, stop)}) == 1
    assert [i for i in range(100) if micro_batches.is_held_out(i)] == [1, 2, 33, 34, 65, 66, 97, 98]
    assert len(micro_batches.spans_of_samples(100, batch)) == -(-100 // batch)


def test_of_a_long_text_a_share_of_the_rows_is_summed(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(second_moments, "_ROWS_A_COLUMN", 4)
    name = "model.layers.1.self_attn.o_proj.weight"
    moments = moments_of(tiny("llama"), tmp_path / "work")
    inputs = hooked_inputs(tiny("llama"), name, SUMMED)
    share = second_moments.row_share(7 * 200, inputs.shape[1])
    assert share > 1
    summed = inputs.reshape(len(SUMMED), 200, -1)
    # A micro-batch has two samples, where what is held out lets it.
    parts = [summed[:1], summed[1:3], summed[3:]]
    rows = np.concatenate([part.reshape(-1, inputs.shape[1])[::share] for part in parts]).astype(np.float64)
    expected = rows.T @ rows
    found = moments.load(moments.group(name, 0)).matrix
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_packing(tmp_path):
    for n in (1, 2, 5, 64, 300):
        matrix = np.random.default_rng(n).standard_normal((n, n)).astype(np.float32)
        matrix = matrix + matrix.T
        np.testing.assert_array_equal(unpack(pack(matrix)), matrix)
    assert second_moments.moment_bytes([300, 2]) == 4 * (pack(matrix).size + 3)


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
    with pytest.raises(ConvertError, match="index"):
        open_moments(tmp_path)
    write_moments(tmp_path, "a", np.eye(8, dtype=np.float32), np.ones((3, 8), np.float32))
    write_sealed(tmp_path / INDEX_NAME, "index", json.dumps({"t": ["a", None, "b"]}).encode())
    moments = open_moments(tmp_path)
    np.testing.assert_array_equal(moments.load("a").matrix, np.eye(8))
    assert moments.group("t", 1) is None
    with pytest.raises(ConvertError, match="cannot be read") as caught:
        moments.load("b")
    assert caught.value.where == str(tmp_path / "b.npz")
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:100])
    with pytest.raises(ConvertError, match="cannot be read"):
        moments.load("a")
    (tmp_path / INDEX_NAME).write_text("[1, 2")
    with pytest.raises(ConvertError, match="index"):
        open_moments(tmp_path)
