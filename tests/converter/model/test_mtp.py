"""Layers that predict several tokens: what is kept of them, and that llama.cpp drafts with them as transformers' own
modules compute them."""

import json
import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from torch import nn

from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.converter.gguf.target import refuse_starved
from bitwright.converter.judge.llama_cpp import LlamaCpp
from bitwright.converter.measure.calibrate import observed_names
from bitwright.converter.measure.evidence import matrices_of
from bitwright.converter.model.model_map import describe
from bitwright.converter.model.module_map import describe_for_directory, describe_modules
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.profiles.planning.assign import assign
from bitwright.profiles.planning.summary import mtp_lines
from bitwright.profiles.reading.rules import parse_override
from bitwright.profiles.reading.schema import load_profile
from bitwright.profiles.vocabulary import ModelMap, Role, TensorSpec
from tests import tiny_models
from tests.converter.artifact.f32_file import write_f32
from tests.converter.commands import PLAIN, TEXT, convert, done, refused
from tests.converter.model.llama_cpp_mtp import drafted_logits
from tests.tiny_architectures import ALL_TINY_MODELS

Tiny = Callable[[str], Path]

N_TOKENS = 60
# Of one layer that is like the one that predicts several tokens.
ONE_LAYER: dict[str, dict[str, Any]] = {
    "qwen3_5-mtp": {"layer_types": ["full_attention"]},
    "qwen3_5_moe": {"layer_types": ["full_attention"]},
    "qwen3_next": {"layer_types": ["full_attention"]},
    "glm4_moe": {"first_k_dense_replace": 0},
    "glm4_moe_lite": {"mlp_layer_types": ["sparse"]},
    # Only layers with a window have a rotary embedding, as this one has: no text here is longer than it.
    "cohere2_moe": {"layer_types": ["sliding_attention"], "mlp_layer_types": ["sparse"]},
}
# What the checkpoints of some call the parts that others store in a layer after the others.
PARTS = {"fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm", "norm": "shared_head.norm"}


def stored_parts(name: str) -> dict[str, torch.Tensor]:
    """The tensors of the layer that predicts several tokens, by their names in it."""
    directory = tiny_models.checkpoint(name, ALL_TINY_MODELS[name])
    n_layers = json.loads((directory / "config.json").read_text())
    n_layers = n_layers.get("text_config", n_layers)["num_hidden_layers"]
    parts = {}
    for stored, tensor in load_file(directory / "model.safetensors").items():
        if match := re.match(rf"(?:mtp\.layers\.0|model\.layers\.{n_layers})\.(.*)", stored):
            parts[match[1]] = tensor
        elif match := re.fullmatch(r"mtp\.(\w+)\.weight", stored):
            parts[f"{PARTS[match[1]]}.weight"] = tensor
    return parts


def one_layer_model(name: str, parts: dict[str, torch.Tensor], head: torch.Tensor, directory: Path) -> Any:
    """transformers' model of the layer alone, which ends in its norm and its head; its embedding takes no part."""
    config = tiny_models.configuration(ALL_TINY_MODELS[name]).get_text_config()
    for key, value in {"num_hidden_layers": 1, "tie_word_embeddings": False, **ONE_LAYER[name]}.items():
        setattr(config, key, value)
    config.architectures = None
    config.save_pretrained(directory)
    tensors = {
        f"model.layers.0.{part}": tensor
        for part, tensor in parts.items()
        if not re.match(r"(eh_proj|[eh]norm|embed_tokens|shared_head)\.", part)
    }
    tensors["model.embed_tokens.weight"] = head.clone()
    tensors["model.norm.weight"] = parts["shared_head.norm.weight"]
    tensors["lm_head.weight"] = parts.get("shared_head.head.weight", head)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def norm_with(norm: nn.Module, weight: torch.Tensor) -> nn.Module:
    """Another norm of the same kind."""
    norm = deepcopy(norm)
    norm.weight = nn.Parameter(weight)
    return norm


