"""Tiny random models of every architecture that people bring, converted or not: the smallest with every kind of layer.

Names are model types as config.json has them, with a suffix where one type occurs in several forms. Sizes are those of
tests/tiny_models.py; only what differs is here. ALL_TINY_MODELS are these and those of tests/tiny_models.py.
"""

from typing import Any

from tests.tiny_models import TINY_MODELS, Hub, TinyModel, rope

_HEADS: dict[str, Any] = {"head_dim": 32}
_SLIDING_PATTERN = ["sliding_attention", "sliding_attention", "full_attention"] * 2
_LINEAR_PATTERN = ["linear_attention"] * 3 + ["full_attention"]

# The encoders of images are as small as their configuration allows; nothing here reads them.
_QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
_QWEN2_VISION: dict[str, Any] = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
_QWEN25_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [0],
}
_VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_PIXTRAL = {"vision_config": _VIT | {"model_type": "pixtral", "head_dim": 16}}
_SIGLIP = {"vision_config": _VIT | {"model_type": "siglip_vision_model"}}

_MROPE = rope("default", mrope_section=[6, 5, 5], mrope_interleaved=True)
_QWEN35: dict[str, Any] = {
    "head_dim": 32,
    "num_hidden_layers": 4,
    "layer_types": _LINEAR_PATTERN,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_QWEN35_ROPE = rope("default", mrope_section=[2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.25)
_QWEN35_EXPERTS: dict[str, Any] = {
    "intermediate_size": None,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 3,
}
_GEMMA4: dict[str, Any] = {
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 64,
    "num_hidden_layers": 6,
    "layer_types": _SLIDING_PATTERN,
    "final_logit_softcapping": 30.0,
}
_GEMMA4_SMALL = _GEMMA4 | {
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 400,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
}
_GEMMA4_LARGE = _GEMMA4 | {
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
}
_GEMMA4_EXPERTS = _GEMMA4_LARGE | {
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 96,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_DEEPSEEK: dict[str, Any] = _LATENT | {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "n_group": 2,
    "topk_group": 1,
}
# The texts of "bpe-glm" end with <|endoftext|>, <|user|> or <|observation|>.
_GLM_ENDS: dict[str, Any] = {"eos_token_id": [0, 5, 6]}
_INDEXER: dict[str, Any] = {"index_topk": 32, "index_head_dim": 32, "index_n_heads": 4}
_DENSE_FIRST = ["dense", "sparse", "sparse"]
_GRANITE: dict[str, Any] = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 32,
}
_EXPERTS_4: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_EMBEDDING: dict[str, Any] = {"num_key_value_heads": None}


def _pooling(mode: str) -> dict[str, Any]:
    """How sentence-transformers writes what becomes of the tokens' vectors."""
    return {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": 64,
            **{
                f"pooling_mode_{key}": key == mode
                for key in ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")
            },
        },
    }


Shapes = dict[str, tuple[int, ...]]


def _prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


# As the Hub's files have them, the layers that predict several tokens, which transformers does not load.
_NORMS: Shapes = {"input_layernorm.weight": (64,), "post_attention_layernorm.weight": (64,)}


def _mlp(width: int = 96) -> Shapes:
    return {"gate_proj.weight": (width, 64), "up_proj.weight": (width, 64), "down_proj.weight": (64, width)}


def _experts(n: int) -> Shapes:
    singly = [_prefixed(f"experts.{i}.", _mlp()) for i in range(n)]
    return {"gate.weight": (n, 64)} | {name: shape for expert in singly for name, shape in expert.items()}


_QWEN_OWN: Shapes = {
    "mtp.fc.weight": (64, 128),
    "mtp.norm.weight": (64,),
    "mtp.pre_fc_norm_embedding.weight": (64,),
    "mtp.pre_fc_norm_hidden.weight": (64,),
}
_QWEN_BLOCK: Shapes = _NORMS | {
    "self_attn.q_proj.weight": (256, 64),
    "self_attn.k_proj.weight": (64, 64),
    "self_attn.v_proj.weight": (64, 64),
    "self_attn.o_proj.weight": (64, 128),
    "self_attn.q_norm.weight": (32,),
    "self_attn.k_norm.weight": (32,),
}
_QWEN_SHARED: Shapes = {"shared_expert_gate.weight": (1, 64)} | _prefixed("shared_expert.", _mlp(32))
_QWEN35_MTP = _QWEN_OWN | _prefixed("mtp.layers.0.", _QWEN_BLOCK | _prefixed("mlp.", _mlp()))
_QWEN35_MOE_MTP = _QWEN_OWN | _prefixed(
    "mtp.layers.0.",
    _QWEN_BLOCK
    | _prefixed("mlp.", _QWEN_SHARED | {"gate.weight": (8, 64)})
    | {"mlp.experts.gate_up_proj": (8, 192, 64), "mlp.experts.down_proj": (8, 64, 96)},
)
_QWEN3_NEXT_MTP = _QWEN_OWN | _prefixed("mtp.layers.0.", _QWEN_BLOCK | _prefixed("mlp.", _experts(8) | _QWEN_SHARED))
_NEXTN: Shapes = {"enorm.weight": (64,), "hnorm.weight": (64,), "eh_proj.weight": (64, 128)}
_NEXTN_ENDS: Shapes = {
    "embed_tokens.weight": (400, 64),
    "shared_head.norm.weight": (64,),
    "shared_head.head.weight": (400, 64),
}
_DEEPSEEK_ROUTED: Shapes = _experts(8) | {"gate.e_score_correction_bias": (8,)} | _prefixed("shared_experts.", _mlp())
_GLM4_MTP = _prefixed(
    "model.layers.3.",
    _NEXTN
    | _NEXTN_ENDS
    | _NORMS
    | {
        "self_attn.q_proj.weight": (128, 64),
        "self_attn.q_proj.bias": (128,),
        "self_attn.k_proj.weight": (64, 64),
        "self_attn.k_proj.bias": (64,),
        "self_attn.v_proj.weight": (64, 64),
        "self_attn.v_proj.bias": (64,),
        "self_attn.o_proj.weight": (64, 128),
        "self_attn.q_norm.weight": (32,),
        "self_attn.k_norm.weight": (32,),
    }
    | _prefixed("mlp.", _DEEPSEEK_ROUTED),
)
_DEEPSEEK_MTP = _prefixed(
    "model.layers.3.",
    _NEXTN
    | _NEXTN_ENDS
    | _NORMS
    | {
        "self_attn.q_a_proj.weight": (32, 64),
        "self_attn.q_a_layernorm.weight": (32,),
        "self_attn.q_b_proj.weight": (128, 32),
        "self_attn.kv_a_proj_with_mqa.weight": (48, 64),
        "self_attn.kv_a_layernorm.weight": (32,),
        "self_attn.kv_b_proj.weight": (128, 32),
        "self_attn.o_proj.weight": (64, 64),
    }
    | _prefixed("mlp.", _DEEPSEEK_ROUTED),
)
_COHERE_MTP = _prefixed(
    "model.layers.4.",
    _NEXTN
    | {
        "input_layernorm.weight": (64,),
        "self_attn.q_proj.weight": (128, 64),
        "self_attn.k_proj.weight": (64, 64),
        "self_attn.v_proj.weight": (64, 64),
        "self_attn.o_proj.weight": (64, 128),
    }
    | _prefixed("mlp.", _experts(4)),
)

QWEN: dict[str, TinyModel] = {
    "qwen3_5_text": TinyModel("Qwen3_5", _QWEN35 | _QWEN35_ROPE, "bpe", config_class="Qwen3_5TextConfig"),
    "qwen3_5": TinyModel(
        "Qwen3_5",
        _QWEN35 | _QWEN35_ROPE,
        "bpe",
        model_class="Qwen3_5ForConditionalGeneration",
        wrapper={"vision_config": _QWEN_VISION},
    ),
    "qwen3_5-mtp": TinyModel(
        "Qwen3_5",
        _QWEN35 | _QWEN35_ROPE,
        "bpe",
        model_class="Qwen3_5ForConditionalGeneration",
        wrapper={"vision_config": _QWEN_VISION},
        hub=Hub({"text_config.mtp_num_hidden_layers": 1}, extra=_QWEN35_MTP),
    ),
    "qwen3_5_moe_text": TinyModel(
        "Qwen3_5Moe",
        _QWEN35 | _QWEN35_ROPE | _QWEN35_EXPERTS,
        "bpe",
        config_class="Qwen3_5MoeTextConfig",
        hub=Hub(own_names=True),
    ),
    "qwen3_5_moe": TinyModel(
        "Qwen3_5Moe",
        _QWEN35 | _QWEN35_ROPE | _QWEN35_EXPERTS,
        "bpe",
        model_class="Qwen3_5MoeForConditionalGeneration",
        wrapper={"vision_config": _QWEN_VISION},
        hub=Hub({"text_config.mtp_num_hidden_layers": 1}, own_names=True, extra=_QWEN35_MOE_MTP),
    ),
    "qwen3_next": TinyModel(
        "Qwen3Next",
        _QWEN35 | _QWEN35_EXPERTS | rope("default", partial_rotary_factor=0.25) | {"intermediate_size": 96},
        "bpe",
        hub=Hub(extra=_QWEN3_NEXT_MTP),
    ),
    "qwen3_vl": TinyModel(
        "Qwen3VL",
        _HEADS | _MROPE,
        "bpe",
        model_class="Qwen3VLForConditionalGeneration",
        wrapper={"vision_config": _QWEN_VISION},
    ),
    "qwen3_vl_moe": TinyModel(
        "Qwen3VLMoe",
        _HEADS | _MROPE | {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 96},
        "bpe",
        model_class="Qwen3VLMoeForConditionalGeneration",
        wrapper={"vision_config": _QWEN_VISION},
        hub=Hub(transposed=r"experts\.(gate_up|down)_proj$"),
    ),
    "qwen2_vl": TinyModel(
        "Qwen2VL",
        rope("default", mrope_section=[2, 3, 3]),
        "bpe",
        model_class="Qwen2VLForConditionalGeneration",
        wrapper={"vision_config": _QWEN2_VISION},
    ),
    "qwen2_5_vl": TinyModel(
        "Qwen2_5_VL",
        rope("default", mrope_section=[2, 3, 3]),
        "bpe",
        model_class="Qwen2_5_VLForConditionalGeneration",
        wrapper={"vision_config": _QWEN25_VISION},
    ),
    "qwen2_moe": TinyModel(
        "Qwen2Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 96,
            "shared_expert_intermediate_size": 32,
            "norm_topk_prob": False,
        },
        "bpe",
    ),
    "qwen3-embedding": TinyModel(
        "Qwen3", _HEADS, "bpe", model_class="Qwen3Model", hub=Hub(files=_pooling("lasttoken"))
    ),
    "qwen4_exp_text": TinyModel(
        "Qwen4Exp",
        _QWEN35
        | _QWEN35_EXPERTS
        | {
            "hc_count": 2,
            "hc_lowrank": 16,
            "ple_layer_ids": [1],
            "heads_per_ngram": 2,
            "ngram_vocab_size_base": 100,
            "split_ngram_parts": 2,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 32,
            "indexer_budget": 64,
            "indexer_compress_ratio": 16,
        },
        "bpe",
        config_class="Qwen4ExpTextConfig",
    ),
}

