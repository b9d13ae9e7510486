"""Directories of our tensors load in transformers, and its weights are those that we decode."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

from bitwright.formats.files.safetensors import header
from bitwright.formats.schemes.registry import SCHEMES


def fields(part):
    return None if part is None else {key: value for key, value in vars(part).items() if value is not None}


def write_directory(scheme, model, directory) -> dict[str, np.ndarray]:
    """The model with the scheme on every layer's matrices; returns the decoded weights by name."""
    stored, decoded = {}, {}
    for name, tensor in model.state_dict().items():
        if ".self_attn." in name or ".mlp." in name:
            rows = np.ascontiguousarray(tensor.float().numpy())
            tensors = scheme.encode(rows, effort="fast") | scheme.encode_input(-4.0, 4.0)
            decoded[name] = scheme.decode(tensors, rows.shape)
            for suffix, (dtype, shape) in scheme.tensors(*rows.shape).items():
                stored[name.removesuffix("weight") + suffix] = dtype, shape, tensors[suffix]
        else:
            stored[name] = "BF16", tuple(tensor.shape), tensor.view(torch.int16).numpy().view(np.uint16)
    group = {
        "targets": ["Linear"],
        "weights": fields(scheme.weights),
        "input_activations": fields(scheme.activations),
        "format": scheme.format,
    }
    config = model.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": scheme.format,
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
        },
    }
    (directory / "config.json").write_text(json.dumps(config))
    first = header({name: (dtype, shape) for name, (dtype, shape, _) in stored.items()})
    data = b"".join(np.ascontiguousarray(array).tobytes() for _, _, array in stored.values())
    (directory / "model.safetensors").write_bytes(first + data)
    return decoded


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    return LlamaForCausalLM(config).bfloat16()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dequantize", [True, False])
def test_weights_are_ours(name, dequantize, model, tmp_path):
    scheme = SCHEMES[name]
    decoded = write_directory(scheme, model, tmp_path)
    config = CompressedTensorsConfig(dequantize=dequantize)
    if not scheme.weights.symmetric and not dequantize:
        # As it does for every asymmetric checkpoint: the module it prepares has no packed zero points.
        with pytest.raises(RuntimeError, match="mismatch"):
            AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
        return
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    # Without simulated activations it has no use for their scales.
    assert all(".input_" in key for key in info["unexpected_keys"]) and (dequantize or not info["unexpected_keys"])
    with torch.no_grad():
        logits = loaded(torch.arange(16)[None]).logits
    assert torch.isfinite(logits).all()
    weights = loaded.state_dict()
    for key, expected in decoded.items():
        assert torch.equal(weights[key].float(), torch.from_numpy(expected).bfloat16().float())
