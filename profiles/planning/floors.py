"""The least bits of tensors that a rule made for others must not reach by accident.

They are small beside what they decide: the latent that every key and value of a layer is made of, the steps and the
decay of a state space, what chooses the tokens that attention sees. Of some no importance is measured: matrices that
the runtime computes with in another way than the model, and the layers that predict several tokens (MTP), which the
model is calibrated without. A rule or an override that names such a role itself, without a wildcard, or the tensor, may
go below.
"""

from collections.abc import Mapping

from bitwright.formats.registry import get_format
from bitwright.profiles.reading.rules import LayerQuantizationConfig
from bitwright.profiles.vocabulary import Role, TensorSpec

ROLE_FLOORS: Mapping[Role, str] = {
    Role.ATTENTION_QUERY_DOWN: "Q6_K",
    Role.ATTENTION_LATENT: "Q6_K",
    Role.ATTENTION_KEY_UP: "Q6_K",
    Role.ATTENTION_VALUE_UP: "Q6_K",
    Role.ATTENTION_KEY_VALUE_UP: "Q6_K",
    Role.ATTENTION_INDEXER: "Q8_0",
    Role.SSM_PARAMETERS: "Q8_0",
    Role.SSM_STEP: "Q8_0",
    Role.SSM_DECAY: "Q8_0",
    Role.SSM_INPUT: "IQ3_S",
    Role.SSM_OUTPUT: "IQ3_S",
    Role.CONV_INPUT: "IQ3_S",
    Role.CONV_OUTPUT: "IQ3_S",
    Role.PER_LAYER_EMBEDDING: "IQ4_XS",
    Role.PER_LAYER_PROJECTION: "Q6_K",
    Role.MTP: "Q6_K",
    **dict.fromkeys((Role.SHARED_EXPERT_GATE, Role.SHARED_EXPERT_UP, Role.SHARED_EXPERT_DOWN), "IQ2_XXS"),
}

UNMEASURED = "Q6_K"
"""Of a tensor whose role has no floor, where nothing can be measured of it."""

# Small, and of more effect than any saving; runtimes keep them whole or compute with them in float32.
_WHOLE = frozenset(
    {Role.ATTENTION_INDEXER, Role.SSM_PARAMETERS, Role.SSM_STEP, Role.SSM_DECAY, Role.PER_LAYER_PROJECTION}
)


def least_bits(role: Role) -> float:
    """Bits a weight that a tensor of this role has at least; 0 where it has no floor."""
    return get_format(ROLE_FLOORS[role]).bits_per_weight if role in ROLE_FLOORS else 0.0


def kept_whole(tensor: TensorSpec, rule: LayerQuantizationConfig | None) -> str | None:
    """Why a directory keeps a tensor in 16 bits, where no scheme of 8 bits with rounded inputs should reach it; None
    for all others. rule: the one that chose its scheme, None where none did."""
    if tensor.role not in _WHOLE or _names_it(rule, tensor):
        return None
    return f"{tensor.role}: in 16 bits unless a rule names it"


def raised(tensor: TensorSpec, chosen: str, reason: str, rule: LayerQuantizationConfig | None) -> tuple[str, str]:
    """The format that is chosen for a tensor, or its role's floor where that has more bits, and the reason. rule: the
    one that chose it, None where none did."""
    floor = ROLE_FLOORS.get(tensor.role)
    if floor is None or get_format(floor).bits_per_weight <= get_format(chosen).bits_per_weight:
        return chosen, reason
    if _names_it(rule, tensor):
        return chosen, reason
    return floor, f"{reason}; never below {floor}: {tensor.role}"


def _names_it(rule: LayerQuantizationConfig | None, tensor: TensorSpec) -> bool:
    """Whether a rule speaks of this role itself, without a wildcard, or of tensors by their names."""
    return rule is not None and (bool(rule.tensors) or tensor.role in rule.roles)
