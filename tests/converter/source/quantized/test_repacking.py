"""Where the artifact has the grid that the source has, the values are the source's, bit for bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from bitwright.converter import convert
from bitwright.converter.model.model_map import describe
from bitwright.converter.model.stored_rows import read_rows
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.choices import Effort
from bitwright.formats.files.gguf import read_gguf
from bitwright.formats.registry import get_format
from tests import tiny_models
from tests.converter.source.quantized.coded_models import flat_importance, write_pair
from tests.converter.source.quantized.stored_codes import (
    KINDS,
    Coded,
    bitnet,
    fp8_blocks,
    int4_groups,
    int4_groups_asymmetric,
    mxfp4,
    nvfp4,
    nvfp4_modelopt,
)
from tests.tiny_architectures import ALL_TINY_MODELS


def random_importance(n: int) -> np.ndarray:
    """Some columns matter a million times as much as others, and some not at all."""
    drawn = np.random.default_rng(1).random(n).astype(np.float32) ** 12
    drawn[::7] = 0
    return drawn


@pytest.mark.parametrize("effort", ["best", "fast"])
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("format_name", ["MXFP4", "NVFP4", "TQ1_0", "TQ2_0"])
def test_encoders_find_the_grid_again(format_name: str, weighed: bool, effort: Effort) -> None:
    """Of random codes, whatever their scales."""
    block_format, rng = get_format(format_name), np.random.default_rng(0)
    data = rng.integers(0, 256, (32, block_format.row_bytes(512))).astype(np.uint8)
    blocks = data.reshape(-1, block_format.type_size)
    options: dict[str, Any] = {}
    if format_name == "MXFP4":
        blocks[:, 0] = rng.integers(20, 230, len(blocks))
    elif format_name == "NVFP4":
        blocks[:, :4] = rng.integers(0, 127, (len(blocks), 4))
        options = {"tensor_scale": 0.00321}
    else:
        data = block_format.encode(rng.integers(-1, 2, (32, 512)).astype(np.float32) * np.float32(1.21875))
    rows = block_format.decode(data) * np.float32(options.get("tensor_scale", 1))
    encoded = block_format.encode(rows, random_importance(512) if weighed else None, effort, **options)
    found = block_format.decode(encoded) * np.float32(options.get("tensor_scale", 1))
    assert np.array_equal(found, rows)


def short_run(directory: Path, model: Path) -> dict[str, Any]:
    """Without the model running: every column matters alike."""
    return {
        "judge": "off",
        "threads": 1,
        "work_dir": directory / "work",
        "imatrix": flat_importance(model, directory),
        "protect_super_weights": "off",
    }


def overrides(format_name: str) -> list[str]:
    return [f"blk.*.{part}.weight={format_name}" for part in ("attn_*", "ffn_gate", "ffn_up", "ffn_down")]


@pytest.mark.parametrize(
    ("format_name", "code"),
    [("MXFP4", mxfp4), ("NVFP4", nvfp4), ("NVFP4", nvfp4_modelopt), ("TQ1_0", bitnet), ("TQ2_0", bitnet)],
)
def test_a_gguf_has_the_values_of_its_source(format_name: str, code: Callable[..., Coded], tmp_path: Path) -> None:
    coded, _ = write_pair(tmp_path, "llama-256", code)
    options = short_run(tmp_path, coded)
    convert(
        str(coded), "uniform-8bit", overrides=overrides(format_name), output=tmp_path / "m.gguf", quiet=True, **options
    )
    checkpoint = open_checkpoint(str(coded))
    tensors = {t.name: t for t in read_gguf(tmp_path / "m.gguf").tensors}
    for part, stored in (("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj"), ("attn_v", "self_attn.v_proj")):
        tensor = tensors[f"blk.1.{part}.weight"]
        assert tensor.ggml_type.name == format_name
        values = tensor.decode(0, tensor.n_rows)
        if (scale := tensors.get(f"blk.1.{part}.scale")) is not None:
            values = values * scale.decode(0, 1)[0, 0]
        assert np.array_equal(values, checkpoint.read(f"model.layers.1.{stored}.weight"))
    # Its rows in llama.cpp's order.
    query = tensors["blk.1.attn_q.weight"]
    scale = tensors["blk.1.attn_q.scale"].decode(0, 1)[0, 0] if format_name == "NVFP4" else np.float32(1)
    source = checkpoint.read("model.layers.1.self_attn.q_proj.weight")
    expected = source.reshape(4, 2, -1, 256).swapaxes(1, 2).reshape(256, 256)
    assert np.array_equal(query.decode(0, query.n_rows) * scale, expected)


def test_experts_of_gpt_oss_keep_their_values(tmp_path: Path) -> None:
    """Stored with the outputs first, taken by transformers with the inputs first, gate and up rows alternating."""
    tiny_models.build_model(ALL_TINY_MODELS["gpt_oss"], "gpt_oss", tmp_path / "whole")
    coded = shutil.copytree(tmp_path / "whole", tmp_path / "coded")
    weights, drawn = load_file(coded / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj")) and ".experts." in name]:
        n_experts, n_inputs, n_outputs = weights.pop(name).shape
        blocks = torch.randint(0, 256, (n_experts, n_outputs, n_inputs // 32, 16), generator=drawn).to(torch.uint8)
        scales = torch.randint(110, 125, blocks.shape[:-1], generator=drawn).to(torch.uint8)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(weights, coded / "model.safetensors", {"format": "pt"})
    config = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))

    checkpoint = open_checkpoint(str(coded))
    assert any("weights are MXFP4: decoded on reading" in note for note in checkpoint.notes)
    output = tmp_path / "m.gguf"
    convert(
        str(coded),
        "uniform-8bit",
        overrides=["expert_*=MXFP4"],
        output=output,
        quiet=True,
        **short_run(tmp_path, coded),
    )
    tensors, n_experts = {t.name: t for t in read_gguf(output).tensors}, 0
    for spec in describe(checkpoint).tensors:
        if spec.name.endswith("_exps.weight"):
            tensor, n_experts = tensors[spec.name], n_experts + 1
            assert tensor.ggml_type.name == "MXFP4"
            assert np.array_equal(tensor.decode(0, tensor.n_rows), read_rows(checkpoint, spec, 0, spec.n_rows))
    assert n_experts == 12
    # One expert's gate, by transformers' own decoding.
    name = "model.layers.1.mlp.experts.gate_up_proj"
    values = convert_moe_packed_tensors(weights[f"{name}_blocks"], weights[f"{name}_scales"], dtype=torch.float32)
    gate = tensors["blk.1.ffn_gate_exps.weight"]
    assert np.array_equal(gate.decode(0, gate.n_rows).reshape(gate.shape), values[..., ::2].mT.numpy())


def fp8_bf16_blocks(n: int, k: int) -> Coded:
    return fp8_blocks(n, k, scale_dtype=torch.bfloat16)


def fp8_bf16_channel(n: int, k: int) -> Coded:
    coded = KINDS["FP8 per channel"](n, k)
    scale = coded.tensors["weight_scale"].to(torch.bfloat16)
    values = (coded.tensors["weight"].float() * scale.float()).numpy()
    return Coded(coded.tensors | {"weight_scale": scale}, coded.stated, values)


def _bf16(code: Callable[[int, int], Coded]) -> Callable[[int, int], Coded]:
    def coded(n: int, k: int) -> Coded:
        made = code(n, k)
        return Coded(
            made.tensors | {"weight_scale": made.tensors["weight_scale"].to(torch.bfloat16)}, made.stated, made.values
        )

    return coded


@pytest.mark.parametrize(
    ("scheme", "code"),
    [
        ("FP8_BLOCK", fp8_bf16_blocks),
        ("FP8", fp8_bf16_channel),
        ("NVFP4A16", nvfp4),
        ("NVFP4A16", nvfp4_modelopt),
        ("MXFP4A16", mxfp4),
        ("W4A16_G32", _bf16(int4_groups)),
        ("W4A16_ASYM_G32", _bf16(int4_groups_asymmetric)),
    ],
)
def test_a_directory_has_the_codes_of_its_source(scheme: str, code: Callable[..., Coded], tmp_path: Path) -> None:
    coded, _ = write_pair(tmp_path, "llama-256", code)
    output = tmp_path / "artifact"
    options = short_run(tmp_path, coded)
    profile = tmp_path / "only.toml"
    profile.write_text(f'description = "-"\ngood_for = "-"\ntarget = "safetensors"\nbase = "{scheme}"\n')
    convert(str(coded), profile, output=output, quiet=True, **options)
    found, source = load_file(output / "model.safetensors"), load_file(coded / "model.safetensors")
    for name in ("mlp.up_proj", "self_attn.q_proj"):
        module = f"model.layers.2.{name}."
        second = "weight" if code is nvfp4_modelopt else "weight_packed"
        for suffix in ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale"):
            if module + suffix not in found:
                continue
            theirs = {"weight_packed": second, "weight_global_scale": "weight_global_scale"}.get(suffix, suffix)
            if suffix == "weight_scale" and scheme == "FP8_BLOCK":
                theirs = "weight_scale_inv"
            if suffix == "weight_global_scale" and code is nvfp4_modelopt:
                expected = 1 / source[module + "weight_scale_2"].reshape(1)
            else:
                expected = source[module + theirs]
            assert _same_codes(found[module + suffix], expected), suffix


def _same_codes(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bytes, or values where both are numbers."""
    if found.dtype.itemsize == expected.dtype.itemsize == 1:
        return torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    return torch.equal(found.float(), expected.float())
