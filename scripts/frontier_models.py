"""Checkpoints of the shapes of two frontier releases, as files of holes: they take no disk, and every weight is zero.

deepseek-v3   61 layers, multi-head latent attention, 256 experts, FP8 in blocks of 128 x 128
gpt-oss-120b  36 layers, attention sinks, 128 experts in MXFP4
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitwright.formats.files.stored_tensor import DTYPE_BITS

Stored = tuple[str, tuple[int, ...]]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_BLOCK = 128  # rows and columns that share a scale
_IN_MXFP4 = 32  # values that share one

DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [_BLOCK, _BLOCK]},
}
GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "hidden_act": "silu",
    "swiglu_limit": 7.0,
    "attention_bias": True,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    },
}
CONFIGS = {"deepseek-v3": DEEPSEEK, "gpt-oss-120b": GPT_OSS}


def write_frontier_model(name: str, directory: Path, tokenizer: Path, n_layers: int | None = None) -> None:
    """The checkpoint of that name, of fewer layers where that is asked for; tokenizer: a directory with one whose
    vocabulary is no larger than the model's."""
    config = dict(CONFIGS[name])
    if n_layers is not None:
        config["num_hidden_layers"] = n_layers
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][:n_layers]
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    for file in TOKENIZER:
        if (tokenizer / file).is_file():
            shutil.copy(tokenizer / file, directory)
    stored = _deepseek(config) if name == "deepseek-v3" else _gpt_oss(config)
    header: dict[str, Any] = {}
    offset = 0
    for tensor, (dtype, shape) in stored:
        n_bytes = DTYPE_BITS[dtype] // 8
        for size in shape:
            n_bytes *= size
        header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + n_bytes]}
        offset += n_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def _deepseek(config: dict[str, Any]) -> Iterator[tuple[str, Stored]]:
    def matrix(name: str, n_rows: int, n_columns: int) -> Iterator[tuple[str, Stored]]:
        yield f"{name}.weight", ("F8_E4M3", (n_rows, n_columns))
        yield f"{name}.weight_scale_inv", ("F32", (-(-n_rows // _BLOCK), -(-n_columns // _BLOCK)))

    def mlp(name: str, mlp_width: int) -> Iterator[tuple[str, Stored]]:
        yield from matrix(f"{name}.gate_proj", mlp_width, width)
        yield from matrix(f"{name}.up_proj", mlp_width, width)
        yield from matrix(f"{name}.down_proj", width, mlp_width)

    width, heads, expert = config["hidden_size"], config["num_attention_heads"], config["moe_intermediate_size"]
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    yield "model.embed_tokens.weight", ("BF16", (config["vocab_size"], width))
    for layer in range(config["num_hidden_layers"] + config["num_nextn_predict_layers"]):
        prefix = f"model.layers.{layer}"
        for norm, size in (
            ("input_layernorm", width),
            ("post_attention_layernorm", width),
            ("self_attn.q_a_layernorm", q_rank),
            ("self_attn.kv_a_layernorm", kv_rank),
        ):
            yield f"{prefix}.{norm}.weight", ("BF16", (size,))
        yield from matrix(f"{prefix}.self_attn.q_a_proj", q_rank, width)
        yield from matrix(f"{prefix}.self_attn.q_b_proj", heads * (nope + rope), q_rank)
        yield from matrix(f"{prefix}.self_attn.kv_a_proj_with_mqa", kv_rank + rope, width)
        yield from matrix(f"{prefix}.self_attn.kv_b_proj", heads * (nope + value), kv_rank)
        yield from matrix(f"{prefix}.self_attn.o_proj", width, heads * value)
        if layer < config["first_k_dense_replace"]:
            yield from mlp(f"{prefix}.mlp", config["intermediate_size"])
            continue
        yield f"{prefix}.mlp.gate.weight", ("BF16", (config["n_routed_experts"], width))
        yield f"{prefix}.mlp.gate.e_score_correction_bias", ("F32", (config["n_routed_experts"],))
        yield from mlp(f"{prefix}.mlp.shared_experts", expert * config["n_shared_experts"])
        for i in range(config["n_routed_experts"]):
            yield from mlp(f"{prefix}.mlp.experts.{i}", expert)
    yield "model.norm.weight", ("BF16", (width,))
    yield "lm_head.weight", ("BF16", (config["vocab_size"], width))
    extra = f"model.layers.{config['num_hidden_layers']}"
    yield f"{extra}.enorm.weight", ("BF16", (width,))
    yield f"{extra}.hnorm.weight", ("BF16", (width,))
    yield f"{extra}.eh_proj.weight", ("BF16", (width, 2 * width))
    yield f"{extra}.shared_head.norm.weight", ("BF16", (width,))


def _gpt_oss(config: dict[str, Any]) -> Iterator[tuple[str, Stored]]:
    def biased(name: str, n_rows: int, n_columns: int) -> Iterator[tuple[str, Stored]]:
        yield f"{name}.weight", ("BF16", (n_rows, n_columns))
        yield f"{name}.bias", ("BF16", (n_rows,))

    def stacked(name: str, n_rows: int, n_columns: int) -> Iterator[tuple[str, Stored]]:
        n_blocks = n_columns // _IN_MXFP4
        yield f"{name}_blocks", ("U8", (experts, n_rows, n_blocks, _IN_MXFP4 // 2))
        yield f"{name}_scales", ("U8", (experts, n_rows, n_blocks))
        yield f"{name}_bias", ("BF16", (experts, n_rows))

    width, mlp, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    query = config["num_attention_heads"] * config["head_dim"]
    key_value = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", ("BF16", (config["vocab_size"], width))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", ("BF16", (width,))
        yield f"{prefix}.post_attention_layernorm.weight", ("BF16", (width,))
        yield from biased(f"{prefix}.self_attn.q_proj", query, width)
        yield from biased(f"{prefix}.self_attn.k_proj", key_value, width)
        yield from biased(f"{prefix}.self_attn.v_proj", key_value, width)
        yield from biased(f"{prefix}.self_attn.o_proj", width, query)
        yield f"{prefix}.self_attn.sinks", ("BF16", (config["num_attention_heads"],))
        yield from biased(f"{prefix}.mlp.router", experts, width)
        yield from stacked(f"{prefix}.mlp.experts.gate_up_proj", 2 * mlp, width)
        yield from stacked(f"{prefix}.mlp.experts.down_proj", width, mlp)
    yield "model.norm.weight", ("BF16", (width,))
    yield "lm_head.weight", ("BF16", (config["vocab_size"], width))
