"""Tiny models whose config.json says something else: what transformers and llama.cpp compute of each."""

import json
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
import transformers

from bitwright.converter.judge.llama_cpp import LlamaCpp
from tests.converter.artifact.f32_file import write_f32
from tests.tiny_models import VOCAB_SIZE, TinyModel, build_model

WITHOUT = object()
"""As a value of an edit: the key is taken out."""

OPTIONS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Mixtral": {"num_local_experts": 4},
    "Phi3": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
    "Qwen3Moe": {
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "Gemma3": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 48, "num_hidden_layers": 6},
}


def write_variant(directory: Path, architecture: str, edits: dict[str, Any], **options: Any) -> Path:
    """The tiny model with these options, and then with these values in its config.json."""
    tokenizer = "sentencepiece-bare" if architecture == "Gemma3" else "sentencepiece"
    build_model(TinyModel(architecture, OPTIONS[architecture] | options, tokenizer), architecture, directory)
    edit_json(directory / "config.json", edits)
    return directory


def edit_json(path: Path, edits: dict[str, Any]) -> None:
    content = json.loads(path.read_text())
    content = {key: value for key, value in (content | edits).items() if value is not WITHOUT}
    path.write_text(json.dumps(content))


def tokens(n: int) -> list[int]:
    return np.random.default_rng(7).integers(3, VOCAB_SIZE, n).tolist()


def transformers_logits(directory: Path, n: int) -> np.ndarray:
    """float32 [n, vocabulary]: of the directory as transformers loads it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([tokens(n)])).logits[0].numpy()


def llama_cpp_logits(directory: Path, n: int, n_ctx: int) -> np.ndarray:
    """float32 [n, vocabulary]: of our F32 file of the directory in llama.cpp."""
    path = Path(mkdtemp(dir=directory)) / "model.gguf"
    write_f32(directory, path)
    with LlamaCpp(path, n_ctx=n_ctx, n_threads=1) as model:
        return model.logits(tokens(n))


def errors_of_rows(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """[n]: the relative error at every position."""
    return np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
