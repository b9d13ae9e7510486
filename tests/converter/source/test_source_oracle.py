"""transformers is the truth about a checkpoint: what the source side of `evaluate` computes of a directory is what
`from_pretrained` makes of it, or the directory is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bitwright.calibration.control import PassControl
from bitwright.calibration.stream.forward import LayerStream
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.converter.judge.llama_cpp import LlamaCpp
from bitwright.converter.measure.running import runnable
from bitwright.converter.model.model_map import describe
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.profiles.vocabulary import Role
from tests import tiny_models
from tests.converter.artifact.f32_file import write_f32
from tests.tiny_models import TINY_MODELS, VOCAB_SIZE

Weights = dict[str, torch.Tensor]
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def transformers_logits(directory: Path, tokens: np.ndarray) -> np.ndarray:
    """float32 [n_tokens, n_vocabulary]: what AutoModelForCausalLM computes of the directory."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.from_numpy(tokens)).logits[0].numpy()


def our_logits(directory: Path, tokens: np.ndarray, work_dir: Path) -> np.ndarray:
    """float32 [n_tokens, n_vocabulary]: what the source side of `evaluate` computes of it."""
    checkpoint = open_checkpoint(str(directory))
    checkpoint, _ = runnable(checkpoint, describe(checkpoint), work_dir)
    model = StreamableModel(checkpoint, checkpoint.location, device="cpu", dtype="float32")
    stream = LayerStream(model, tokens, PassControl(work_dir / "stream"))
    stream.run()
    with torch.inference_mode(), stream.head() as head:
        return head(stream.hidden_states(0, 1)[0]).numpy()


def assert_same(directory: Path, work_dir: Path, n_tokens: int = 48, oracle: Path | None = None) -> np.ndarray:
    """That both compute the same, to 1e-5 of its size, which they return; oracle: another directory to ask."""
    tokens = np.random.default_rng(7).integers(3, VOCAB_SIZE, (1, n_tokens))
    expected, found = transformers_logits(oracle or directory, tokens), our_logits(directory, tokens, work_dir)
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
    return found


def edit_config(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(edit(config) or config))


