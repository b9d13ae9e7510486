"""What a GGUF is called after: llama.cpp's mix of formats that its plan is nearest to, see profiles.mixes.

Hub, llama.cpp, Ollama and LM Studio read the name of a mix at the end of a file's name. A plan of our own is none of
these mixes; it is called after the one that takes the bytes of this model nearest to its own.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import log

from bitwright.formats.registry import get_format
from bitwright.profiles.evidence import Evidence
from bitwright.profiles.mixes import MIXES
from bitwright.profiles.planning.assign import assign
from bitwright.profiles.planning.plan import Plan
from bitwright.profiles.reading.budget import Budget
from bitwright.profiles.reading.rules import LayerQuantizationConfig
from bitwright.profiles.reading.schema import QuantizationProfile
from bitwright.profiles.vocabulary import ModelMap, Role, TensorSpec

# The share of embeddings, and of the output, in the weights of Llama-3.1-8B: 128256 x 4096 of 8.03e9.
_SHARE = 128256 * 4096 / 8.03e9

# What mixes of one format throughout are called where it is not the format's own name.
_PURE = {"Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S", "MXFP4": "MXFP4_MOE"}
# From this share of the layers' weights on, a plan is one of one format.
_NEARLY_ALL = 0.9

# The mean KL divergence of mixes of Llama-3-8B, in nats a token, of llama.cpp's tools/perplexity/README.md: what a file
# is called that is asked for by its divergence, whose size nobody knows before the measurement.
_USUAL_KLD = {
    "Q8_0": 0.0014,
    "Q6_K": 0.0055,
    "Q5_K_M": 0.011,
    "Q4_K_M": 0.031,
    "Q3_K_M": 0.10,
    "Q2_K": 0.45,
}


def mix_of(plan: Plan) -> str:
    """The mix that a plan of GGUF formats is called after: that of its goal, where it has one."""
    tensors = [row.tensor for row in plan.tensors]
    if plan.spent is not None:
        return _mix_of_goal(plan.spent.budget, tensors)
    in_layers: Counter[str] = Counter()
    for row in plan.tensors:
        if row.tensor.quantizable and row.tensor.layer is not None:
            in_layers[row.format] += row.tensor.n_weights
    (dominant, n), *_ = in_layers.most_common(1) or [("F32", 0)]
    if n >= _NEARLY_ALL * in_layers.total():
        return _PURE.get(dominant, dominant)
    return _nearest(plan.n_bytes, tensors)


def expected_mix(
    profile: QuantizationProfile, model_map: ModelMap, overrides: Sequence[LayerQuantizationConfig] = ()
) -> str:
    """The mix that the plan of this profile will be called after, before anything is measured: a file has its name
    before its plan is made. Raises ConvertError as `assign` does.

    Tiers are taken as if the layers were ranked in their order; layers of one model are about equally large.
    """
    profile = profile.by_rules()
    if profile.budget is not None and profile.budget.has_goal:
        return _mix_of_goal(profile.budget, model_map.tensors)
    in_order = Evidence({}, {layer: float(-layer) for layer in range(model_map.n_layers)}, "")
    return mix_of(assign(profile, model_map, overrides, evidence=in_order if profile.tiers else None))


def sized_like_its_mix(profile: QuantizationProfile, model_map: ModelMap) -> QuantizationProfile:
    """The same with the size of a mix as bits per weight, where its budget asks for that of a mix."""
    budget = profile.budget
    if budget is None or budget.mix is None:
        return profile
    return replace(profile, budget=replace(budget, bpw=mix_bits(budget.mix, model_map.tensors)))


def mix_bits(name: str, tensors: Sequence[TensorSpec]) -> float:
    """Bits a weight that llama.cpp's mix of this name takes of these matrices, about: its layers have the bits that
    they have in Llama-3.1-8B, and its embeddings and its output have their formats."""
    weights = _weights(tensors)
    mix = MIXES[name]
    embedding, output = (get_format(chosen).bits_per_weight for chosen in (mix.embedding, mix.output))
    layers = (mix.bits - _SHARE * (embedding + output)) / (1 - 2 * _SHARE)
    n_bits = {Role.EMBEDDING: embedding, Role.OUTPUT: output}
    return sum(n * n_bits.get(role, layers) for role, n in weights.items()) / max(1, weights.total())


def _weights(tensors: Sequence[TensorSpec]) -> Counter[Role]:
    """Weights of matrices by role, where embeddings that are the output, too, count as the output."""
    tied = not any(tensor.role is Role.OUTPUT for tensor in tensors)
    weights: Counter[Role] = Counter()
    for tensor in tensors:
        if tensor.quantizable:
            weights[Role.OUTPUT if tied and tensor.role is Role.EMBEDDING else tensor.role] += tensor.n_weights
    return weights


def _nearest(n_bytes: float, tensors: Sequence[TensorSpec]) -> str:
    """The mix that takes most nearly this many bytes of this model."""
    bits = n_bytes * 8 / max(1, sum(tensor.n_weights for tensor in tensors))
    return min(MIXES, key=lambda name: abs(mix_bits(name, tensors) - bits))


def _mix_of_goal(budget: Budget, tensors: Sequence[TensorSpec]) -> str:
    if budget.mix is not None:
        return budget.mix
    if budget.data_bytes is not None:
        return _nearest(budget.data_bytes, tensors)
    if budget.size is not None:
        return _nearest(budget.size, tensors)
    if budget.bpw is not None:
        return _nearest(budget.bpw * sum(tensor.n_weights for tensor in tensors) / 8, tensors)
    kld = budget.most_loss
    return min(_USUAL_KLD, key=lambda name: abs(log(_USUAL_KLD[name] / kld)))
