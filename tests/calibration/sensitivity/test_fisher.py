"""Fisher factors: of the whole model's squared gradients, true to the divergence that they predict, the same bytes
however they are computed, and refused where they cannot be."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from bitwright.calibration.control import Interrupted
from bitwright.calibration.sensitivity.fisher import FisherFactors, gradient_work_bytes, stream_fisher
from bitwright.calibration.sensitivity.gradient_sums import GradientSums
from bitwright.calibration.statistics.importance import PRIOR_ROWS
from bitwright.calibration.stream.checkpointing import STATE_NAME
from bitwright.calibration.text.corpus import Corpus
from bitwright.formats.errors import ConvertError
from tests.calibration.stream.streaming import (
    BreaksAt,
    DictSource,
    StopAfter,
    load_whole,
    on_cpu,
    random_corpus,
    stacked_names,
)
from tests.tiny_models import VOCAB_SIZE

SEED = 3
EMBEDDING = "model.embed_tokens.weight"


def fisher(directory: Path, work_dir: Path, *, source=None, corpus: Corpus | None = None, **options) -> FisherFactors:
    """The factors of every tensor, under the checkpoint's names."""
    source = source or DictSource.of(directory)
    sampling = {"seed": SEED} | {key: options.pop(key) for key in ("labels", "seed") if key in options}
    model, control = on_cpu(source, directory, work_dir, **{"threads": 2} | options)
    return stream_fisher(model, stacked_names(source.tensors), corpus or random_corpus(), control, **sampling)


def all_bytes(factors: FisherFactors) -> bytes:
    return b"".join(
        factors.rows[name].tobytes()
        + factors.columns[name].tobytes()
        + np.array(
            [factors.gradient_magnitude[name], factors.activation_variance[name], factors.weight_magnitude[name]]
        ).tobytes()
        for name in sorted(factors.rows)
    )


def whole_squares(directory: Path, corpus: Corpus) -> dict[str, np.ndarray]:
    """Squared gradients per label by autograd of the whole model, sequence after sequence: parameter -> float64 of the
    parameter's shape. "head", position after position, and "lookup" are the two uses of a tied embedding."""
    model = load_whole(directory)
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].detach().double()))
    embedding = model.get_input_embeddings().weight
    squares: dict[str, torch.Tensor] = {}
    for i, sample in enumerate(torch.from_numpy(corpus.tokens).long()):
        rows = embedding[sample].detach().requires_grad_()
        logits = model(inputs_embeds=rows[None], use_cache=False).logits[0]
        cumulated = logits.detach().double().softmax(-1).numpy().cumsum(axis=1)
        uniform = np.random.default_rng([SEED, i]).random(len(sample))
        labels = torch.from_numpy((cumulated <= uniform[:, None]).sum(axis=1))
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        by_logits = logits.detach().double().softmax(-1)
        by_logits[torch.arange(len(labels)), labels] -= 1
        found = {name: p.grad.double().square() for name, p in model.named_parameters() if p.grad is not None}
        found["head"] = by_logits.square().T @ seen[-1].square()
        found["lookup"] = torch.zeros(embedding.shape).index_add_(0, sample, rows.grad).double().square()
        for name, values in found.items():
            squares[name] = squares.get(name, 0) + values / corpus.tokens.size
    return {name: values.numpy() for name, values in squares.items()}


def with_every_token(name: str) -> Corpus:
    """Of which none has to be given a share of those that were seen once."""
    corpus = random_corpus(name, 8)
    corpus.tokens.flat[: 2 * VOCAB_SIZE] = np.arange(2 * VOCAB_SIZE) % VOCAB_SIZE
    return corpus


def assert_sums(factors: FisherFactors, name: str, squares: np.ndarray) -> None:
    """squares: [n_rows, n_columns], or [n_matrices, n_rows, n_columns]."""
    rows, columns = factors.rows[name], factors.columns[name]
    squares = squares.reshape(len(rows), rows.shape[1], columns.shape[1])
    for axis, streamed in ((2, rows * columns.sum(1, keepdims=True)), (1, columns * rows.sum(1, keepdims=True))):
        expected = squares.sum(axis)
        np.testing.assert_allclose(streamed, expected, rtol=1e-3, atol=1e-5 * expected.max(), err_msg=name)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_factors_have_the_sums_of_the_whole_models_squared_gradients(name, tiny, tmp_path):
    corpus, source = with_every_token(name), DictSource.of(tiny(name))
    factors = fisher(tiny(name), tmp_path, source=source, corpus=corpus)
    squares = whole_squares(tiny(name), corpus)
    squares |= {"lm_head.weight": squares["head"], EMBEDDING: squares["lookup"]}
    assert factors.rows.keys() == {tensor for tensor, weights in source.tensors.items() if weights.ndim > 1}
    for tensor in factors.rows:
        assert_sums(factors, tensor, squares[tensor])
        assert factors.gradient_magnitude[tensor] ** 2 == pytest.approx(squares[tensor].mean(), rel=1e-3)
        assert factors.weight_magnitude[tensor] == pytest.approx(np.abs(source.tensors[tensor]).mean(), rel=1e-6)


