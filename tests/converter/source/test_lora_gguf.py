"""llama.cpp adds a LoRA GGUF to its base model, and computes what the merged model does."""

import ctypes
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bitwright.converter.cli import main
from bitwright.converter.judge.llama_cpp import LlamaCpp
from bitwright.converter.lora_gguf import write_lora_gguf
from bitwright.formats.errors import ConvertError
from tests import tiny_models
from tests.converter.artifact.f32_file import write_f32
from tests.converter.source.test_lora import pair, random, weights, write
from tests.tiny_architectures import ALL_TINY_MODELS

TOKENS = tiny_models.tokens("llama-256")[:40]


def logits(path: Path, adapter: Path | None = None) -> np.ndarray:
    with LlamaCpp(path, n_ctx=64, n_threads=1) as model:
        if adapter is not None:
            lib = model._lib
            lib.llama_adapter_lora_init.restype = ctypes.c_void_p
            lib.llama_adapter_lora_init.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
            lib.llama_set_adapters_lora.argtypes = (
                *(ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.POINTER(ctypes.c_float)),
            )
            loaded = lib.llama_adapter_lora_init(model._model, str(adapter).encode())
            assert loaded
            assert (
                lib.llama_set_adapters_lora(model._context, (ctypes.c_void_p * 1)(loaded), 1, (ctypes.c_float * 1)(1.0))
                == 0
            )
        return model.logits(TOKENS)


def adapter_of(name: str, base: Path, directory: Path, **config: Any) -> Path:
    """Every matrix of a layer, the embedding and the head."""
    tensors: dict[str, torch.Tensor] = {}
    for stored, matrix in weights(base).items():
        module = stored.removesuffix(".weight")
        if matrix.dim() == 2 and (re.search(r"\b(layers|h)\.1\.", stored) or stored == "lm_head.weight"):
            tensors |= pair(module, matrix.T.shape if config.get("fan_in_fan_out") else matrix.shape)
        elif stored == "model.embed_tokens.weight" and name == "llama-256":
            tensors[f"{module}.lora_embedding_A"] = random(4, matrix.shape[0], seed=1) / 4
            tensors[f"{module}.lora_embedding_B"] = random(matrix.shape[1], 4, seed=2) / 4
    return write(directory, base, tensors, **config)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *(("llama-256", {}), ("qwen3", {}), ("phi3", {})),
        ("llama-256", {"use_rslora": True, "alpha_pattern": {"up_proj": 3}}),
        # Its matrices are stored with the inputs first.
        ("gpt2", {"fan_in_fan_out": True}),
    ],
)
def test_llama_cpp_computes_what_the_merged_model_does(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_models.build_model(ALL_TINY_MODELS[name], name, base)
    adapter = adapter_of(name, base, tmp_path / "adapter", **config)
    write_f32(base, tmp_path / "base.gguf")
    write_f32(adapter, tmp_path / "merged.gguf")
    added = write_lora_gguf(str(adapter), output=tmp_path / "lora.gguf")
    expected, found = logits(tmp_path / "merged.gguf"), logits(tmp_path / "base.gguf", added)
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
    assert np.linalg.norm(logits(tmp_path / "base.gguf") - expected) > 1e-2 * np.linalg.norm(expected)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_models.build("llama-256", tmp_path / "base")
    adapter = adapter_of("", tmp_path / "base", tmp_path / "adapter")
    done = CliRunner().invoke(main, [str(adapter), "--lora-gguf"])
    assert done.exit_code == 0, done.stderr
    assert done.output == "wrote adapter-lora.gguf\n" and (tmp_path / "adapter-lora.gguf").is_file()
    again = CliRunner().invoke(main, [str(adapter), "--lora-gguf"])
    assert again.exit_code == 1 and "something at the output already" in again.stderr
    no_adapter = CliRunner().invoke(main, [str(tmp_path / "base"), "--lora-gguf"])
    assert no_adapter.exit_code == 1 and "MODEL is no adapter" in no_adapter.stderr


def test_what_llama_cpp_cannot_add_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_models.build("llama-256", base)
    head = weights(base)["lm_head.weight"]
    with pytest.raises(ConvertError, match=r"it replaces 'lm_head\.weight'"):
        write_lora_gguf(str(write(tmp_path / "one", base, {"lm_head.weight": head})), output=tmp_path / "x.gguf")
    query = "model.layers.0.self_attn.q_proj"
    tensors = {**pair(query, torch.Size((256, 256))), f"{query}.lora_magnitude_vector": torch.ones(256)}
    with pytest.raises(ConvertError, match="no lengths of rows"):
        write_lora_gguf(str(write(tmp_path / "two", base, tensors, use_dora=True)), output=tmp_path / "x.gguf")
