"""Every kind of stored codes is decoded to what other implementations make of it, in whatever rows it is read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from tests.converter.source.quantized.stored_codes import KINDS, Coded, fp8_blocks, gptq, nvfp4

NAME = "model.layers.0.mlp.up_proj."
SHAPE = (192, 320)


def opened(
    directory: Path, tensors: dict[str, torch.Tensor], stated: dict[str, Any] | None, **config: Any
) -> Checkpoint:
    directory.mkdir(exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    said = {"quantization_config": stated} if stated is not None else {}
    (directory / "config.json").write_text(json.dumps({"model_type": "unknown", "dtype": "bfloat16", **said, **config}))
    return open_checkpoint(str(directory))


def opened_coded(directory: Path, coded: Coded) -> Checkpoint:
    return opened(directory, {NAME + end: tensor for end, tensor in coded.tensors.items()}, coded.stated)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_other_implementations(kind: str, tmp_path: Path) -> None:
    coded = KINDS[kind](*SHAPE)
    checkpoint = opened_coded(tmp_path, coded)
    assert list(checkpoint.tensors) == [NAME + "weight"]
    tensor = checkpoint.tensors[NAME + "weight"]
    assert (tensor.shape, tensor.dtype) == (SHAPE, "BF16")
    assert "quantization_config" not in checkpoint.config
    values = checkpoint.read(NAME + "weight")
    np.testing.assert_allclose(values, coded.values, rtol=3e-7, atol=1e-12)
    for start, stop in ((0, 1), (1, 5), (47, 49), (63, 130), (191, 192), (7, 7)):
        assert np.array_equal(checkpoint.read(NAME + "weight", start, stop), values[start:stop])
    assert np.array_equal(np.concatenate(list(checkpoint.blocks(NAME + "weight"))), values)
    rows = np.array([5, 191, 0, 5, 6])
    assert np.array_equal(checkpoint.read_rows(NAME + "weight", rows), values[rows])
    assert np.array_equal(checkpoint.read_columns(NAME + "weight", 3, 70), values[:, 3:70].T)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize(("shape", "block"), [((200, 300), (128, 128)), ((130, 64), (64, 32)), ((5, 1), (128, 128))])
def test_blocks_at_odd_edges(
    shape: tuple[int, int], block: tuple[int, int], scale_dtype: torch.dtype, tmp_path
) -> None:
    coded = fp8_blocks(*shape, block, scale_dtype)
    checkpoint = opened_coded(tmp_path, coded)
    np.testing.assert_allclose(checkpoint.read(NAME + "weight"), coded.values, rtol=3e-7)
    assert np.array_equal(checkpoint.read(NAME + "weight", 3, 5), checkpoint.read(NAME + "weight")[3:5])


def test_what_decodes_is_noted(tmp_path: Path) -> None:
    notes = opened_coded(tmp_path, fp8_blocks(*SHAPE)).notes
    assert notes == (
        "weights are FP8 in blocks of 128x128: decoded on reading, calibration runs on the decoded weights",
    )
    coded = {
        f"layers.{i}.{end}": tensor
        for i, each in enumerate((KINDS["FP8 per tensor"], KINDS["FP8 per tensor"], fp8_blocks))
        for end, tensor in each(*SHAPE).tensors.items()
    }
    notes = opened(tmp_path, coded, {"quant_method": "fp8"}).notes
    assert "FP8 per tensor (2 tensors), FP8 in blocks of 128x128 (1 tensors)" in notes[0]
    assert notes[1].startswith("2 stored scales of inputs")


def test_what_is_kept_out_of_quantization_stays_as_it_is(tmp_path: Path) -> None:
    coded = nvfp4(*SHAPE)
    tensors = {NAME + end: tensor for end, tensor in coded.tensors.items()}
    head = torch.randn(7, 64).to(torch.bfloat16)
    checkpoint = opened(tmp_path, {**tensors, "lm_head.weight": head}, coded.stated)
    assert set(checkpoint.tensors) == {NAME + "weight", "lm_head.weight"}
    assert np.array_equal(checkpoint.read("lm_head.weight"), head.float().numpy())


@pytest.mark.parametrize("inner", [True, False])
def test_the_configuration_of_a_part_is_seen(inner: bool, tmp_path: Path) -> None:
    coded = fp8_blocks(130, 70, (64, 32))
    tensors = {NAME + end: tensor for end, tensor in coded.tensors.items()}
    said = {"quantization_config": coded.stated}
    config = (
        {"text_config": {"model_type": "other", **said}} if inner else {"text_config": {"model_type": "other"}, **said}
    )
    checkpoint = opened(tmp_path, tensors, None, **config)
    np.testing.assert_allclose(checkpoint.read(NAME + "weight"), coded.values, rtol=3e-7)
    assert "quantization_config" not in checkpoint.config["text_config"]


def test_modelopt_says_it_in_a_file_of_its_own(tmp_path: Path) -> None:
    coded = KINDS["NVFP4 of ModelOpt"](*SHAPE)
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}})
    )
    checkpoint = opened(tmp_path, {NAME + end: tensor for end, tensor in coded.tensors.items()}, None)
    np.testing.assert_allclose(checkpoint.read(NAME + "weight"), coded.values, rtol=3e-7)
    assert "hf_quant_config.json" in [name for name, _, _ in checkpoint.files()]


def experts(n_experts: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (n_experts, n, k // 32, 16), generator=generator).to(torch.uint8)
    return blocks, torch.randint(100, 130, (n_experts, n, k // 32), generator=generator).to(torch.uint8)


@pytest.mark.parametrize("shape", [(3, 64, 96), (1, 5, 32), (2, 7, 160)])
def test_experts_of_gpt_oss(shape: tuple[int, int, int], tmp_path: Path) -> None:
    """transformers' own parameter is [n_experts, n_inputs, n_outputs]."""
    blocks, scales = experts(*shape)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": torch.zeros(3, 64)}
    checkpoint = opened(tmp_path, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    assert set(checkpoint.tensors) == {name, f"{name}_bias"}
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).numpy()
    n_experts, n_inputs, n_outputs = expected.shape
    assert checkpoint.tensors[name].shape == expected.shape
    assert checkpoint.tensors[name].inputs_first
    rows = expected.reshape(-1, n_outputs)
    assert np.array_equal(checkpoint.read(name), rows)
    for start, stop in ((0, 1), (3, 31), (n_inputs - 1, min(n_inputs + 33, len(rows))), (len(rows) - 1, len(rows))):
        assert np.array_equal(checkpoint.read(name, start, stop), rows[start:stop])
    for expert in range(n_experts):
        assert np.array_equal(checkpoint.read_columns(name, 1, n_outputs, expert), expected[expert][:, 1:].T)