# Layers that take over the keys and values of others have their own on the Hub all the same.
_GEMMA3N_UNUSED: dict[str, tuple[int, ...]] = {
    f"model.layers.{layer}.self_attn.{name}.weight": shape
    for layer in range(20, 25)
    for name, shape in {"k_proj": (16, 64), "v_proj": (16, 64), "k_norm": (8,)}.items()
}

GEMMA: dict[str, TinyModel] = {
    "gemma": TinyModel("Gemma", _HEADS, "sentencepiece-bare"),
    # Half of the layers have a window, which is shorter than the sequence.
    "gemma2": TinyModel(
        "Gemma2",
        _HEADS | {"query_pre_attn_scalar": 32, "sliding_window": 64, "num_hidden_layers": 4},
        "sentencepiece-bare",
    ),
    "gemma3-image": TinyModel(
        "Gemma3",
        _HEADS | {"query_pre_attn_scalar": 32, "sliding_window": 64, "num_hidden_layers": 6},
        "sentencepiece-bare",
        config_class="Gemma3Config",
        model_class="Gemma3ForConditionalGeneration",
        wrapper=_SIGLIP | {"mm_tokens_per_image": 4},
    ),
    "embeddinggemma": TinyModel(
        "Gemma3",
        _HEADS
        | {
            "query_pre_attn_scalar": 32,
            "sliding_window": 64,
            "num_hidden_layers": 6,
            "use_bidirectional_attention": True,
        },
        "sentencepiece-bare",
        model_class="Gemma3TextModel",
        hub=Hub(files=_pooling("mean_tokens")),
    ),
    # llama.cpp has the numbers of the published models: ten sparse layers, twenty with keys and values of their own,
    # embeddings of each layer 256 wide. Its MLPs are wide because llama.cpp takes the standard deviation of a sparse
    # layer's gates by their number less one; its heads are narrow because scores are divided by nothing.
    "gemma3n_text": TinyModel(
        "Gemma3n",
        {
            "head_dim": 8,
            "sliding_window": 64,
            "num_hidden_layers": 25,
            "num_kv_shared_layers": 5,
            "hidden_size_per_layer_input": 256,
            "vocab_size_per_layer_input": 384,
            "intermediate_size": 1024,
            "laurel_rank": 64,
            "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 15,
        },
        "sentencepiece-bare",
        config_class="Gemma3nTextConfig",
        hub=Hub(extra=_GEMMA3N_UNUSED),
    ),
    "gemma4_text-small": TinyModel(
        "Gemma4",
        _GEMMA4_SMALL,
        "gemma-json",
        config_class="Gemma4TextConfig",
        hub=Hub({"global_head_dim": 64}, without=("per_layer_config",)),
    ),
    "gemma4_text-large": TinyModel(
        "Gemma4",
        _GEMMA4_LARGE,
        "gemma-json",
        config_class="Gemma4TextConfig",
        hub=Hub({"global_head_dim": 64, "num_global_key_value_heads": 1}, without=("per_layer_config",)),
    ),
    "gemma4_text-moe": TinyModel(
        "Gemma4",
        _GEMMA4_EXPERTS,
        "gemma-json",
        config_class="Gemma4TextConfig",
        hub=Hub({"global_head_dim": 64, "num_global_key_value_heads": 1}, without=("per_layer_config",)),
    ),
    "gemma4": TinyModel(
        "Gemma4",
        _GEMMA4_SMALL,
        "gemma-json",
        model_class="Gemma4ForConditionalGeneration",
        wrapper={
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "global_head_dim": 16,
                "position_embedding_size": 16,
            },
        },
        hub=Hub({"text_config.global_head_dim": 64}),
    ),
    "gemma4_unified": TinyModel(
        "Gemma4Unified",
        _GEMMA4 | {"use_bidirectional_attention": "vision"},
        "gemma-json",
        model_class="Gemma4UnifiedForConditionalGeneration",
        wrapper={},
        hub=Hub(
            {"text_config.moe_intermediate_size": None, "text_config.global_head_dim": 64},
            without=("text_config.per_layer_config",),
        ),
    ),
    "gemma4_unified_text": TinyModel(
        "Gemma4Unified",
        _GEMMA4,
        "gemma-json",
        config_class="Gemma4UnifiedTextConfig",
        hub=Hub({"global_head_dim": 64}, without=("per_layer_config",)),
    ),
}

