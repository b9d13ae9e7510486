"""A plan in a few rows and lines, for people."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from bitwright.formats.registry import get_format
from bitwright.profiles.planning.assign import scale_of
from bitwright.profiles.planning.plan import Plan
from bitwright.profiles.sizes import size_text
from bitwright.profiles.vocabulary import EXPERT_ROLES, SHARED_EXPERT_ROLES, UNQUANTIZED_ROLES, Role

_GROUPS: Mapping[str, frozenset[Role]] = {
    "embedding": frozenset({Role.EMBEDDING}),
    "output": frozenset({Role.OUTPUT}),
    "attention": frozenset(role for role in Role if role.startswith("attention_")),
    "state space": frozenset(role for role in Role if role.startswith(("ssm_", "conv_"))) - UNQUANTIZED_ROLES,
    "mlp": frozenset(role for role in Role if role.startswith("mlp_")),
    "experts": EXPERT_ROLES | SHARED_EXPERT_ROLES,
    "mtp": frozenset({Role.MTP}),
    "per layer": frozenset({Role.PER_LAYER_EMBEDDING, Role.PER_LAYER_PROJECTION}),
    "norms, routers": UNQUANTIZED_ROLES - {Role.OTHER},
    "other parts": frozenset({Role.OTHER}),
}


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of a plan that do the same. formats: name -> tensors in it, the most frequent first. share: of the plan's
    bytes."""

    group: str
    tensors: int
    formats: dict[str, int]
    weights: int
    bytes: int
    bits_per_weight: float
    share: float


def tensor_groups(plan: Plan) -> list[TensorGroup]:
    """Formats, weights and bytes of each group that the plan has tensors of."""
    groups = []
    for name, roles in _GROUPS.items():
        members = [planned for planned in plan.tensors if planned.tensor.role in roles]
        if members:
            formats = Counter(planned.format for planned in members)
            n_bytes = sum(planned.n_bytes for planned in members)
            n_weights = sum(planned.tensor.n_weights for planned in members)
            of_format = dict(formats.most_common())
            bits, share = n_bytes * 8 / n_weights, n_bytes / plan.n_bytes
            groups.append(TensorGroup(name, len(members), of_format, n_weights, n_bytes, bits, share))
    return groups


def fallback_lines(plan: Plan) -> list[str]:
    """One line for each kind of fallback: what was wanted, what fits, and what that costs."""
    extra_bytes: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    for planned in plan.tensors:
        if planned.wanted is not None:
            extra_bytes[planned.wanted, planned.format, planned.tensor.n_columns].append(planned.extra_bytes)
    return [
        f"{len(extra)} tensors with rows of {n_columns} cannot be {wanted}: {chosen} instead,"
        f" {'+' if sum(extra) >= 0 else '-'}{size_text(abs(sum(extra)))}"
        for (wanted, chosen, n_columns), extra in extra_bytes.items()
    ]


def mtp_lines(plan: Plan) -> list[str]:
    """What is to be said of the layers that predict several tokens, where the plan has some."""
    formats = Counter(row.format for row in plan.tensors if row.tensor.role is Role.MTP)
    if not formats:
        return []
    chosen = ", ".join(f"{n} in {name}" for name, n in formats.most_common())
    return [
        f"the layers that predict several tokens (MTP) are kept (matrices: {chosen}); the model runs without them, so"
        " that nothing is measured of them: importance, sensitivity, super weights, error feedback"
    ]


def unscaled_lines(plan: Plan) -> list[str]:
    """One line for each format with second-level scales that some of its tensors go without."""
    without: dict[str, list[Role]] = defaultdict(list)
    for planned in plan.tensors:
        if get_format(planned.format).tensor_scale is not None and scale_of(planned.tensor, planned.format) is None:
            without[planned.format].append(planned.tensor.role)
    return [
        f"{len(roles)} tensors in {name} have the scales of their blocks alone: llama.cpp applies no second-level scale"
        f" to {', '.join(sorted(set(roles)))}"
        for name, roles in without.items()
    ]
