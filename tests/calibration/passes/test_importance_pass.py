"""Importance by streaming equals what hooks see in the whole model, for every architecture; bad models are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from bitwright.calibration.control import Interrupted
from bitwright.calibration.passes.importance_pass import stream_importance
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.calibration.text.corpus import Corpus, load_corpus
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from tests.calibration.stream.streaming import (
    DictSource,
    StopAfter,
    all_bytes,
    compute,
    load_whole,
    on_cpu,
    random_corpus,
    with_config,
)
from tests.tiny_models import TINY_MODELS


class HookedSums:
    """Sums of squared inputs and row counts by hooks on the modules of the whole model, keyed by parameter; experts are
    told apart by the router's own choice of tokens."""

    def __init__(self, model: nn.Module):
        self.sums: dict[str, np.ndarray] = {}
        self.counts: dict[str, np.ndarray] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) or name.endswith("mlp.gate"):
                module.register_forward_pre_hook(lambda _, args, name=name: self._add(f"{name}.weight", 0, 1, args[0]))
            elif name.endswith("mlp.experts"):
                module.register_forward_pre_hook(lambda module, args, name=name: self._add_experts(name, module, *args))

    def _add(self, name: str, matrix: int, n_matrices: int, inputs: torch.Tensor) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1]).double().numpy()
        self.sums.setdefault(name, np.zeros((n_matrices, rows.shape[1])))[matrix] += np.square(rows).sum(axis=0)
        self.counts.setdefault(name, np.zeros(n_matrices, int))[matrix] += len(rows)

    def _add_experts(self, name, module, hidden, top_k_index, top_k_weights) -> None:
        n_experts = module.num_experts
        for expert in range(n_experts):
            rows = hidden[(top_k_index == expert).any(dim=1)]
            gate, up = (rows @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
            self._add(f"{name}.gate_up_proj", expert, n_experts, rows)
            self._add(f"{name}.down_proj", expert, n_experts, module.act_fn(gate) * up)


# What the hooks call a parameter -> what the checkpoint calls the matrices that see the same inputs.
_STORED = {
    "qwen3_moe": {"gate_up_proj": ("gate_proj.weight", "up_proj.weight"), "down_proj": ("down_proj.weight",)},
    "mixtral": {"gate_up_proj": ("w1.weight", "w3.weight"), "down_proj": ("w2.weight",)},
}


def stored_names(architecture: str, parameter: str, tied: bool) -> list[str]:
    if parameter == "lm_head.weight" and tied:
        return ["model.embed_tokens.weight"]
    if architecture == "mixtral":
        parameter = parameter.replace(".mlp.", ".block_sparse_moe.")
    if ".experts." not in parameter:
        return [parameter]
    stem, _, kind = parameter.rpartition(".")
    return [f"{stem}.{part}" for part in _STORED[architecture][kind]]


def assert_equals_whole_model(directory: Path, work_dir: Path, corpus: Corpus) -> ImportanceMatrix:
    streamed = compute(directory, work_dir, corpus=corpus)
    model = load_whole(directory)
    hooked = HookedSums(model)
    with torch.inference_mode():
        model(torch.from_numpy(corpus.tokens).long(), use_cache=False)
    config = model.config
    expected = {
        stored: parameter
        for parameter in hooked.sums
        for stored in stored_names(config.model_type, parameter, config.tie_word_embeddings)
    }
    assert set(streamed.sums) == set(expected)
    for stored, parameter in expected.items():
        np.testing.assert_array_equal(streamed.counts[stored], hooked.counts[parameter], err_msg=stored)
        reference = hooked.sums[parameter]
        np.testing.assert_allclose(streamed.sums[stored], reference, rtol=1e-4, atol=1e-6 * reference.max())
    return streamed


@pytest.mark.parametrize("name", TINY_MODELS)
def test_streamed_equals_hooks_on_the_whole_model(name, tiny, tmp_path):
    corpus = random_corpus(name)
    streamed = assert_equals_whole_model(tiny(name), tmp_path / "work", corpus)
    assert (streamed.samples, streamed.sequence_length) == corpus.tokens.shape


def test_sliding_window_is_the_models_own(tiny, tmp_path):
    narrow = with_config(tiny("mistral"), tmp_path / "narrow", sliding_window=8)
    streamed = assert_equals_whole_model(narrow, tmp_path / "work", random_corpus("mistral"))
    full = compute(tiny("mistral"), tmp_path / "full", corpus=random_corpus("mistral"))
    inputs = "model.layers.0.self_attn.o_proj.weight"
    assert not np.allclose(streamed.sums[inputs], full.sums[inputs], rtol=0.01)


def test_text_model_inside_a_larger_model_is_found_under_its_prefix(tiny, tmp_path):
    plain = compute(tiny("gemma3"), tmp_path / "plain")
    inner = DictSource({f"language_model.{n}": t for n, t in DictSource.of(tiny("gemma3")).tensors.items()})
    inner.tensors["vision_tower.encoder.layers.0.mlp.fc1.weight"] = np.zeros((4, 4), np.float32)
    prefixed = compute(tiny("gemma3"), tmp_path / "prefixed", source=inner)
    assert set(prefixed.sums) == {f"language_model.{name}" for name in plain.sums}
    for name, sums in plain.sums.items():
        np.testing.assert_array_equal(prefixed.sums[f"language_model.{name}"], sums)


def test_experts_stored_stacked_are_the_same(tiny, tmp_path):
    one_by_one = compute(tiny("qwen3_moe"), tmp_path / "one by one")
    source = DictSource.of(tiny("qwen3_moe"))
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            np.stack([source.tensors.pop(f"{stem}.{expert}.{kind}_proj.weight") for expert in range(8)])
            for kind in ("gate", "up", "down")
        )
        source.tensors |= {f"{stem}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{stem}.down_proj": down}
    source.reads = dict.fromkeys(source.tensors, 0)
    stacked = compute(tiny("qwen3_moe"), tmp_path / "stacked", source=source)
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        for theirs, ours in (("up_proj.weight", "gate_up_proj"), ("down_proj.weight", "down_proj")):
            np.testing.assert_array_equal(stacked.sums[f"{stem}.{ours}"], one_by_one.sums[f"{stem}.{theirs}"])
            np.testing.assert_array_equal(stacked.counts[f"{stem}.{ours}"], one_by_one.counts[f"{stem}.{theirs}"])