def test_tied_embedding_has_the_sums_of_both_its_uses(tiny, tmp_path):
    corpus = with_every_token("llama-tied")
    factors, squares = fisher(tiny("llama-tied"), tmp_path, corpus=corpus), whole_squares(tiny("llama-tied"), corpus)
    assert_sums(factors, EMBEDDING, squares["head"] + squares["lookup"])
    assert "lm_head.weight" not in factors.rows


def test_tokens_that_the_text_lacks_share_what_those_seen_once_have(tiny, tmp_path):
    corpus = random_corpus("llama", 3)
    factors, squares = fisher(tiny("llama"), tmp_path, corpus=corpus), whole_squares(tiny("llama"), corpus)["lookup"]
    counts = np.bincount(corpus.tokens.ravel(), minlength=VOCAB_SIZE)
    once, unseen = (counts == 1).sum() / counts.sum(), counts == 0
    assert 0 < once < 1
    squares[~unseen] *= 1 - once
    squares[unseen] = once * squares.sum(0) / (1 - once) / unseen.sum()
    assert_sums(factors, EMBEDDING, squares)


def test_experts_are_told_apart_and_gate_from_up(tiny, tmp_path):
    corpus = random_corpus("qwen3_moe", 3)
    factors, squares = fisher(tiny("qwen3_moe"), tmp_path, corpus=corpus), whole_squares(tiny("qwen3_moe"), corpus)
    model, counts = load_whole(tiny("qwen3_moe")), {}
    for layer in range(2):
        model.model.layers[layer].mlp.experts.register_forward_pre_hook(
            lambda _, args, layer=layer: counts.update({layer: np.bincount(args[1].ravel(), minlength=8)[:, None]})
        )
    with torch.inference_mode():
        model(torch.from_numpy(corpus.tokens).long())
    for layer, n in counts.items():
        stem = f"model.layers.{layer}.mlp.experts"
        gate, up = np.split(squares[f"{stem}.gate_up_proj"], 2, axis=1)
        for kind, own in (("gate", gate), ("up", up), ("down", squares[f"{stem}.down_proj"])):
            # What all tokens have shown counts as so many rows beside an expert's own.
            shrunk = (own + PRIOR_ROWS * own.sum(0) / n.sum()) * (n / (n + PRIOR_ROWS))[:, :, None]
            assert_sums(factors, f"{stem}.{kind}_proj.weight", shrunk)


def test_expert_that_no_token_reached_counts_as_reached_once():
    rows, columns = np.array([[60.0, 20.0], [0.0, 0.0]]), np.array([[20.0, 40.0, 20.0], [0.0, 0.0, 0.0]])
    row_factors, column_factors = GradientSums(rows, columns, np.array([[40], [0]]), 0.0).factors(n_labels=2)
    product = row_factors[1][:, None] * column_factors[1]
    np.testing.assert_allclose(product.sum(1), rows[0] / 40 / 2)
    np.testing.assert_allclose(product.sum(0), columns[0] / 40 / 2)


def test_matrix_without_gradients_has_factors_of_zero():
    rows, columns = GradientSums(np.zeros((1, 2)), np.zeros((1, 3)), np.array([[7]]), 0.0).factors(n_labels=2)
    assert not rows.any()
    assert not columns.any()


def test_experts_stored_stacked_are_the_same(tiny, tmp_path):
    one_by_one = fisher(tiny("qwen3_moe"), tmp_path / "one by one")
    source = DictSource.of(tiny("qwen3_moe"))
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        kinds = {
            kind: np.stack([source.tensors.pop(f"{stem}.{expert}.{kind}_proj.weight") for expert in range(8)])
            for kind in ("gate", "up", "down")
        }
        gate_up = np.concatenate([kinds["gate"], kinds["up"]], axis=1)
        source.tensors |= {f"{stem}.gate_up_proj": gate_up, f"{stem}.down_proj": kinds["down"]}
    stacked = fisher(tiny("qwen3_moe"), tmp_path / "stacked", source=DictSource(source.tensors))
    down = "model.layers.1.mlp.experts.down_proj"
    np.testing.assert_array_equal(stacked.rows[down], one_by_one.rows[f"{down}.weight"])
    np.testing.assert_array_equal(stacked.columns[down], one_by_one.columns[f"{down}.weight"])
    assert stacked.rows["model.layers.1.mlp.experts.gate_up_proj"].shape == (8, 64)