def test_stacked_experts_are_split_after_decoding(tmp_path: Path) -> None:
    """As transformers 5 stores experts in FP8."""
    weight = torch.randn(3, 64, 40).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2, 2) + 0.5
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stated = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    checkpoint = opened(tmp_path, {name: weight, f"{name}_scale_inv": scale}, stated, model_type="qwen3_moe")
    spread = scale.repeat_interleave(32, 1).repeat_interleave(32, 2)[..., :40]
    whole = (weight.float() * spread).numpy()
    assert len(checkpoint.tensors) == 6
    for expert in range(3):
        for half, part in ((0, "gate_proj"), (1, "up_proj")):
            stored = f"model.layers.0.mlp.experts.{expert}.{part}.weight"
            assert np.array_equal(checkpoint.read(stored), whole[expert, 32 * half : 32 * half + 32])
            assert np.array_equal(checkpoint.read(stored, 5, 20), whole[expert, 32 * half + 5 : 32 * half + 20])


def _without(coded: Coded, *ends: str) -> Coded:
    return Coded({end: tensor for end, tensor in coded.tensors.items() if end not in ends}, coded.stated, coded.values)


def _with(coded: Coded, **tensors: torch.Tensor) -> Coded:
    return Coded(coded.tensors | tensors, coded.stated, coded.values)


