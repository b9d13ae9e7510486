"""Model maps and evidence for decisions, without a model."""

import numpy as np

from bitwright.formats.registry import FORMATS
from bitwright.profiles.evidence import Evidence
from bitwright.profiles.vocabulary import ModelMap, Role, TensorSpec

N_LAYERS = 8
WEIGHT = "blk.{}.{}.weight"

# Structural kinds of layers, as (name, role, shape in units of the width).
_ATTENTION = (
    ("attn_norm", Role.NORM, (1,)),
    ("attn_q", Role.ATTENTION_QUERY, (1, 1)),
    ("attn_k", Role.ATTENTION_KEY, (0.25, 1)),
    ("attn_v", Role.ATTENTION_VALUE, (0.25, 1)),
    ("attn_output", Role.ATTENTION_OUTPUT, (1, 1)),
)
_FUSED_ATTENTION = (("attn_qkv", Role.ATTENTION_QKV, (1.5, 1)), ("attn_output", Role.ATTENTION_OUTPUT, (1, 1)))
_MLP = (("ffn_gate", Role.MLP_GATE, (2, 1)), ("ffn_up", Role.MLP_UP, (2, 1)), ("ffn_down", Role.MLP_DOWN, (1, 2)))
_FUSED_MLP = (("ffn_up", Role.MLP_GATE_UP, (4, 1)), ("ffn_down", Role.MLP_DOWN, (1, 2)))
_EXPERTS = (
    ("ffn_gate_inp", Role.ROUTER, (4 / 256, 1)),
    ("ffn_gate_exps", Role.EXPERT_GATE, (4, 1, 1)),
    ("ffn_up_exps", Role.EXPERT_UP, (4, 1, 1)),
    ("ffn_down_exps", Role.EXPERT_DOWN, (4, 1, 1)),
)
_SHARED = (
    ("ffn_gate_shexp", Role.SHARED_EXPERT_GATE, (1, 1)),
    ("ffn_up_shexp", Role.SHARED_EXPERT_UP, (1, 1)),
    ("ffn_down_shexp", Role.SHARED_EXPERT_DOWN, (1, 1)),
)
KINDS = {
    "dense": lambda layer: _ATTENTION + _MLP,
    "fused": lambda layer: _FUSED_ATTENTION + _FUSED_MLP,
    "experts": lambda layer: _ATTENTION + _EXPERTS,
    "experts after dense layers": lambda layer: _ATTENTION + (_MLP if layer < 2 else _EXPERTS + _SHARED),
}


def model_map(kind: str = "dense", width: int = 256, tied: bool = False) -> ModelMap:
    tensors = [TensorSpec("token_embd.weight", (1000, width), Role.EMBEDDING)]
    for layer in range(N_LAYERS):
        for name, role, shape in KINDS[kind](layer):
            sizes = [round(n * width) if i >= len(shape) - 2 else int(n) for i, n in enumerate(shape)]
            full_name = WEIGHT.format(layer, name)
            tensors.append(TensorSpec(full_name, tuple(sizes), role, layer, scale_applied=True))
    tensors.append(TensorSpec("output_norm.weight", (width,), Role.NORM))
    if not tied:
        tensors.append(TensorSpec("output.weight", (1000, width), Role.OUTPUT))
    return ModelMap("llama", N_LAYERS, tuple(tensors))


def matrices(of: ModelMap) -> list[TensorSpec]:
    return [t for t in of.tensors if t.quantizable]


def evidence(of: ModelMap, seed: int = 0, noise: float = 0.2) -> Evidence:
    """Losses that fall with the square of the step, a quarter a bit, each tensor's from a scale of its own."""
    random = np.random.default_rng(seed)
    losses = {}
    for tensor in matrices(of):
        scale = random.lognormal(-3, 1.5) * tensor.n_weights / 1e5
        losses[tensor.name] = {
            name: scale * 4.0**-block_format.bits_per_weight * random.lognormal(0, noise)
            for name, block_format in FORMATS.items()
            if block_format.fits(tensor.n_columns) and block_format.block_size > 1
        }
    scores = {layer: float(random.random()) for layer in range(of.n_layers)}
    return Evidence(losses, scores, "evidence")