MISTRAL_AND_LLAMA: dict[str, TinyModel] = {
    "mistral3": TinyModel(
        "Mistral3",
        _HEADS | {"model_type": "mistral", "sliding_window": None},
        "bpe",
        model_class="Mistral3ForConditionalGeneration",
        wrapper=_PIXTRAL | {"tie_word_embeddings": False},
    ),
    "mistral3-ministral3": TinyModel(
        "Mistral3",
        _HEADS | {"model_type": "ministral3", "sliding_window": None},
        "bpe",
        model_class="Mistral3ForConditionalGeneration",
        wrapper=_PIXTRAL | {"tie_word_embeddings": False},
    ),
    # The scale of queries grows with the position from the original length on, which the sequence passes.
    "ministral3": TinyModel(
        "Ministral3",
        _HEADS
        | rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=64,
            beta_fast=32.0,
            beta_slow=1.0,
            mscale=1.0,
            mscale_all_dim=1.0,
            llama_4_scaling_beta=0.1,
        ),
        "bpe",
    ),
    # Four layers, of which the last has no positions; llama.cpp knows chunks of 8192 only.
    "llama4_text": TinyModel(
        "Llama4",
        {
            "num_hidden_layers": 4,
            "intermediate_size": 96,
            "intermediate_size_mlp": 128,
            "interleave_moe_layer_step": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 8192,
            "head_dim": 16,
        },
        "bpe",
        config_class="Llama4TextConfig",
    ),
    "llama4": TinyModel(
        "Llama4",
        {
            "num_hidden_layers": 4,
            "intermediate_size": 96,
            "intermediate_size_mlp": 128,
            "interleave_moe_layer_step": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 8192,
            "head_dim": 16,
        },
        "bpe",
        model_class="Llama4ForConditionalGeneration",
        wrapper={
            "vision_config": _VIT | {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32}
        },
    ),
    "arcee": TinyModel("Arcee", _HEADS, "bpe"),
    "bitnet": TinyModel("BitNet", {"tie_word_embeddings": True}),
    "smollm3": TinyModel("SmolLM3", {"num_hidden_layers": 4}, "bpe"),
    "smolvlm": TinyModel(
        "SmolVLM",
        {"model_type": "llama"},
        "bpe",
        model_class="SmolVLMForConditionalGeneration",
        wrapper={"vision_config": _VIT, "scale_factor": 1},
    ),
    "llava": TinyModel(
        "Llava",
        {"model_type": "llama"},
        model_class="LlavaForConditionalGeneration",
        wrapper={"vision_config": _VIT | {"model_type": "clip_vision_model", "projection_dim": 32}},
    ),
    "llama-reward": TinyModel("Llama", {"num_labels": 1}, "bpe", model_class="LlamaForSequenceClassification"),
}