@pytest.mark.parametrize("name", ONE_LAYER)
def test_llama_cpp_drafts_as_transformers_modules_compute(tmp_path: Path, name: str) -> None:
    directory, tiny = tiny_models.checkpoint(name, ALL_TINY_MODELS[name]), ALL_TINY_MODELS[name]
    tokens = torch.tensor([tiny_models.tokens(name, tiny)[:N_TOKENS]])
    model_class = getattr(transformers, tiny_models.configuration(tiny).architectures[0])
    with torch.inference_mode():
        model = model_class.from_pretrained(directory, dtype=torch.float32).eval()
        parts = stored_parts(name)
        text = getattr(model.model, "language_model", model.model)
        parts.setdefault("shared_head.norm.weight", text.norm.weight)
        one = one_layer_model(name, parts, model.lm_head.weight, tmp_path)
        hidden = text(tokens).last_hidden_state[:, :-1]
        embedding = parts.get("embed_tokens.weight", text.embed_tokens.weight)
        norms = [norm_with(one.model.norm, parts[part]) for part in ("enorm.weight", "hnorm.weight")]
        both = torch.cat([norms[0](embedding[tokens[:, 1:]]), norms[1](hidden)], dim=-1)
        expected = one(inputs_embeds=both @ parts["eh_proj.weight"].T).logits[0].numpy()
    write_f32(directory, tmp_path / "model.gguf")
    found = drafted_logits(tmp_path / "model.gguf", tokens[0, 1:].tolist(), hidden[0].numpy())
    assert expected.std() > 0.5
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)


def changed(directory: Path, tmp_path: Path, change: dict[str, str]) -> Path:
    """The model with tensors under other names; without those whose new name is empty."""
    shutil.copytree(directory, tmp_path / "changed")
    path = tmp_path / "changed" / "model.safetensors"
    tensors = {change.get(name, name): tensor for name, tensor in load_file(path).items()}
    save_file({name: tensor for name, tensor in tensors.items() if name}, path, {"format": "pt"})
    return path.parent


def described(directory: Path) -> ModelMap:
    return describe(open_checkpoint(str(directory)))


def counted(model_map: ModelMap, key: str) -> Any:
    entry = model_map.metadata.get(f"{model_map.architecture}.{key}")
    return entry and entry.value


@pytest.mark.parametrize("name", ONE_LAYER)
def test_nothing_that_is_measured_asks_for_what_the_model_runs_without(tiny: Tiny, name: str) -> None:
    model_map = described(tiny(name))
    kept = [tensor for tensor in model_map.tensors if tensor.role is Role.MTP]
    n_layers = counted(model_map, "block_count") - 1
    assert {tensor.name.split(".")[1] for tensor in kept} == {str(n_layers)}
    assert model_map.n_layers == n_layers == 1 + max(t.layer for t in model_map.tensors if t.layer is not None)
    assert all(tensor.quantizable and tensor.layer is None for tensor in kept)
    measured = observed_names(model_map).keys() | matrices_of(model_map).keys()
    assert measured and not measured & {source for tensor in kept for source in tensor.sources}


@pytest.mark.parametrize("name", ["qwen3_5-mtp", "glm4_moe"])
def test_they_are_left_out_where_nobody_wants_them(tiny: Tiny, tmp_path: Path, name: str) -> None:
    kept = described(tiny(name))
    done(*PLAIN, "--set", "*=F32", "--mtp", "drop", "--output", tmp_path / "model.gguf", tiny(name))
    left = described(tmp_path / "model.gguf")
    assert {tensor.name for tensor in kept.tensors} > {tensor.name for tensor in left.tensors}
    assert not any(tensor.role is Role.MTP or "nextn" in tensor.name for tensor in left.tensors)
    assert counted(left, "block_count") == left.n_layers == kept.n_layers
    assert not counted(left, "nextn_predict_layers")
    said = convert("plan", "--mtp", "drop", tiny(name)).stdout
    assert "left out: the layers that predict several tokens" in " ".join(said.split())
    with LlamaCpp(tmp_path / "model.gguf", n_ctx=64, n_threads=1) as model:
        assert np.isfinite(model.logits([5, 91, 17])).all()


def test_a_second_layer_of_them_is_left_out(tiny: Tiny, tmp_path: Path) -> None:
    """llama.cpp drafts with one of these architectures' layers."""
    more = changed(tiny("qwen3_5-mtp"), tmp_path, {})
    tensors = load_file(more / "model.safetensors")
    tensors["mtp.layers.1.input_layernorm.weight"] = torch.ones(64)
    save_file(tensors, more / "model.safetensors", {"format": "pt"})
    model_map = described(more)
    assert "left out: the layers that predict several tokens at once (MTP) (1 tensors)" in model_map.notes
    assert model_map.tensors == described(tiny("qwen3_5-mtp")).tensors


def test_what_the_checkpoint_stores_counts_and_not_what_its_configuration_says(tiny: Tiny, tmp_path: Path) -> None:
    """transformers leaves these tensors out when it saves a model, and the key of config.json as it is."""
    names = [name for name in load_file(tiny("qwen3_5-mtp") / "model.safetensors") if name.startswith("mtp.")]
    model_map = described(changed(tiny("qwen3_5-mtp"), tmp_path, dict.fromkeys(names, "")))
    assert counted(model_map, "block_count") == model_map.n_layers == 4
    assert counted(model_map, "nextn_predict_layers") is None


