"""Rotary embeddings: llama.cpp turns as transformers does by the same configuration, or the key that prevents it is
named."""

from pathlib import Path
from typing import Any

import pytest

from bitwright.converter.model.model_map import describe
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from tests.converter.model.variants import WITHOUT, errors_of_rows, llama_cpp_logits, transformers_logits, write_variant

N_TOKENS = 100


def rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1e4, "rope_type": rope_type, **parameters}}


def old(**edits: Any) -> dict[str, Any]:
    return {"rope_parameters": WITHOUT, **edits}


YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
FACTORS = {"short_factor": [1.0 + 0.05 * i for i in range(8)], "long_factor": [1.0 + 0.7 * i for i in range(8)]}
LONG = {"original_max_position_embeddings": 512}

FOLLOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "no table": ("Llama", old()),
    "no table, another default": ("Mixtral", old()),
    "base beside the table": ("Llama", old(rope_parameters={"rope_type": "default"}, rope_theta=500.0)),
    "base in the table and beside it": ("Llama", rope("default") | {"rope_theta": 500.0}),
    "two tables": ("Llama", rope("linear", factor=4.0) | {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "two tables, the base in the other": (
        "Llama",
        {"rope_parameters": {"rope_theta": 500.0}, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    "the older table empty": ("Llama", rope("linear", factor=4.0) | {"rope_scaling": {}}),
    "two names of the type": ("Llama", rope("linear", type="yarn", factor=4.0)),
    "linear, with a length": ("Llama", rope("linear", factor=2, original_max_position_embeddings=64, finetuned=True)),
    "linear below one": ("Llama", rope("linear", factor=0.5)),
    "dynamic": ("Qwen2", rope("dynamic", factor=2.0)),
    "yarn": ("Qwen3", rope("yarn", **YARN)),
    "yarn, truncated": ("Llama", rope("yarn", truncate=True, **YARN)),
    "yarn, both scales": ("Llama", rope("yarn", mscale=0.7, mscale_all_dim=1.3, **YARN)),
    "yarn, one scale": ("Llama", rope("yarn", mscale=0.7, **YARN)),
    "yarn, the other scale": ("Llama", rope("yarn", mscale_all_dim=0.7, **YARN)),
    "yarn, another attention factor": ("Mistral", rope("yarn", attention_factor=0.5, **YARN)),
    "yarn, no betas": ("Llama", rope("yarn", beta_fast=0, beta_slow=None, **YARN)),
    "yarn, a beta without effect": ("Llama", rope("yarn", beta_fast=8.0, **YARN)),
    "yarn, no factor": ("Llama", rope("yarn", factor=None, original_max_position_embeddings=64)),
    "yarn, factor below one": ("Llama", rope("yarn", factor=0.5, original_max_position_embeddings=64)),
    "yarn, no length": ("Llama", rope("yarn", factor=4.0)),
    "yarn, another length beside": ("Llama", rope("yarn", **YARN) | {"original_max_position_embeddings": 128}),
    "llama3": ("Llama", rope("llama3", **LLAMA3)),
    "llama3, another length beside": ("Llama", rope("llama3", **LLAMA3) | {"original_max_position_embeddings": 64}),
    "longrope": ("Phi3", rope("longrope", **FACTORS) | LONG),
    "longrope, a factor": ("Phi3", rope("longrope", factor=8.0, **FACTORS) | LONG),
    "longrope, an attention factor": ("Phi3", rope("longrope", attention_factor=1.7, **FACTORS) | LONG),
    "longrope, the length in the table": ("Phi3", rope("longrope", **FACTORS, **LONG)),
    "a part of the columns": ("Phi3", rope("default", partial_rotary_factor=0.5) | {"partial_rotary_factor": 0.25}),
    "a part of the columns, beside": ("Phi3", {"partial_rotary_factor": 0.5, "rope_parameters": WITHOUT}),
    "gemma, old": (
        "Gemma3",
        old(rope_theta=5e5, rope_local_base_freq=2e4, rope_scaling={"rope_type": "linear", "factor": 8.0}),
    ),
    "gemma, both": ("Gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "gemma, one table": (
        "Gemma3",
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}, "rope_local_base_freq": 2e4},
    ),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_llama_cpp_turns_as_transformers(name: str, tmp_path: Path) -> None:
    directory = write_variant(tmp_path / "model", FOLLOWED[name][0], FOLLOWED[name][1])
    expected = transformers_logits(directory, N_TOKENS)
    assert errors_of_rows(llama_cpp_logits(directory, N_TOKENS, 256), expected).max() < 1e-3


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "yarn, not truncated": ("Llama", rope("yarn", truncate=False, **YARN), "truncate"),
    "yarn, truncate without a value": ("Llama", rope("yarn", truncate=None, **YARN), "truncate"),
    "yarn, slow": ("Llama", rope("yarn", beta_slow=2.0, **YARN), "beta_slow"),
    "yarn, fast": ("Llama", rope("yarn", beta_fast=2.0, factor=4.0, **LONG), "beta_fast"),
    "a part of the columns": ("Llama", rope("default", partial_rotary_factor=0.5), "partial_rotary_factor"),
    "a part of the columns, beside": ("Qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "a key of another type": ("Llama", rope("linear", factor=2.0, attention_factor=2.0), "attention_factor"),
    "a factor of nothing": ("Llama", rope("default", factor=2.0), "factor"),
    "unknown": ("Llama", rope("llama3", foo=2.0, **LLAMA3), "foo"),
    "mrope": ("Qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, "mrope"),
    "sections": ("Qwen2", {"rope_scaling": {"type": "default", "mrope_section": [2, 3, 3]}}, "mrope_section"),
    "tables of layers": ("Llama", {"rope_parameters": {"full_attention": {"rope_theta": 500.0}}}, "full_attention"),
    "scales of longrope": ("Phi3", rope("longrope", long_mscale=1.2, **FACTORS) | LONG, "long_mscale"),
    "gemma, no tables of layers": ("Gemma3", rope("linear", factor=8.0), "rope_theta"),
    "gemma, scaled windows": (
        "Gemma3",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "factor",
    ),
    "llama3, the wrong way round": (
        "Llama",
        rope("llama3", **LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 1.0}),
        "high_freq_factor",
    ),
    "no factor": ("Llama", rope("dynamic"), "factor"),
    "no base": ("Llama", rope("default", rope_theta=0), "rope_theta"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_does_not_turn_so_is_named(name: str, tmp_path: Path) -> None:
    architecture, edits, key = REFUSED[name]
    directory = write_variant(tmp_path / "model", architecture, edits)
    with pytest.raises(ConvertError) as caught:
        describe(open_checkpoint(str(directory)))
    assert key in caught.value.what


def test_dynamic_scaling_is_right_as_far_as_the_context_length(tmp_path: Path) -> None:
    edits = rope("dynamic", factor=2.0) | {"max_position_embeddings": 64}
    directory = write_variant(tmp_path / "model", "Llama", edits)
    model_map = describe(open_checkpoint(str(directory)))
    assert model_map.metadata["llama.context_length"].value == 64
    assert "for up to 64 tokens" in model_map.notes[0]
    within, beyond = (
        errors_of_rows(llama_cpp_logits(directory, n, 256), transformers_logits(directory, n)).max() for n in (64, 80)
    )
    assert within < 1e-4 and beyond > 1e-2


def test_long_factors_go_by_the_size_of_llama_cpp_s_context(tmp_path: Path) -> None:
    edits = rope("longrope", **FACTORS) | {"original_max_position_embeddings": 256}
    directory = write_variant(tmp_path / "model", "Phi3", edits)
    assert "(-c 256)" in describe(open_checkpoint(str(directory))).notes[0]
    expected = transformers_logits(directory, N_TOKENS)
    for n_ctx, right in ((256, True), (512, False)):
        error = errors_of_rows(llama_cpp_logits(directory, N_TOKENS, n_ctx), expected).max()
        assert error < 1e-4 if right else error > 1e-2