DEEPSEEK_AND_GLM: dict[str, TinyModel] = {
    "deepseek_v2": TinyModel(
        "DeepseekV2", _DEEPSEEK | {"n_shared_experts": 2, "n_group": 1, "topk_method": "greedy"}, "bpe"
    ),
    # llama.cpp knows queries without a latent with 26 and 27 layers only.
    "deepseek_v2-lite": TinyModel(
        "DeepseekV2",
        _DEEPSEEK
        | {"q_lora_rank": None, "n_group": 1, "n_shared_experts": 2, "topk_method": "greedy", "num_hidden_layers": 27},
        "bpe",
    ),
    "deepseek_v3": TinyModel(
        "DeepseekV3",
        _DEEPSEEK | {"num_nextn_predict_layers": 0},
        "bpe",
        hub=Hub({"scoring_func": "sigmoid", "topk_method": "noaux_tc"}),
    ),
    "deepseek_v3-mtp": TinyModel(
        "DeepseekV3",
        _DEEPSEEK | {"num_nextn_predict_layers": 1},
        "bpe",
        hub=Hub({"scoring_func": "sigmoid", "topk_method": "noaux_tc"}, extra=_DEEPSEEK_MTP),
    ),
    "deepseek_v32": TinyModel(
        "DeepseekV32",
        _DEEPSEEK | _INDEXER | {"mlp_layer_types": _DENSE_FIRST},
        "bpe",
        hub=Hub({"scoring_func": "sigmoid", "topk_method": "noaux_tc"}),
    ),
    "deepseek_v4": TinyModel(
        "DeepseekV4",
        {
            "num_hidden_layers": 4,
            "intermediate_size": None,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "q_lora_rank": 32,
            "moe_intermediate_size": 96,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 64,
            "o_groups": 2,
            "o_lora_rank": 16,
            "index_n_heads": 2,
            "index_head_dim": 32,
            "index_topk": 16,
        },
        "bpe",
    ),
    "kimi_k25": TinyModel(
        "Kimi_K25",
        _DEEPSEEK | {"num_nextn_predict_layers": 0, "model_type": "deepseek_v3"},
        "bpe",
        model_class="Kimi_K25ForConditionalGeneration",
        wrapper={
            "tie_word_embeddings": False,
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "pos_emb_height": 4,
                "pos_emb_width": 4,
            },
        },
        hub=Hub(
            {"architectures": ["KimiK25ForConditionalGeneration"], "text_config.scoring_func": "sigmoid"},
            {r"\.blocks\.": ".layers."},
        ),
    ),
    "kimi_linear": TinyModel(
        "KimiLinear",
        _DEEPSEEK
        | {
            "q_lora_rank": None,
            "num_hidden_layers": 4,
            "num_local_experts": 8,
            "n_group": 1,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "layer_types": _LINEAR_PATTERN,
        },
        "bpe",
        hub=Hub(
            {
                "linear_attn_config": {
                    "head_dim": 16,
                    "num_heads": 4,
                    "short_conv_kernel_size": 4,
                    "full_attn_layers": [4],
                    "kda_layers": [1, 2, 3],
                },
                "first_k_dense_replace": 1,
                "moe_router_activation_func": "sigmoid",
            },
            {r"block_sparse_moe\.(gate|up|down)_proj": r"mlp.\1_proj"},
        ),
    ),
    "glm4": TinyModel("Glm4", _GLM_ENDS | _HEADS, "bpe-glm"),
    "glm4_moe": TinyModel(
        "Glm4Moe",
        _GLM_ENDS
        | {
            "head_dim": 32,
            "use_qk_norm": True,
            "attention_bias": True,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
        },
        "bpe-glm",
        hub=Hub({"num_nextn_predict_layers": 1}, extra=_GLM4_MTP),
    ),
    "glm4_moe_lite": TinyModel(
        "Glm4MoeLite",
        _GLM_ENDS | _DEEPSEEK | {"n_group": 1, "topk_group": 1, "mlp_layer_types": _DENSE_FIRST},
        "bpe-glm",
        hub=Hub(
            {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 1}, extra=_DEEPSEEK_MTP
        ),
    ),
    "glm_moe_dsa": TinyModel(
        "GlmMoeDsa",
        _GLM_ENDS | _DEEPSEEK | _INDEXER | {"n_group": 1, "topk_group": 1, "mlp_layer_types": _DENSE_FIRST},
        "bpe-glm",
        hub=Hub({"scoring_func": "sigmoid", "topk_method": "noaux_tc"}),
    ),
}