def edit_weights(directory: Path, edit: Callable[[Weights], Weights]) -> None:
    save_file(edit(load_file(directory / SINGLE)), directory / SINGLE, {"format": "pt"})


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_tiny_model(name: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    assert_same(tiny(name), tmp_path, TINY_MODELS[name].n_tokens)


def random_head(weights: Weights, name: str = HEAD, embedding: str = EMBEDDING) -> Weights:
    noise = torch.randn(weights[embedding].shape, generator=torch.Generator().manual_seed(1)) / 8
    return {**weights, name: noise.to(weights[embedding].dtype)}


# One model of every architecture, in one file.
OF_EVERY_ARCHITECTURE = ["llama-biases", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma3", "phi3"]


@pytest.mark.parametrize(("name", "tied"), [*((name, True) for name in OF_EVERY_ARCHITECTURE), ("gemma3", False)])
def test_a_stored_head_is_used_whatever_the_configuration_says(name: str, tied: bool, tmp_path: Path) -> None:
    directory = tmp_path / name
    tiny_models.build(name, directory)
    edit_config(directory, lambda config: config.update(tie_word_embeddings=tied))
    edit_weights(directory, random_head)
    model_map = describe(open_checkpoint(str(directory)))
    assert model_map.tensors[-1].role is Role.OUTPUT
    assert any("a head that differs from it is stored" in note for note in model_map.notes) == tied
    assert_same(directory, tmp_path)


@pytest.mark.parametrize("name", ["llama-biases", "gemma3"])
def test_a_tied_head_that_is_stored_too_is_the_embedding(name: str, tmp_path: Path) -> None:
    directory = tmp_path / name
    tiny_models.build(name, directory)
    edit_config(directory, lambda config: config.update(tie_word_embeddings=True))
    edit_weights(directory, lambda weights: {**weights, HEAD: weights[EMBEDDING].clone()})
    model_map = describe(open_checkpoint(str(directory)))
    assert (model_map.tensors[-1].role, model_map.source_notes) == (Role.NORM, ())
    assert_same(directory, tmp_path)


@pytest.mark.parametrize("name", ["llama-biases", "qwen2", "gemma3"])
def test_llama_cpp_computes_with_the_stored_head(name: str, tmp_path: Path) -> None:
    directory = tmp_path / name
    tiny_models.build(name, directory)
    edit_config(directory, lambda config: config.update(tie_word_embeddings=True))
    edit_weights(directory, random_head)
    write_f32(directory, tmp_path / "model.gguf")
    tokens = np.random.default_rng(7).integers(3, VOCAB_SIZE, (1, 48))
    with LlamaCpp(tmp_path / "model.gguf", n_ctx=64, n_threads=1) as model:
        found = model.logits(tokens[0].tolist())
    expected = transformers_logits(directory, tokens)
    assert np.linalg.norm(found - expected) <= 1e-3 * np.linalg.norm(expected)


def differs_in_the_last_value(weights: Weights) -> Weights:
    head = weights[EMBEDDING].clone()
    head[-1, -1] += 0.5
    return {**weights, HEAD: head}


def stored_by_another_dtype(weights: Weights) -> Weights:
    return {**weights, HEAD: weights[EMBEDDING].float()}


@pytest.mark.parametrize("edit", [differs_in_the_last_value, stored_by_another_dtype])
def test_only_the_same_bytes_are_the_same_head(edit: Callable[[Weights], Weights], tmp_path: Path) -> None:
    directory = tmp_path / "model"
    tiny_models.build("llama-tied", directory)  # in F16
    edit_weights(directory, edit)
    assert describe(open_checkpoint(str(directory))).tensors[-1].role is Role.OUTPUT
    assert_same(directory, tmp_path)


# Of an image-and-text model as versions of transformers have written it: beginning of the body's names, and the head.
LARGER_MODELS = [
    ("language_model.model.", "language_model.lm_head.weight"),
    ("model.language_model.", HEAD),
    ("model.language_model.model.", HEAD),
]


def make_larger(directory: Path, prefix: str, head: str | None, whole: bool | None, text: bool) -> None:
    """Gemma 3 with an image encoder; head: its name, None for none; whole, text: what either part of the configuration
    says of tying."""
    tiny_models.build("gemma3", directory)

    def rename(weights: Weights) -> Weights:
        renamed = {prefix + name.removeprefix("model."): tensor for name, tensor in weights.items() if name != HEAD}
        return renamed if head is None else random_head(renamed, head, f"{prefix}embed_tokens.weight")

    edit_weights(directory, rename)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    edit_config(
        directory,
        lambda config: {
            "model_type": "gemma3",
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": {**config, "tie_word_embeddings": text},
            "vision_config": {**sizes, "image_size": 28, "patch_size": 14},
            **({} if whole is None else {"tie_word_embeddings": whole}),
        },
    )


@pytest.mark.parametrize(
    ("prefix", "head", "stored", "whole", "text"),
    [
        *((*names, True, None, True) for names in LARGER_MODELS),
        *((*names, False, None, False) for names in LARGER_MODELS),
        (*LARGER_MODELS[1], True, False, True),
        (*LARGER_MODELS[1], True, True, False),
        (*LARGER_MODELS[1], False, True, False),
        (*LARGER_MODELS[1], False, False, True),
    ],
)
def test_the_text_model_of_a_larger_one(
    prefix: str, head: str, stored: bool, whole: bool | None, text: bool, tmp_path: Path
) -> None:
    make_larger(tmp_path / "model", prefix, head if stored else None, whole, text)
    if not stored and whole is False:  # transformers would make up a head
        with pytest.raises(ConvertError, match="the model has no head"):
            describe(open_checkpoint(str(tmp_path / "model")))
    else:
        assert_same(tmp_path / "model", tmp_path)


def test_a_single_file_comes_before_an_index(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    tiny_models.build("llama", directory)
    before = assert_same(directory, tmp_path / "shards")
    shards = {name: tensor for path in directory.glob("model-*") for name, tensor in load_file(path).items()}
    shards["model.norm.weight"] = shards["model.norm.weight"] * 2
    save_file(shards, directory / SINGLE, {"format": "pt"})
    after = assert_same(directory, tmp_path / "single")
    assert not np.allclose(before, after)
    notes = describe(open_checkpoint(str(directory))).notes
    assert [note for note in notes if INDEX in note] == [
        f"{SINGLE} is read, as transformers does, and neither {INDEX} beside it nor the shards it names"
    ]


def shards_of(directory: Path) -> tuple[dict[str, Any], list[Path]]:
    tiny_models.build("llama", directory)
    return json.loads((directory / INDEX).read_text()), sorted(directory.glob("model-*.safetensors"))


def add_tensor(path: Path, name: str, tensor: torch.Tensor) -> None:
    save_file({**load_file(path), name: tensor}, path, {"format": "pt"})


def test_a_shard_is_read_whole_even_where_the_index_leaves_something_out(tmp_path: Path) -> None:
    index, _ = shards_of(tmp_path / "model")
    del index["weight_map"]["model.norm.weight"]
    (tmp_path / "model" / INDEX).write_text(json.dumps(index))
    assert_same(tmp_path / "model", tmp_path)


def test_of_two_shards_with_a_tensor_the_last_one_counts(tmp_path: Path) -> None:
    index, paths = shards_of(tmp_path / "model")
    name = next(name for name, shard in index["weight_map"].items() if shard == paths[1].name)
    add_tensor(paths[0], name, load_file(paths[1])[name] * 2)
    assert_same(tmp_path / "model", tmp_path)


def test_an_index_that_contradicts_its_shards_is_refused(tmp_path: Path) -> None:
    index, paths = shards_of(tmp_path / "model")
    name = next(name for name, shard in index["weight_map"].items() if shard == paths[0].name)
    add_tensor(paths[1], name, load_file(paths[0])[name] * 2)
    with pytest.raises(ConvertError, match=f"gives '{name}' to {paths[0].name}, .* reads it from {paths[1].name}"):
        open_checkpoint(str(tmp_path / "model"))


def as_automodel_saves(weights: Weights) -> Weights:
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}


def with_the_head_alone(weights: Weights) -> Weights:
    return {HEAD if name == EMBEDDING else name: tensor for name, tensor in weights.items()}


def with_buffers(weights: Weights) -> Weights:
    buffers: Weights = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(8) for i in range(2)}
    return {**weights, **buffers, "model.position_ids": torch.arange(40)[None]}


def with_fused_experts(weights: Weights) -> Weights:
    """Mixtral's as transformers 5 holds them."""
    fused = {
        name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in weights.items() if ".experts." not in name
    }
    for layer in range(2):
        stem = f"model.layers.{layer}.block_sparse_moe.experts"
        experts = {
            part: torch.stack([weights[f"{stem}.{i}.{part}.weight"] for i in range(4)]) for part in ("w1", "w2", "w3")
        }
        fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([experts["w1"], experts["w3"]], 1)
        fused[f"model.layers.{layer}.mlp.experts.down_proj"] = experts["w2"]
    return fused


def as_mlp(weights: Weights) -> Weights:
    return {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("llama-tied", as_automodel_saves),
        ("llama-biases", as_automodel_saves),  # with a head
        ("llama-tied", with_the_head_alone),
        ("llama-tied", with_buffers),
        ("mixtral", with_fused_experts),
        ("mixtral", as_mlp),
    ],
)
def test_names_that_transformers_reads(
    name: str, edit: Callable[[Weights], Weights], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    tiny_models.build(name, directory)
    edit_weights(directory, edit)
    assert_same(directory, tmp_path)
    plain, edited = (describe(open_checkpoint(str(path))) for path in (tiny(name), directory))
    # Written directories have these names, too: no runtime knows the others.
    assert [(t.name, t.sources) for t in edited.tensors] == [(t.name, t.sources) for t in plain.tensors]


def test_another_name_of_the_activation(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    tiny_models.build("llama-tied", directory)
    edit_config(directory, lambda config: config.update(hidden_act="swish"))
    assert_same(directory, tmp_path)


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
def test_biases_that_transformers_leaves_out_are_refused(key: str, tmp_path: Path) -> None:
    tiny_models.build("llama-biases", tmp_path)
    edit_config(tmp_path, lambda config: config.update({key: False}))
    with pytest.raises(
        ConvertError, match=rf"has 'model\.layers\.0\..*\.bias', and the configuration has {key} = False"
    ):
        describe(open_checkpoint(str(tmp_path)))


LEFTOVERS = [
    {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]},
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "gptq", "bits": 4, "group_size": 32},
    {"quant_method": "compressed-tensors", "config_groups": {}},
]