@pytest.mark.parametrize(
    ("coded", "message"),
    [
        (_without(fp8_blocks(*SHAPE), "weight_scale_inv"), "weight_scale_inv' or .*weight_scale' is missing"),
        (_without(nvfp4(*SHAPE), "weight_scale"), "weight_scale' is missing"),
        (_without(nvfp4(*SHAPE), "weight_global_scale"), "weight_global_scale' is missing|does not fit"),
        (_without(gptq(*SHAPE), "scales"), "scales' is missing"),
        (_with(fp8_blocks(*SHAPE), weight_scale_inv=torch.ones(3, 3)), r"have the shape \[3, 3\], which does not fit"),
        (_with(nvfp4(*SHAPE), weight_scale=torch.ones(192, 3).to(torch.float8_e4m3fn)), "does not fit"),
        (_with(gptq(*SHAPE), scales=torch.ones(10, 96).half()), "do|does not fit"),
        (_with(gptq(*SHAPE), g_idx=torch.zeros(5, dtype=torch.int32)), "indices of groups"),
    ],
)
def test_scales_that_are_missing_or_do_not_fit(coded: Coded, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=message):
        opened_coded(tmp_path, coded)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    coded = fp8_blocks(*SHAPE)
    coded.tensors["weight_scale_inv"][1, 2] = value
    with pytest.raises(ConvertError, match=r"a scale of .* is not a finite number, in its row 1"):
        opened_coded(tmp_path, coded).read(NAME + "weight")
    coded = gptq(*SHAPE)
    coded.tensors["scales"][3, 100] = value
    with pytest.raises(ConvertError, match=r"a scale of .* is not a finite number"):
        opened_coded(tmp_path, coded).read(NAME + "weight", 96, 104)
    coded = _with(nvfp4(*SHAPE), weight_global_scale=torch.tensor([value]))
    with pytest.raises(ConvertError, match=r"the scale of .* is (nan|inf)"):
        opened_coded(tmp_path, coded).read(NAME + "weight")


def test_groups_that_are_not_stored(tmp_path: Path) -> None:
    coded = gptq(*SHAPE)
    coded.tensors["g_idx"][7] = 10
    with pytest.raises(ConvertError, match="name scales that are not stored"):
        opened_coded(tmp_path, coded).read(NAME + "weight")


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"quant_method": "aqlm"}, "by 'aqlm', which is not decoded here"),
        ({"quant_method": "awq", "version": "gemv"}, "AWQ's version 'gemv'"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "GPTQ's format 'marlin'"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "by compressed-tensors' 'marlin-24'"),
        (None, "a method that no quantization_config names"),
    ],
)
def test_unknown_methods_are_named(stated: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    coded = gptq(*SHAPE)
    with pytest.raises(ConvertError, match=message):
        opened(tmp_path, {NAME + end: tensor for end, tensor in coded.tensors.items()}, stated)


def test_biases_that_gptq_makes_up(tmp_path: Path) -> None:
    """AutoGPTQ stores one with every matrix, zeros where the model has none."""
    coded = gptq(*SHAPE)
    tensors = {f"{i}.{end}": tensor for i in range(2) for end, tensor in coded.tensors.items()}
    zeros, ones = torch.zeros(192).half(), torch.ones(192).half()
    checkpoint = opened(tmp_path, {**tensors, "0.bias": zeros, "1.bias": ones}, coded.stated)
    assert set(checkpoint.tensors) == {"0.weight", "1.weight", "1.bias"}
    assert any("1 biases of zeros" in note for note in checkpoint.notes)
    checkpoint = opened(tmp_path, {**tensors, "0.bias": zeros}, coded.stated)
    assert "0.bias" in checkpoint.tensors


def test_inputs_that_are_scaled_are_refused(tmp_path: Path) -> None:
    coded = _with(KINDS["NVFP4 of ModelOpt"](*SHAPE), pre_quant_scale=torch.ones(320))
    with pytest.raises(ConvertError, match=r"the inputs .* are multiplied, too.*pre_quant_scale"):
        opened_coded(tmp_path, coded)