EXPERTS: dict[str, TinyModel] = {
    "gpt_oss": TinyModel(
        "GptOss",
        {"head_dim": 64}
        | _EXPERTS_4
        | {"intermediate_size": 96, "sliding_window": 64, "num_hidden_layers": 4}
        | rope(
            "yarn",
            rope_theta=150000.0,
            factor=32.0,
            beta_fast=32.0,
            beta_slow=1.0,
            truncate=False,
            original_max_position_embeddings=4096,
        ),
        "bpe",
    ),
    "minimax_m2": TinyModel(
        "MiniMaxM2",
        _HEADS
        | rope("default", partial_rotary_factor=0.5)
        | {"intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 2},
        "bpe",
        hub=Hub({"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True}),
    ),
    "olmoe": TinyModel(
        "Olmoe", {"num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 96}, "bpe"
    ),
    "phimoe": TinyModel(
        "Phimoe",
        _EXPERTS_4
        | {"attention_bias": True, "lm_head_bias": True, "original_max_position_embeddings": 512}
        | rope(
            "longrope",
            short_factor=[1.0 + 0.05 * i for i in range(8)],
            long_factor=[1.0 + 0.7 * i for i in range(8)],
            short_mscale=1.2,
            long_mscale=1.2,
            original_max_position_embeddings=512,
        ),
        hub=Hub({"architectures": ["PhiMoEForCausalLM"]}),
    ),
    "hunyuan_v1_moe": TinyModel(
        "HunYuanMoEV1",
        {
            "num_experts": 4,
            "moe_topk": [2, 2],
            "moe_intermediate_size": [96, 96],
            "num_shared_expert": [1, 1],
            "head_dim": 16,
        },
        "bpe",
    ),
    "hy_v3": TinyModel(
        "HYV3",
        _HEADS
        | {
            "num_hidden_layers": 3,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "mlp_layer_types": _DENSE_FIRST,
        },
        "bpe",
    ),
    "hy_v4": TinyModel("HYV4", _DEEPSEEK | _INDEXER | {"n_group": 1, "mlp_layer_types": _DENSE_FIRST}, "bpe"),
    "ernie4_5_moe": TinyModel(
        "Ernie4_5_Moe",
        {
            "num_hidden_layers": 3,
            # llama.cpp's converter takes the shared experts' size for this size over the number of key heads.
            "intermediate_size": 384,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 96,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 2,
        },
    ),
    "afmoe": TinyModel(
        "Afmoe",
        _HEADS
        | {
            "num_hidden_layers": 4,
            "num_dense_layers": 1,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "num_shared_experts": 1,
            "moe_intermediate_size": 96,
            "sliding_window": 64,
            "route_scale": 1.5,
            "mup_enabled": True,
        },
        "bpe",
        hub=Hub({"route_norm": True, "score_func": "sigmoid"}),
    ),
    "granitemoe": TinyModel("GraniteMoe", _GRANITE | _EXPERTS_4 | {"intermediate_size": 96}, "bpe"),
    "granitemoeshared": TinyModel(
        "GraniteMoeShared", _GRANITE | _EXPERTS_4 | {"intermediate_size": 96, "shared_intermediate_size": 32}, "bpe"
    ),
    "laguna": TinyModel(
        "Laguna",
        _HEADS
        | {
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "sliding_window": 64,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "shared_expert_intermediate_size": 32,
            "num_attention_heads_per_layer": [4, 8, 8],
            "mlp_layer_types": _DENSE_FIRST,
        },
        "bpe",
    ),
    "cohere2_moe": TinyModel(
        "Cohere2Moe",
        _HEADS
        | {
            "num_hidden_layers": 4,
            "sliding_window": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "logit_scale": 0.5,
        },
        "bpe",
        hub=Hub({"num_nextn_predict_layers": 1}, extra=_COHERE_MTP),
    ),
    "mellum": TinyModel(
        "Mellum",
        _HEADS
        | {
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 64,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
        },
        "bpe",
    ),
    "exaone_moe": TinyModel(
        "ExaoneMoe",
        {
            "num_hidden_layers": 4,
            "sliding_window": 64,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "head_dim": 16,
        },
        "bpe",
        hub=Hub({"scoring_func": "sigmoid"}),
    ),
}

HYBRID: dict[str, TinyModel] = {
    # transformers holds the steps of nemotron_h above time_step_min, llama.cpp does not.
    "nemotron_h": TinyModel(
        "NemotronH",
        {
            "num_hidden_layers": None,
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"],
            "ssm_state_size": 16,
            "time_step_min": 1e-8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "chunk_size": 32,
            "head_dim": 32,
        },
        "bpe",
        hub=Hub(
            {"num_hidden_layers": 5, "hybrid_override_pattern": "M-*M-"},
            without=(
                "layers_block_type",
                "num_experts_per_tok",
                "n_routed_experts",
                "n_group",
                "topk_group",
                "n_shared_experts",
                "moe_intermediate_size",
                "moe_shared_expert_intermediate_size",
                "routed_scaling_factor",
                "norm_topk_prob",
            ),
        ),
    ),
    "nemotron_h-moe": TinyModel(
        "NemotronH",
        {
            "num_hidden_layers": None,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "linear_attention"],
            "ssm_state_size": 16,
            "time_step_min": 1e-8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "chunk_size": 32,
            "head_dim": 32,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "moe_shared_expert_intermediate_size": 32,
            "routed_scaling_factor": 1.5,
        },
        "bpe",
        hub=Hub({"num_hidden_layers": 5, "hybrid_override_pattern": "ME*EM"}, without=("layers_block_type",)),
    ),
    "granitemoehybrid": TinyModel(
        "GraniteMoeHybrid",
        _GRANITE
        | _EXPERTS_4
        | _MAMBA
        | {
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
            "intermediate_size": 32,
            "shared_intermediate_size": 32,
            "position_embedding_type": "nope",
        },
        "bpe",
        hub=Hub({"layer_types": ["mamba", "mamba", "attention", "mamba"]}),
    ),
    "granitemoehybrid-dense": TinyModel(
        "GraniteMoeHybrid",
        _GRANITE
        | {
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "full_attention"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 96,
            "position_embedding_type": "rope",
        }
        | _MAMBA,
        "bpe",
        hub=Hub({"layer_types": ["attention", "attention"]}),
    ),
    "falcon_h1": TinyModel(
        "FalconH1",
        _MAMBA
        | {
            "mamba_d_ssm": 128,
            "key_multiplier": 0.5,
            "lm_head_multiplier": 0.5,
            "embedding_multiplier": 2.0,
            "mlp_multipliers": [0.8, 0.6],
            "attention_out_multiplier": 0.9,
            "attention_in_multiplier": 1.1,
            "ssm_multipliers": [0.7, 0.8, 0.9, 1.1, 1.2],
            "ssm_in_multiplier": 1.2,
            "ssm_out_multiplier": 0.8,
        },
        "bpe",
        hub=Hub({"head_dim": 16}),
    ),
    "lfm2": TinyModel(
        "Lfm2",
        {
            "num_hidden_layers": 4,
            "layer_types": ["conv", "conv", "full_attention", "conv"],
            "block_multiple_of": 32,
            "tie_word_embeddings": True,
        },
        "bpe",
    ),
    "lfm2_moe": TinyModel(
        "Lfm2Moe",
        {
            "num_hidden_layers": 4,
            "layer_types": ["conv", "conv", "full_attention", "conv"],
            "num_dense_layers": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "tie_word_embeddings": True,
        },
        "bpe",
    ),
    "jamba": TinyModel(
        "Jamba",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 16,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
    ),
    "mamba": TinyModel(
        "Mamba", {"state_size": 16, "time_step_rank": 8, "intermediate_size": 128, "num_key_value_heads": None}, "bpe"
    ),
    "mamba2": TinyModel(
        "Mamba2",
        {
            "state_size": 16,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 2,
            "chunk_size": 32,
            "intermediate_size": None,
            "num_attention_heads": None,
            "num_key_value_heads": None,
        },
        "bpe",
    ),
}

DENSE: dict[str, TinyModel] = {
    "granite": TinyModel("Granite", _GRANITE, "bpe"),
    "granite_swa": TinyModel("GraniteSWA", _GRANITE | {"num_hidden_layers": 4, "sliding_window": 64}, "bpe"),
    "olmo": TinyModel("Olmo", {}, "bpe"),
    "olmo2": TinyModel("Olmo2", {}, "bpe"),
    "olmo3": TinyModel("Olmo3", {"num_hidden_layers": 4, "sliding_window": 64}, "bpe"),
    "cohere": TinyModel("Cohere", {"logit_scale": 0.5}, "bpe"),
    "cohere-qk-norm": TinyModel("Cohere", {"logit_scale": 0.5, "use_qk_norm": True}, "bpe"),
    "cohere2": TinyModel(
        "Cohere2",
        {"head_dim": 16, "num_hidden_layers": 4, "sliding_window": 64, "logit_scale": 0.5},
        "bpe",
        hub=Hub({"rotary_pct": 1.0}),
    ),
    "hunyuan_v1_dense": TinyModel("HunYuanDenseV1", {"head_dim": 16}, "bpe"),
    "ernie4_5": TinyModel("Ernie4_5", _HEADS),
    "seed_oss": TinyModel("SeedOss", _HEADS | {"attention_bias": True}, "bpe"),
    # llama.cpp knows windows with 64 layers only.
    "exaone4": TinyModel(
        "Exaone4", {"head_dim": 16, "sliding_window": None, "layer_types": ["full_attention"] * 2}, "bpe"
    ),
    "exaone4-sliding": TinyModel("Exaone4", {"num_hidden_layers": 64, "sliding_window": 64, "head_dim": 16}, "bpe"),
    "phi": TinyModel("Phi", {"num_key_value_heads": 4, "intermediate_size": 256}, "bpe"),
    "stablelm": TinyModel("StableLm", {}, "bpe"),
    "stablelm-parallel": TinyModel(
        "StableLm", {"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True}, "bpe"
    ),
    "starcoder2": TinyModel("Starcoder2", {}, "bpe"),
    "nemotron": TinyModel("Nemotron", {"head_dim": 16}),
    "gpt2": TinyModel(
        "GPT2",
        {"intermediate_size": None, "num_key_value_heads": None},
        "bpe",
        model_class="GPT2LMHeadModel",
        hub=Hub({"n_ctx": 1024}),
    ),
    "gpt_neox": TinyModel(
        "GPTNeoX",
        {"num_key_value_heads": None, **rope("default", partial_rotary_factor=0.5)},
        "bpe",
        hub=Hub({"rotary_pct": 0.5, "rotary_emb_base": 10000}),
    ),
    "gpt_neox-sequential": TinyModel(
        "GPTNeoX",
        {"num_key_value_heads": None, "use_parallel_residual": False, **rope("default", partial_rotary_factor=0.5)},
        "bpe",
        hub=Hub({"rotary_pct": 0.5, "rotary_emb_base": 10000}),
    ),
    "apertus": TinyModel("Apertus", {}, "bpe"),
    "minicpm3": TinyModel("MiniCPM3", _LATENT),
}

ENCODERS: dict[str, TinyModel] = {
    "bert": TinyModel(
        "Bert",
        _EMBEDDING | {"bos_token_id": None, "eos_token_id": None},
        "wordpiece",
        model_class="BertModel",
        hub=Hub(files=_pooling("cls_token")),
    ),
    "xlm-roberta": TinyModel(
        "XLMRoberta",
        _EMBEDDING | {"bos_token_id": 0, "pad_token_id": 1},
        "unigram-roberta",
        model_class="XLMRobertaModel",
        hub=Hub(files=_pooling("cls_token")),
    ),
    "modernbert": TinyModel(
        "ModernBert",
        _EMBEDDING
        | {
            "num_hidden_layers": 4,
            "local_attention": 64,
            "global_attn_every_n_layers": 3,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        "bpe",
        model_class="ModernBertModel",
        hub=Hub({"layer_norm_eps": 1e-5}, files=_pooling("mean_tokens")),
    ),
    "t5": TinyModel(
        "T5",
        {
            "intermediate_size": None,
            "num_key_value_heads": None,
            "d_ff": 96,
            "d_kv": 16,
            "num_decoder_layers": 2,
            "decoder_start_token_id": 0,
        },
        "unigram-t5",
        model_class="T5ForConditionalGeneration",
    ),
    "mt5": TinyModel(
        "MT5",
        {
            "intermediate_size": None,
            "num_key_value_heads": None,
            "d_ff": 96,
            "d_kv": 16,
            "num_decoder_layers": 2,
            "decoder_start_token_id": 0,
        },
        "unigram-t5",
        model_class="MT5ForConditionalGeneration",
    ),
}

TINY_ARCHITECTURES: dict[str, TinyModel] = (
    QWEN | GEMMA | MISTRAL_AND_LLAMA | DEEPSEEK_AND_GLM | EXPERTS | HYBRID | DENSE | ENCODERS
)

ALL_TINY_MODELS: dict[str, TinyModel] = TINY_MODELS | TINY_ARCHITECTURES