@pytest.mark.parametrize(
    ("quantization", "part"), [*((leftover, "whole") for leftover in LEFTOVERS), (LEFTOVERS[0], "text_config")]
)
def test_a_quantization_that_is_only_stated(
    quantization: dict[str, Any], part: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """transformers quantizes such weights anew or fails; what they are is what it computes without the statement."""
    directory, without = tmp_path / "model", tmp_path / "without"
    if part == "whole":
        tiny_models.build("llama-tied", directory)
    else:
        make_larger(directory, "model.language_model.", None, None, text=True)
    shutil.copytree(directory, without)
    edit_config(
        directory,
        lambda config: (config if part == "whole" else config["text_config"]).update(quantization_config=quantization),
    )
    assert_same(directory, tmp_path, oracle=without)
    (note,) = describe(open_checkpoint(str(directory))).source_notes
    assert f"calls the model quantized ({quantization['quant_method']})" in note
    dtype = "F16" if part == "whole" else "F32"
    assert re.search(f"stored whole, in {dtype}: they are converted as they are", note)


def test_a_gguf_of_gemma_computes_with_the_scale_that_llama_cpp_takes(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """transformers' reader of GGUF leaves its default there, which is that of other sizes."""
    write_f32(tiny("gemma3"), tmp_path / "model.gguf")
    checkpoint = open_checkpoint(str(tmp_path / "model.gguf"))
    opened, _ = runnable(checkpoint, describe(checkpoint), tmp_path)
    tokens = np.random.default_rng(7).integers(3, VOCAB_SIZE, (1, 48))
    expected, found = (transformers_logits(path, tokens) for path in (tiny("gemma3"), opened.location))
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