def test_each_weight_is_read_once_and_the_head_never(tiny, tmp_path):
    source = DictSource.of(tiny("qwen3_moe"))
    compute(tiny("qwen3_moe"), tmp_path / "work", source=source)
    assert {n for name, n in source.reads.items() if ".layers." in name} == {1}
    assert {name for name, n in source.reads.items() if n == 0} == {"lm_head.weight"}


def test_missing_weight_is_named(tiny, tmp_path):
    source = DictSource.of(tiny("llama"))
    del source.tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ConvertError, match="checkpoint lacks") as caught:
        compute(tiny("llama"), tmp_path / "work", source=source)
    assert caught.value.where == "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("shape", [(95, 64), (97, 64), (96, 63)])
def test_weight_of_another_shape_is_named(tiny, tmp_path, shape):
    source = DictSource.of(tiny("llama"))
    source.tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros(shape, np.float32)
    with pytest.raises(ConvertError, match="values are stored for a place of") as caught:
        compute(tiny("llama"), tmp_path / "work", source=source)
    assert caught.value.where == "model.layers.1.mlp.up_proj.weight"


def test_values_that_are_not_finite_stop_at_their_layer(tiny, tmp_path):
    source = DictSource.of(tiny("llama"))
    source.tensors["model.layers.1.self_attn.v_proj.weight"][3, 5] = np.nan
    with pytest.raises(ConvertError, match="not finite") as caught:
        compute(tiny("llama"), tmp_path / "work", source=source)
    assert "model.layers.1.self_attn.o_proj.weight" in caught.value.where


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3"])
def test_in_bfloat16_it_is_nearly_the_same(name, tiny, tmp_path):
    corpus = random_corpus(name, 6)
    exact = compute(tiny(name), tmp_path / "exact", corpus=corpus)
    single, many = (
        compute(tiny(name), tmp_path / str(threads), corpus=corpus, dtype="bfloat16", threads=threads)
        for threads in (1, 3)
    )
    assert all_bytes(single) == all_bytes(many)
    dense = {tensor for tensor, counts in exact.counts.items() if len(counts) == 1}  # a router may choose otherwise
    for tensor in dense:
        np.testing.assert_array_equal(single.counts[tensor], exact.counts[tensor])
        off = np.abs(single.sums[tensor] - exact.sums[tensor]).sum() / exact.sums[tensor].sum()
        assert 0 < off < 0.05, tensor


def test_a_checkpoint_of_another_dtype_is_refused(tiny, tmp_path):
    with pytest.raises(Interrupted):
        compute(tiny("llama"), tmp_path, should_stop=StopAfter(1))
    with pytest.raises(ConvertError, match="dtype"):
        compute(tiny("llama"), tmp_path, dtype="bfloat16")


def test_device_that_is_absent_is_refused(tiny, tmp_path):
    absent = "mps" if torch.cuda.is_available() else "cuda"
    source = DictSource.of(tiny("llama"))
    with pytest.raises(ConvertError, match=f"no device '{absent}'"):
        model, control = on_cpu(source, tiny("llama"), tmp_path / "work", device=absent)
        stream_importance(model, {}, random_corpus(), control)


def test_directory_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(ConvertError, match="cannot read the model's configuration"):
        compute(tmp_path, tmp_path / "work", source=DictSource({}))


def test_of_the_real_model(smollm2_wide, tmp_path):
    """The whole of SmolLM2, 768 wide, on real text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_wide)
    corpus = load_corpus("embedded", tokenizer, samples=4, sequence_length=128)
    assert_equals_whole_model(smollm2_wide, tmp_path / "work", corpus)


def test_a_weight_that_is_no_number_is_found_by_its_name_when_it_is_read(tiny, tmp_path):
    """Before it makes the model compute something that is no number elsewhere."""
    copy = with_config(tiny("llama-biases"), tmp_path / "model")
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.1.mlp.gate_proj.bias"][9] = torch.inf
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConvertError, match="the weight inf is not a finite number") as caught:
        compute(copy, tmp_path / "work", source=open_checkpoint(str(copy)))
    assert "tensor model.layers.1.mlp.gate_proj.bias, row 0, column 9" in caught.value.where
