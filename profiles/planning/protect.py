"""How super weights are protected: what each way does to a plan.

Every way works alone. `raise` gives the tensor a finer format; `pin` makes the encoder reproduce the weight; `rescale`
multiplies the up projection's row of the weight's neuron and divides its column, which changes no function and costs no
byte; `exclude` keeps the tensor out of quantization.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from bitwright.formats.pins import Pin
from bitwright.formats.registry import get_format
from bitwright.profiles.planning.plan import Plan, PlannedTensor
from bitwright.profiles.reading.protection import Protection
from bitwright.profiles.vocabulary import DOWN_ROLES, UP_OF_DOWN, ModelMap, Rescaled, Role, TensorSpec

AUTO_BITS = 3.0
"""Below so many bits per weight of a down projection `auto` looks for super weights: finer formats reproduce them."""


def looks_for_super_weights(protection: Protection, plan: Plan) -> bool:
    """Whether super weights have to be known for this plan."""
    if protection.super_weights == "auto":
        down = (p for p in plan.tensors if p.tensor.role in DOWN_ROLES)
        return any(get_format(p.format).bits_per_weight < AUTO_BITS for p in down)
    return protection.super_weights != "off"


def pin(plan: Plan, name: str, places: Iterable[tuple[int, int, int]], tolerance: float, why: str) -> Plan:
    """The plan with these weights of a tensor, (matrix, row, column), pinned."""

    def pinned(planned: PlannedTensor) -> PlannedTensor:
        rows = planned.tensor.n_rows // planned.tensor.n_matrices
        pins = tuple(Pin(matrix * rows + row, column, tolerance) for matrix, row, column in sorted(places))
        return replace(planned, pins=pins, reason=f"{planned.reason}; {why}")

    return _changed(plan, name, pinned)


def give_format(plan: Plan, name: str, format_name: str, why: str, kept_out: bool = False) -> Plan:
    """The plan with another format for a tensor; a scale that went with the old one goes, too."""
    scale = f"{name.removesuffix('.weight')}.scale"
    plan = replace(plan, tensors=tuple(p for p in plan.tensors if p.tensor.name != scale or p.tensor.sources))

    def given(planned: PlannedTensor) -> PlannedTensor:
        reason = f"{planned.reason}; {why}"
        return replace(planned, format=format_name, reason=reason, wanted=None, predicted_loss=None, kept_out=kept_out)

    return _changed(plan, name, given)


def rescaled_specs(
    model_map: ModelMap, name: str, factors: Mapping[tuple[int, int], float]
) -> dict[str, TensorSpec] | None:
    """The specs that change when neurons of a down projection are rescaled; None where there is no gated MLP that this
    is exact for.

    factors: (matrix, neuron) -> factor of the up projection's row, and of its bias; the down projection's column is
    divided by it.
    """
    down = model_map.tensor(name)
    up = next((t for t in model_map.tensors if t.layer == down.layer and t.role is UP_OF_DOWN.get(down.role)), None)
    first = 0
    if up is None and down.role is Role.MLP_DOWN:
        # Gate and up in one matrix, the gate's rows first.
        up = next((t for t in model_map.tensors if t.layer == down.layer and t.role is Role.MLP_GATE_UP), None)
        first = up.n_rows // 2 if up is not None else 0
    if up is None or up.n_matrices != down.n_matrices:
        return None
    in_order = sorted(factors.items())
    specs = {
        down.name: _with(down, [Rescaled("column", m, n, 1 / factor) for (m, n), factor in in_order]),
        up.name: _with(up, [Rescaled("row", m, first + n, factor) for (m, n), factor in in_order]),
    }
    bias_name = f"{up.name.removesuffix('.weight')}.bias"
    if bias := next((t for t in model_map.tensors if t.name == bias_name), None):
        specs[bias.name] = _with(bias, [Rescaled("column", 0, first + n, factor) for (_, n), factor in in_order])
    return specs


def with_specs(model_map: ModelMap, specs: Mapping[str, TensorSpec]) -> ModelMap:
    """The map with these tensors in the place of those of their names."""
    return replace(model_map, tensors=tuple(specs.get(t.name, t) for t in model_map.tensors))


def rescale(plan: Plan, specs: Mapping[str, TensorSpec], why: str) -> Plan:
    """The plan for tensors that are stored rescaled."""

    def stored(planned: PlannedTensor) -> PlannedTensor:
        return replace(planned, tensor=specs[planned.tensor.name], reason=f"{planned.reason}; {why}")

    for name in specs:
        plan = _changed(plan, name, stored)
    return plan


def _with(tensor: TensorSpec, rescaled: list[Rescaled]) -> TensorSpec:
    return replace(tensor, rescaled=(*tensor.rescaled, *rescaled))


def _changed(plan: Plan, name: str, change: Callable[[PlannedTensor], PlannedTensor]) -> Plan:
    return replace(plan, tensors=tuple(change(p) if p.tensor.name == name else p for p in plan.tensors))