@pytest.mark.parametrize(
    ("name", "without", "missing"),
    [
        ("qwen3_5-mtp", "mtp.fc.weight", "model.layers.4.eh_proj.weight"),
        ("glm4_moe", "model.layers.3.hnorm.weight", "model.layers.3.hnorm.weight"),
    ],
)
def test_a_layer_that_is_not_whole_is_refused(
    tiny: Tiny, tmp_path: Path, name: str, without: str, missing: str
) -> None:
    model = changed(tiny(name), tmp_path, {without: ""})
    message = refused(*PLAIN, "--output", tmp_path / "model.gguf", model)
    assert f"1 tensors are not stored, the first is '{missing}'" in message and "--mtp drop" in message
    assert counted(describe(open_checkpoint(str(model)), keeps_mtp=False), "block_count") == 4 - (name == "glm4_moe")


def test_what_may_be_absent_may_be_absent(tiny: Tiny, tmp_path: Path) -> None:
    ends = [f"model.layers.3.{end}.weight" for end in ("embed_tokens", "shared_head.norm", "shared_head.head")]
    whole, less = described(tiny("glm4_moe")), described(changed(tiny("glm4_moe"), tmp_path, dict.fromkeys(ends, "")))
    assert {t.name for t in whole.tensors} - {t.name for t in less.tensors} == {
        f"blk.3.nextn.{end}.weight" for end in ("embed_tokens", "shared_head_norm", "shared_head_head")
    }


@pytest.mark.parametrize("name", ["qwen3_5_moe", "glm4_moe_lite"])
def test_a_gguf_is_known_by_its_keys(tiny: Tiny, tmp_path: Path, name: str) -> None:
    write_f32(tiny(name), tmp_path / "f32.gguf")
    stored, read = described(tiny(name)), described(tmp_path / "f32.gguf")
    assert read.n_layers == stored.n_layers
    roles = {tensor.name: (tensor.role, tensor.layer) for tensor in stored.tensors}
    assert {tensor.name: (tensor.role, tensor.layer) for tensor in read.tensors} == roles
    done(*PLAIN, "--output", tmp_path / "q8_0.gguf", tmp_path / "f32.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "q8_0.gguf").tensors}
    assert types[f"blk.{stored.n_layers}.nextn.eh_proj.weight"] == "Q8_0"
    message = refused(*PLAIN, "--mtp", "drop", "--output", tmp_path / "none.gguf", tmp_path / "f32.gguf")
    assert "count these layers" in message


def test_formats_that_need_importance_are_refused(tmp_path: Path) -> None:
    """With rows of 256, which they fit; rules for other roles do not reach below the floor."""
    eh_proj = TensorSpec("blk.1.nextn.eh_proj.weight", (256, 512), Role.MTP)
    model_map = ModelMap("qwen35", 1, (TensorSpec("blk.0.ffn_up.weight", (256, 256), Role.MLP_UP, 0), eh_proj))
    plan = assign(load_profile("ultra-low-1.5bit").by_rules(), model_map)
    assert [row.format for row in plan.tensors][1] == "Q6_K"
    (line,) = mtp_lines(plan)
    assert "matrices: 1 in Q6_K" in line
    finer, coarser = (
        assign(load_profile("balanced-4bit").by_rules(), model_map, [parse_override(f"mtp={name}")])
        for name in ("Q4_K", "IQ1_S")
    )
    refuse_starved(finer, None)
    with pytest.raises(ConvertError, match="IQ1_S cannot be encoded without importance"):
        refuse_starved(coarser, None)
    given = ImportanceMatrix({eh_proj.name: np.ones((1, 512))}, {eh_proj.name: np.ones(1, np.int64)})
    refuse_starved(coarser, given)


def test_a_directory_has_them_as_they_are(tiny: Tiny) -> None:
    checkpoint = open_checkpoint(str(tiny("qwen3_5-mtp")))
    model_map = describe_for_directory(checkpoint)
    modules = describe_modules(checkpoint, model_map)
    assert not any("left out" in note for note in model_map.source_notes)
    names = {tensor.name for tensor in modules.tensors if tensor.role is Role.OTHER}
    assert names > {name for name in checkpoint.tensors if name.startswith("mtp.")}
    said = " ".join(convert("plan", "--profile", "w4a16", *TEXT[:2], tiny("qwen3_5-mtp")).stdout.split())
    assert "36 tensors beside the text model" in said and "copied as they are" in said
    assert "--mtp drop is for a GGUF" in refused("plan", "--profile", "w4a16", "--mtp", "drop", tiny("qwen3_5-mtp"))
