"""Options of configurations that change what is computed: llama.cpp follows them, or the model is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitwright.converter.judge.llama_cpp import LlamaCpp
from bitwright.converter.model.model_map import describe
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from tests.converter.artifact.f32_file import write_f32
from tests.tiny_architectures import TINY_ARCHITECTURES
from tests.tiny_models import TinyModel, checkpoint, reference_logits, rope, tokens

YARN: dict[str, Any] = {"factor": 4.0, "original_max_position_embeddings": 64}
FULL, SLIDING = "full_attention", "sliding_attention"

FOLLOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "a larger base in the place of a dynamic scaling": ("hunyuan_v1_dense", rope("dynamic", alpha=50.0, factor=1.0)),
    "the same with experts": ("hunyuan_v1_moe", rope("dynamic", alpha=1000.0, factor=1.0)),
    "yarn without a logarithm of its own": ("ministral3", rope("yarn", llama_4_scaling_beta=0.1, **YARN)),
    "yarn with an attention factor": (
        "ministral3",
        rope("yarn", llama_4_scaling_beta=0.2, mscale=1.0, mscale_all_dim=1.0, attention_factor=1.3, **YARN),
    ),
    "scores capped otherwise": ("gemma2", {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}),
    "windows in other layers of Gemma 2": ("gemma2", {"layer_types": [FULL, SLIDING] * 2}),
    "windows in other layers of OLMo 3": ("olmo3", {"layer_types": [FULL, SLIDING] * 2}),
    "windows in other layers of Command R7B": ("cohere2", {"layer_types": [FULL, SLIDING] * 2}),
    "norms of heads in 64 layers": (
        "cohere",
        {"num_hidden_layers": 64, "use_qk_norm": True, "intermediate_size": 32},
    ),
    "all columns of a head turned": ("nemotron", rope("default", partial_rotary_factor=1.0)),
    "biases of Granite": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "biases of Nemotron": ("nemotron", {"attention_bias": True, "mlp_bias": True}),
    "attention beside the MLP": ("stablelm", {"use_qkv_bias": True, "use_parallel_residual": True}),
    "an MLP of its own width": ("gpt2", {"n_inner": 96}),
    "more layers without experts": ("ernie4_5_moe", {"moe_layer_start_index": 2}),
    "no shared expert": ("ernie4_5_moe", {"moe_num_shared_experts": 0}),
    "experts from the first layer": ("afmoe", {"num_dense_layers": 0, "num_shared_experts": 2}),
    "a shared expert": ("granitemoeshared", {"shared_intermediate_size": 96}),
}

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bases that differ": (
        "olmo3",
        {
            "rope_parameters": {
                FULL: {"rope_type": "default", "rope_theta": 500000.0},
                SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
            }
        },
        "another rotary base",
    ),
    "no window": ("cohere2", {"layer_types": [FULL] * 4}, "no sliding window"),
    "no cap": ("gemma2", {"attn_logit_softcapping": None}, "scores that are not capped"),
    "norms of heads": ("cohere", {"use_qk_norm": True}, "fewer than 64 layers"),
    "no rotary embedding elsewhere": ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, "than every fourth"),
    "windows that llama.cpp does not know": ("exaone4", {"sliding_window": 64, "layer_types": None}, "64 layers"),
    "an embedding as it is": ("afmoe", {"mup_enabled": False}, "the root of its width"),
    "windows elsewhere": ("afmoe", {"layer_types": [FULL, SLIDING] * 2}, "other layers than three of four"),
    "experts that differ": ("hunyuan_v1_moe", {"moe_topk": [2, 3]}, "another number of chosen experts"),
    "experts that end": ("ernie4_5_moe", {"num_hidden_layers": 4, "moe_layer_end_index": 2}, "end before the last"),
    "no output": ("olmo2", {"tie_word_embeddings": True}, "tie_word_embeddings = False only"),
    "an output of its own": ("cohere", {"tie_word_embeddings": False}, "tie_word_embeddings = True only"),
    "another activation": ("gpt2", {"activation_function": "relu"}, "another activation than GELU"),
}


def variant(name: str, options: dict[str, Any]) -> TinyModel:
    tiny = TINY_ARCHITECTURES[name]
    return replace(tiny, options=tiny.options | options)


@pytest.mark.parametrize("what", FOLLOWED)
def test_llama_cpp_follows(what: str, tmp_path: Path) -> None:
    name, options = FOLLOWED[what]
    tiny = variant(name, options)
    write_f32(checkpoint(name, tiny), tmp_path / "model.gguf")
    expected = reference_logits(name, tiny)
    with LlamaCpp(tmp_path / "model.gguf", n_ctx=256, n_threads=1) as model:
        found = model.logits(tokens(name, tiny))
    # GELU comes from a table of F16 in llama.cpp.
    largest = 5e-4 if name in ("gpt2", "gemma2") else 1e-4
    assert np.linalg.norm(found - expected) < largest * np.linalg.norm(expected)


@pytest.mark.parametrize("what", REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused(what: str) -> None:
    name, options, message = REFUSED[what]
    directory = checkpoint(name, variant(name, options))
    with pytest.raises(ConvertError, match=message):
        describe(open_checkpoint(str(directory)))