def test_biases_have_no_factors_and_change_no_shape(tiny, tmp_path):
    factors = fisher(tiny("llama-biases"), tmp_path)
    assert factors.rows["model.layers.0.self_attn.q_proj.weight"].shape == (1, 64)
    assert not any(name.endswith("bias") for name in factors.rows)


def test_small_errors_diverge_as_predicted(tiny, tmp_path):
    """Half the factors' product with the squared error is the KL divergence over all positions."""
    corpus, model = random_corpus("qwen3", 24), load_whole(tiny("qwen3"))
    factors = fisher(tiny("qwen3"), tmp_path, corpus=corpus)
    tokens, random, ratios = torch.from_numpy(corpus.tokens).long(), np.random.default_rng(0), {}
    with torch.inference_mode():
        source = model(tokens, use_cache=False).logits.double().log_softmax(-1)
        for kind in ("self_attn.v_proj", "self_attn.k_proj", "mlp.down_proj"):
            tensor = f"model.layers.0.{kind}.weight"
            weight = model.get_parameter(tensor)
            error = (random.standard_normal(weight.shape) * 0.002).astype(np.float32)
            weight += torch.from_numpy(error)
            candidate = model(tokens, use_cache=False).logits.double().log_softmax(-1)
            weight -= torch.from_numpy(error)
            measured = (source.exp() * (source - candidate)).sum(-1).mean().item()
            predicted = 0.5 * factors.rows[tensor][0] @ np.square(error, dtype=np.float64) @ factors.columns[tensor][0]
            ratios[tensor] = measured / predicted
    assert all(0.8 < ratio < 1.25 for ratio in ratios.values()), ratios


@pytest.mark.parametrize(("name", "labels", "n_layers"), [("gemma3", "sampled", 6), ("qwen3_moe", "text", 2)])
def test_stopped_after_every_layer_there_and_back_gives_the_same_bytes(name, labels, n_layers, tiny, tmp_path):
    whole = all_bytes(fisher(tiny(name), tmp_path / "whole", labels=labels))
    for _ in range(n_layers + 1 + n_layers):  # the layers up, the head, the layers down
        with pytest.raises(Interrupted):
            fisher(tiny(name), tmp_path / "work", labels=labels, should_stop=lambda: True)
    assert all_bytes(fisher(tiny(name), tmp_path / "work", labels=labels, should_stop=lambda: True)) == whole


@pytest.mark.parametrize("layer", range(2))
def test_resumed_after_a_failure_amid_a_layer_gives_the_same_bytes(layer, tiny, tmp_path):
    whole = all_bytes(fisher(tiny("qwen3_moe"), tmp_path / "whole"))
    with pytest.raises(Interrupted, match="after the output head"):
        fisher(tiny("qwen3_moe"), tmp_path / "work", should_stop=StopAfter(3))
    source = BreaksAt.of(tiny("qwen3_moe"))
    source.broken_name = f"model.layers.{layer}.mlp.experts.3.down_proj.weight"
    with pytest.raises(ConnectionError):
        fisher(tiny("qwen3_moe"), tmp_path / "work", source=source)
    # What the layer that was cut short has written is in the other file of gradients.
    torn = tmp_path / "work" / "backward" / f"hidden-{(2 - layer) % 2}.bin"
    torn.write_bytes(b"\xff" * 1000)
    assert all_bytes(fisher(tiny("qwen3_moe"), tmp_path / "work")) == whole


@pytest.mark.parametrize("name", ["gemma3", "qwen3_moe"])
def test_threads_change_no_byte(name, tiny, tmp_path):
    corpus = random_corpus(n_samples=7)
    single, two, many = (
        all_bytes(fisher(tiny(name), tmp_path / str(threads), corpus=corpus, threads=threads)) for threads in (1, 2, 8)
    )
    assert single == two == many


def test_in_bfloat16_it_is_nearly_the_same(tiny, tmp_path):
    corpus = random_corpus(n_samples=12)
    exact = fisher(tiny("llama"), tmp_path / "exact", corpus=corpus)
    single, two = (
        fisher(tiny("llama"), tmp_path / str(threads), corpus=corpus, dtype="bfloat16", threads=threads)
        for threads in (1, 2)
    )
    assert all_bytes(single) == all_bytes(two)
    for tensor, rows in exact.rows.items():
        assert single.rows[tensor].sum() == pytest.approx(rows.sum(), rel=0.2), tensor


