"""assign(profile, model map, overrides) -> Plan: every tensor's format by the profile's rules."""

from collections.abc import Sequence

from formats.block_format import BlockFormat, Effort
from formats.errors import ConvertError, nearest
from formats.registry import FORMATS, get_format
from profiles.plan import Plan, PlannedTensor
from profiles.schema import LayerQuantizationConfig, QuantizationProfile
from profiles.vocabulary import UNQUANTIZED_ROLES, ModelMap, Role, TensorSpec

# Formats a fallback may choose, the better encoder first where sizes are equal. Ternary, 1-bit and FP4 formats are made
# for models trained or hardware built for them: nobody should get one without asking.
_FALLBACKS = ("IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16")


def fitting_format(wanted: BlockFormat, n_columns: int) -> BlockFormat:
    """The wanted format, or the smallest one with at least as many bits whose block divides the row."""
    if wanted.fits(n_columns):
        return wanted
    candidates = [FORMATS[name] for name in _FALLBACKS if name in FORMATS]
    candidates = [c for c in candidates if c.fits(n_columns) and c.bits_per_weight >= wanted.bits_per_weight]
    return min(candidates, key=lambda c: c.bits_per_weight)


def _chosen_rule(
    tensor: TensorSpec, rules: Sequence[LayerQuantizationConfig], n_layers: int, tied: bool
) -> LayerQuantizationConfig | None:
    """The last rule that speaks of the tensor. Tied embeddings are the output head too, and the finer rule wins."""
    matching = [rule for rule in rules if rule.matches(tensor, n_layers)][-1:]
    if tied and tensor.role is Role.EMBEDDING:
        matching += [rule for rule in rules if rule.matches(tensor, n_layers, Role.OUTPUT)][-1:]
    return max(matching, key=lambda rule: get_format(rule.format).bits_per_weight, default=None)


def _plan_tensor(tensor: TensorSpec, wanted_name: str, reason: str) -> PlannedTensor:
    wanted = get_format(wanted_name)
    fitting = fitting_format(wanted, tensor.n_columns)
    if fitting is wanted:
        return PlannedTensor(tensor, wanted.name, reason)
    planned = PlannedTensor(
        tensor,
        fitting.name,
        f"{reason}; rows of {tensor.n_columns} are no multiple of {wanted.name}'s {wanted.block_size}: {fitting.name}",
        wanted.name,
    )
    return planned


def has_tensor_scale(planned: PlannedTensor, names: set[str]) -> bool:
    """Whether a second-level scale goes with the tensor. llama.cpp multiplies the product with it, which it does for
    the matrices of the layers only, and not where a bias is added to the product."""
    stem = planned.tensor.name.removesuffix(".weight")
    scaled = get_format(planned.format).tensor_scale is not None
    return scaled and planned.tensor.layer is not None and f"{stem}.bias" not in names


def _scale_of(planned: PlannedTensor) -> PlannedTensor:
    tensor = planned.tensor
    scale = TensorSpec(
        f"{tensor.name.removesuffix('.weight')}.scale",
        (tensor.n_matrices,),
        Role.SCALE,
        tensor.layer,
        transform="scale",
    )
    return PlannedTensor(scale, "F32", f"second-level scale of {planned.format}")


def assign(
    profile: QuantizationProfile,
    model_map: ModelMap,
    overrides: Sequence[LayerQuantizationConfig] = (),
    effort: Effort = "best",
) -> Plan:
    """Every tensor's format. Overrides come last; one that matches nothing is an error, as is one on a tensor that
    runtimes need in F32."""
    tied = not any(tensor.role is Role.OUTPUT for tensor in model_map.tensors)
    matrices = [t for t in model_map.tensors if t.role not in UNQUANTIZED_ROLES and len(t.shape) > 1]
    for override in overrides:
        if not any(override.matches(t, model_map.n_layers) for t in matrices):
            pattern = (override.roles + override.tensors)[0]
            known = sorted({t.role.value for t in matrices}) + [t.name for t in matrices]
            raise ConvertError(
                f"{pattern!r} matches no tensor that can be quantized", override.text, nearest(pattern, known)
            )
    planned: list[PlannedTensor] = []
    names = {tensor.name for tensor in model_map.tensors}
    for tensor in model_map.tensors:
        if tensor not in matrices:
            planned.append(PlannedTensor(tensor, "F32", f"{tensor.role}: runtimes compute with it in F32"))
            continue
        rule = _chosen_rule(tensor, profile.rules, model_map.n_layers, tied)
        for override in overrides:
            rule = override if override.matches(tensor, model_map.n_layers) else rule
        if rule is None:
            planned.append(_plan_tensor(tensor, profile.base, f"{profile.name}: base"))
        else:
            planned.append(_plan_tensor(tensor, rule.format, rule.text))
        if has_tensor_scale(planned[-1], names):
            planned.append(_scale_of(planned[-1]))
    return Plan(profile.name, effort, tuple(planned))
