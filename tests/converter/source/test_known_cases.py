"""What is no causal language model in transformers' own layout is named as what it is, with what mends it."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitwright.converter.model.model_map import describe
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.profiles.vocabulary import ModelMap
from tests import tiny_models

Weights = dict[str, torch.Tensor]


def build(directory: Path, name: str = "llama-tied") -> Path:
    tiny_models.build(name, directory)
    return directory


def edit_weights(directory: Path, edit: Callable[[Weights], Weights]) -> None:
    path = directory / "model.safetensors"
    save_file(edit(load_file(path)), path, {"format": "pt"})


def prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


def added(name: str, dtype: torch.dtype = torch.float32) -> Callable[[Weights], Weights]:
    return lambda weights: {**weights, name: torch.zeros(8, 8, dtype=dtype)}


def without(expression: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if not re.search(expression, name)}


def described(directory: Path) -> ModelMap:
    return describe(open_checkpoint(str(directory)))


def refusal(directory: Path) -> ConvertError:
    with pytest.raises(ConvertError) as caught:
        described(directory)
    assert str(directory) in caught.value.where
    return caught.value


def run_remedy(remedy: str, directory: Path) -> None:
    """Runs the command of a remedy as it is printed."""
    command = shlex.split(remedy[remedy.index("python -c") :])
    finished = subprocess.run(
        [sys.executable, *command[1:3]], cwd=directory, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (prefixed("_orig_mod."), r"begin with _orig_mod\., as torch\.compile makes them"),
        (prefixed("module."), r"begin with module\., as torch's DistributedDataParallel"),
        (prefixed("base_model.model."), "an adapter is part of the weights, and not merged"),
        (added("model.layers.0.self_attn.q_proj.lora_A.default.weight"), "an adapter is part of the weights"),
        (added("model.layers.0.mlp.up_proj.weight_scale"), "quantized already: .*weight_scale"),
        (added("model.some_buffer", torch.int64), r"^1 tensors are unknown to .* the first is 'model\.some_buffer'"),
        (added("model.layers.0.mlp.up_proj.weight_packed", torch.int32), "in codes, and .*weight_scale' is missing"),
        (added("score.weight"), r"classifies texts and generates none.*'score\.weight'"),
        (added("v_head.summary.weight"), r"a head for values .*'v_head\.summary\.weight'"),
        (added("model.layers.2.mlp.up_proj.weight"), "has 2 layers, and more are stored"),
        (
            without(r"^model\.layers\.1\."),
            "has num_hidden_layers = 2, and not all are stored: 'model.layers.1.input_layernorm.weight'",
        ),
        (
            without(r"layers\.1\.mlp\.up_proj"),
            r"^the checkpoint lacks the tensor 'model\.layers\.1\.mlp\.up_proj\.weight'$",
        ),
        (added("model.extra.weight"), r"^1 tensors are unknown to the architecture llama, the first is 'model\.extra"),
    ],
)
def test_names_say_what_it_is(edit: Callable[[Weights], Weights], what: str, tmp_path: Path) -> None:
    edit_weights(build(tmp_path / "model"), edit)
    assert re.search(what, refusal(tmp_path / "model").what)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("mtp.fc.weight", "the layers that predict several tokens at once (MTP)"),
        ("model.visual.merger.weight", "the image encoder"),
        ("vision_tower.blocks.0.weight", "the image encoder"),
        ("model.audio_tower.layers.0.weight", "the audio encoder"),
    ],
)
def test_what_a_text_model_does_without_is_left_out_and_said(name: str, what: str, tmp_path: Path) -> None:
    edit_weights(build(tmp_path / "model"), added(name))
    model_map = described(tmp_path / "model")
    assert f"left out: {what} (1 tensors)" in model_map.gguf_notes and not model_map.source_notes


def test_a_model_without_its_head(tmp_path: Path) -> None:
    edit_weights(build(tmp_path / "model", "llama-biases"), without("lm_head"))
    error = refusal(tmp_path / "model")
    assert error.what.startswith("the model has no head, and its head is not tied to the embedding")
    assert '"tie_word_embeddings": true' in error.remedy


def test_names_that_are_missing_and_others_in_their_place(tmp_path: Path) -> None:
    def rename(weights: Weights) -> Weights:
        return {name.replace("layers.1.mlp.up_proj", "layers.1.mlp.w3"): tensor for name, tensor in weights.items()}

    edit_weights(build(tmp_path / "model"), rename)
    what = refusal(tmp_path / "model").what
    assert what == (
        "the checkpoint lacks the tensor 'model.layers.1.mlp.up_proj.weight', and has 'model.layers.1.mlp.w3.weight',"
        " which belongs to no place"
    )


def test_the_command_that_takes_a_prefix_off(tmp_path: Path) -> None:
    prefix, directory = "_orig_mod.", build(tmp_path / "model")
    before = described(directory).tensors
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    shards = {"a.safetensors": sorted(weights)[:9], "b.safetensors": sorted(weights)[9:]}
    for shard, names in shards.items():
        save_file({prefix + name: weights[name] for name in names}, directory / shard, {"format": "pt"})
    weight_map = {prefix + name: shard for shard, names in shards.items() for name in names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    run_remedy(refusal(directory).remedy, tmp_path)
    assert described(directory).tensors == before


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "mixtral"])
@pytest.mark.parametrize("prefix", ["transformer.", "model.model.", "_fsdp_wrapped_module.model."])
def test_other_beginnings_and_the_command_that_renames(name: str, prefix: str, tmp_path: Path) -> None:
    directory = build(tmp_path / "model", name)
    before = described(directory).tensors
    edit_weights(directory, lambda weights: {re.sub(r"^model\.", prefix, key): value for key, value in weights.items()})
    error = refusal(directory)
    assert error.what.startswith(f"the names begin with {prefix}, and transformers' begin with model.: '{prefix}")
    run_remedy(error.remedy, tmp_path)
    assert described(directory).tensors == before


def test_the_command_that_leaves_out_what_transformers_does(tmp_path: Path) -> None:
    directory = build(tmp_path / "model")
    before = described(directory).tensors
    edit_weights(directory, added("v_head.summary.weight"))
    run_remedy(refusal(directory).remedy, tmp_path)
    assert described(tmp_path / "copy").tensors == before


@pytest.mark.parametrize(
    ("dtype", "stated", "what"),
    [
        (torch.float8_e4m3fn, {"quant_method": "fp8"}, r"is stored in codes, and '.*' or '.*' is missing"),
        (torch.uint8, {"quant_method": "bitsandbytes"}, r"by bitsandbytes: '.*' is stored as U8 \(packed bytes, as of"),
        (
            torch.int32,
            None,
            r"already: 'model.layers.0.mlp.up_proj.weight' is stored as I32 \(packed integers, as of GPTQ",
        ),
        (torch.int8, {}, r"already: '.*' is stored as I8 \(8-bit integers\)"),
        (torch.bool, None, r"already: '.*' is stored as BOOL;"),
    ],
)
def test_weights_that_are_quantized(
    dtype: torch.dtype, stated: dict[str, str] | None, what: str, tmp_path: Path
) -> None:
    directory = build(tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(directory, lambda weights: {**weights, name: torch.ones(weights[name].shape).to(dtype)})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    assert re.search(what, refusal(directory).what)


ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"})


def test_an_adapter_beside_the_model(tmp_path: Path) -> None:
    (build(tmp_path / "model") / "adapter_config.json").write_text(ADAPTER)
    error = refusal(tmp_path / "model")
    assert error.what.startswith("an adapter lies beside the model, and transformers loads both")
    assert "take adapter_config.json out" in error.remedy
    assert f"bitwright ADAPTER --base {tmp_path / 'model'}" in error.remedy


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("params.json", "these are the weights in their maker's own format (params.json, consolidated.*)"),
        ("model-F16.gguf", "the directory has no config.json, and holds GGUF files"),
        ("other.json", "the directory has no config.json"),
    ],
)
def test_directories_without_a_configuration(file: str, what: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("{}")
    error = refusal(tmp_path)
    assert error.what.startswith(what)
    assert file not in ("model-F16.gguf",) or error.remedy == f"name one of its files: {tmp_path / file}"


def test_weights_in_their_makers_own_format_beside_a_configuration(tmp_path: Path) -> None:
    directory = build(tmp_path / "model")
    (directory / "model.safetensors").rename(directory / "consolidated.safetensors")
    error = refusal(directory)
    assert error.what.startswith("these are the weights in their maker's own format")
    assert "convert_mistral_weights_to_hf.py" in error.remedy


def test_weights_that_the_configuration_names_itself(tmp_path: Path) -> None:
    config = json.loads((build(tmp_path / "model") / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    assert refusal(tmp_path / "model").what.endswith("names other weights than its directory has: 'other.safetensors'")


def test_two_names_for_one_place(tmp_path: Path) -> None:
    edit_weights(
        build(tmp_path / "model"), lambda weights: {**weights, "norm.weight": weights["model.norm.weight"] * 2}
    )
    error = refusal(tmp_path / "model")
    assert re.search(r"'(model\.)?norm\.weight' and '(model\.)?norm\.weight' are stored for the same place", error.what)