def test_finished_run_leaves_its_sums_only_and_is_not_run_again(tiny, tmp_path):
    first = fisher(tiny("llama"), tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {f"forward/{STATE_NAME}", f"backward/{STATE_NAME}"}
    source = DictSource.of(tiny("llama"))
    assert all_bytes(fisher(tiny("llama"), tmp_path, source=source)) == all_bytes(first)
    assert set(source.reads.values()) <= {0, 1}  # their magnitudes


def test_space_on_disk_is_known_in_advance(tiny, tmp_path):
    corpus, used = random_corpus("llama"), []

    def watch() -> bool:
        used.append(sum(path.stat().st_size for path in tmp_path.rglob("hidden-*.bin")))
        return False

    fisher(tiny("llama"), tmp_path, corpus=corpus, should_stop=watch)
    assert max(used) == gradient_work_bytes(*corpus.tokens.shape, hidden_size=64, n_layers=2)


def test_progress_counts_tokens_up_to_all_there_and_back(tiny, tmp_path):
    seen, corpus = [], random_corpus()
    fisher(tiny("llama"), tmp_path, corpus=corpus, progress=lambda *report: seen.append(report))
    for stage in ("forward", "gradients"):
        done = [report[1] for report in seen if report[0] == stage]
        assert done == sorted(done)
        assert done[-1] == corpus.tokens.size


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"corpus": random_corpus(seed=1)}, "tokens"),
        ({"name": "another"}, "weights"),
        ({"labels": "text"}, "labels"),
        ({"seed": SEED + 1}, "seed"),
    ],
)
def test_checkpoint_of_another_run_is_refused(change, named, tiny, tmp_path):
    with pytest.raises(Interrupted):
        fisher(tiny("llama"), tmp_path, should_stop=StopAfter(4))
    with pytest.raises(ConvertError, match=f"another run's: {named} is"):
        fisher(tiny("llama"), tmp_path, **change)


def test_values_that_are_not_finite_stop_at_their_layer(tiny, tmp_path):
    source = DictSource.of(tiny("llama"))
    source.tensors["model.layers.1.self_attn.v_proj.weight"][3, 5] = np.nan
    with pytest.raises(ConvertError, match="not finite") as caught:
        fisher(tiny("llama"), tmp_path, source=source)
    assert "model.layers.1.self_attn.o_proj.weight" in caught.value.where


def test_gradients_that_are_not_finite_are_refused_by_name(tiny, tmp_path):
    source = DictSource.of(tiny("llama"))
    # Predictions are finite, and their gradients too large to be squared.
    source.tensors["lm_head.weight"] = source.tensors["lm_head.weight"] * np.float32(1e25)
    with pytest.raises(ConvertError, match="gradients are not finite") as caught:
        fisher(tiny("llama"), tmp_path, source=source, labels="text")
    assert caught.value.where.startswith("model.layers.1.mlp.down_proj.weight")


def test_predictions_that_are_not_finite_are_refused(tiny, tmp_path):
    source = DictSource.of(tiny("llama"))
    source.tensors["lm_head.weight"][7, 3] = np.inf
    with pytest.raises(ConvertError, match="gradients are not finite") as caught:
        fisher(tiny("llama"), tmp_path, source=source)
    assert caught.value.where == "lm_head.weight"


def test_full_disk_is_explained_and_survived(tiny, tmp_path, monkeypatch):
    whole = all_bytes(fisher(tiny("llama"), tmp_path / "whole"))
    with pytest.raises(Interrupted):
        fisher(tiny("llama"), tmp_path / "work", should_stop=StopAfter(4))

    def disk_full(*_) -> int:
        raise OSError(28, "No space left on device")

    for call in ("pwrite", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, disk_full)
            with pytest.raises(ConvertError, match=r"cannot be written \(No space left on device\)"):
                fisher(tiny("llama"), tmp_path / "work")
    assert all_bytes(fisher(tiny("llama"), tmp_path / "work")) == whole


def test_inputs_of_layers_cut_short_are_made_again(tiny, tmp_path):
    whole = all_bytes(fisher(tiny("llama"), tmp_path / "whole"))
    with pytest.raises(Interrupted):
        fisher(tiny("llama"), tmp_path / "work", should_stop=StopAfter(3))
    with (tmp_path / "work" / "forward" / "hidden-1.bin").open("r+b") as file:
        file.truncate(1000)
    assert all_bytes(fisher(tiny("llama"), tmp_path / "work")) == whole


def test_samples_of_one_token_are_refused(tiny, tmp_path):
    with pytest.raises(ConvertError, match="1 token"):
        fisher(tiny("llama"), tmp_path, corpus=Corpus(np.zeros((3, 1), np.int32), "short", "0" * 64))
