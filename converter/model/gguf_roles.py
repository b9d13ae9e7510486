"""The role of a GGUF tensor by its name alone: llama.cpp gives equal parts equal names in all architectures."""

import re

from bitwright.profiles.vocabulary import Role

# Names without their layer and their ending, as gguf.TENSOR_NAMES and newer tables of llama.cpp have them. What is not
# here has a use that these roles do not describe: low-rank steps of other recurrent models, experts and
# towers for images and sound, heads that classify.
_NAMES: dict[Role, tuple[str, ...]] = {
    Role.EMBEDDING: ("token_embd",),
    Role.OUTPUT: ("output",),
    Role.MTP: ("nextn.eh_proj", "nextn.embed_tokens", "nextn.shared_head_head"),
    Role.POSITION: ("position_embd", "token_types", "attn_rel_b", "cross_attn_rel_b", "attn_compressor_ape"),
    Role.ROPE: ("rope_freqs", "rope_factors_long", "rope_factors_short", "attn_rot_embd"),
    Role.ROUTER: ("ffn_gate_inp", "ffn_gate_inp_shexp", "altup_router"),
    Role.BIAS: ("exp_probs_b", "exp_probs_b_vl"),
    Role.SINK: ("attn_sinks",),
    Role.ATTENTION_QUERY: ("attn_q", "cross_attn_q", "time_mix_receptance"),
    Role.ATTENTION_KEY: ("attn_k", "cross_attn_k", "time_mix_key"),
    Role.ATTENTION_VALUE: ("attn_v", "cross_attn_v", "time_mix_value"),
    Role.ATTENTION_QKV: ("attn_qkv",),
    Role.ATTENTION_OUTPUT: (
        "attn_output",
        "attn_o",
        "attn_output_a",
        "attn_output_b",
        "cross_attn_o",
        "time_mix_output",
    ),
    Role.ATTENTION_GATE: ("attn_gate", "attn_v_gate", "ssm_g", "ssm_g_a", "ssm_g_b", "time_mix_gate"),
    Role.ATTENTION_QUERY_DOWN: ("attn_q_a",),
    Role.ATTENTION_QUERY_UP: ("attn_q_b",),
    Role.ATTENTION_LATENT: ("attn_kv_a_mqa", "attn_kv", "attn_compressor_kv", "attn_compressor_gate"),
    Role.ATTENTION_KEY_UP: ("attn_k_b",),
    Role.ATTENTION_VALUE_UP: ("attn_v_b",),
    Role.ATTENTION_KEY_VALUE_UP: ("attn_kv_b",),
    Role.ATTENTION_INDEXER: (
        *("indexer.proj", "indexer.attn_k", "indexer.attn_q_b", "indexer.k_proj", "indexer.q_proj"),
        *("indexer_compressor_kv", "indexer_compressor_gate"),
    ),
    Role.MLP_GATE: ("ffn_gate", "channel_mix_receptance"),
    Role.MLP_UP: ("ffn_up", "channel_mix_key"),
    Role.MLP_DOWN: ("ffn_down", "channel_mix_value"),
    Role.EXPERT_GATE: ("ffn_gate_exps", "ffn_gate_chexps"),
    Role.EXPERT_UP: ("ffn_up_exps", "ffn_up_chexps", "ffn_gate_up_exps"),
    Role.EXPERT_DOWN: ("ffn_down_exps", "ffn_down_chexps"),
    Role.SHARED_EXPERT_GATE: ("ffn_gate_shexp",),
    Role.SHARED_EXPERT_UP: ("ffn_up_shexp",),
    Role.SHARED_EXPERT_DOWN: ("ffn_down_shexp",),
    Role.SSM_INPUT: ("ssm_in",),
    Role.SSM_OUTPUT: ("ssm_out",),
    Role.SSM_PARAMETERS: ("ssm_x",),
    Role.SSM_STEP: ("ssm_dt",),
    Role.SSM_DECAY: ("ssm_alpha", "ssm_beta", "ssm_ba", "ssm_beta_alpha", "ssm_f_a", "ssm_f_b"),
    Role.SSM_STATE: ("ssm_a", "ssm_d"),
    Role.CONV: ("ssm_conv1d", "ssm_conv1d_q", "ssm_conv1d_k", "ssm_conv1d_v", "shortconv.conv"),
    Role.CONV_INPUT: ("shortconv.in_proj",),
    Role.CONV_OUTPUT: ("shortconv.out_proj",),
    Role.PER_LAYER_EMBEDDING: ("per_layer_token_embd",),
    Role.PER_LAYER_PROJECTION: ("per_layer_model_proj", "inp_gate", "proj", "ffn_latent_down", "ffn_latent_up"),
    Role.SCALE: ("layer_output_scale",),
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names}
# "attn_norm", "post_ffw_norm_1", "ffn_norm_exps", "nextn.enorm".
_NORM = re.compile(r"[a-z_.]*norm(_\d+|_exps)?|time_mix_ln")
_LAYER = re.compile(r"(?:(?:enc|dec)\.)?blk\.(\d+)\.")
# Of other parts than the text model; the one after a dot that is no layer's.
_TOWER = re.compile(r"(v|a|mm|resampler|convnext|posnet|cls)\.")
_SSM_STEP_BIAS = "ssm_dt.bias"


def layer_of(name: str) -> int | None:
    """The layer that a GGUF tensor belongs to by its name; None outside of the layers."""
    return int(match[1]) if (match := _LAYER.match(name)) else None


def role_of(name: str) -> Role | None:
    """The role of a GGUF tensor by its name, "blk.3.attn_q.weight"; None for one that nobody here knows."""
    if _TOWER.match(name):
        return None
    own = _LAYER.sub("", name, count=1).removeprefix("enc.").removeprefix("dec.")
    stem, _, ending = own.rpartition(".")
    if ending not in ("weight", "bias", "scale"):
        stem, ending = own, "weight"
    role = _ROLES.get(stem) or (Role.NORM if _NORM.fullmatch(stem) else None)
    if own == _SSM_STEP_BIAS:
        return Role.SSM_STATE
    if role is None or ending == "weight":
        return role
    return Role.BIAS if ending == "bias" else Role.SCALE
