"""How super weights are protected: what a profile asks for, and what each way does to a plan.

Every way works alone. `raise` gives the tensor a finer format; `pin` makes the encoder reproduce the weight; `rescale`
multiplies the up projection's row of the weight's neuron and divides its column, which changes no function and costs no
byte; `exclude` keeps the tensor out of quantization.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from formats.errors import ConvertError, nearest
from formats.pins import Pin
from formats.registry import get_format
from profiles.plan import Plan, PlannedTensor
from profiles.strict import known_keys, number, one_table
from profiles.target import format_name
from profiles.vocabulary import DOWN_ROLES, ModelMap, Rescaled, Role, TensorSpec

Action = Literal["raise", "pin", "rescale", "exclude"]
Mode = Literal["auto", "off", "raise", "pin", "rescale", "exclude"]
_KEYS = ("super_weights", "tolerance", "raise_to")

AUTO_BITS = 3.0
"""Below so many bits per weight of a down projection `auto` looks for super weights: finer formats reproduce them."""


@dataclass(frozen=True)
class Protection:
    """A profile's table [protection].

    super_weights: "auto" takes what measurement shows to help, or one way for all, or "off". tolerance: the largest
    error, as a share of its magnitude, with which a super weight counts as covered. raise_to: the format of `raise`.
    """

    super_weights: Mode = "auto"
    tolerance: float = 0.05
    raise_to: str = "Q6_K"

    def looks(self, plan: Plan) -> bool:
        """Whether super weights have to be known for this plan."""
        if self.super_weights == "auto":
            down = (p for p in plan.tensors if p.tensor.role in DOWN_ROLES)
            return any(get_format(p.format).bits_per_weight < AUTO_BITS for p in down)
        return self.super_weights != "off"


def parse_mode(value: object, where: str) -> Mode:
    for mode in get_args(Mode):
        if value == mode:
            return mode
    raise ConvertError(f"unknown protection {value!r}", where, nearest(str(value), list(get_args(Mode))))


def parse_protection(table: object, where: str, inherited: Protection) -> Protection:
    """A profile's protection from its TOML table, on top of what it inherits."""
    table = one_table(table, where, "protection")
    known_keys(table, _KEYS, where)
    changes: dict = {}
    if "super_weights" in table:
        changes["super_weights"] = parse_mode(table["super_weights"], f"{where}, key super_weights")
    if "tolerance" in table:
        changes["tolerance"] = number(table["tolerance"], f"{where}, key tolerance")
    if "raise_to" in table:
        changes["raise_to"] = format_name(table["raise_to"], f"{where}, key raise_to", "gguf")
    return replace(inherited, **changes)


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
    plan = replace(plan, tensors=tuple(p for p in plan.tensors if p.tensor.name != scale))

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
    up = next((t for t in model_map.tensors if t.layer == down.layer and t.role is _UP_OF.get(down.role)), None)
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


_UP_OF = {
    Role.MLP_DOWN: Role.MLP_UP,
    Role.EXPERT_DOWN: Role.EXPERT_UP,
    Role.SHARED_EXPERT_DOWN: Role.SHARED_EXPERT_UP,
}


def with_specs(model_map: ModelMap, specs: Mapping[str, TensorSpec]) -> ModelMap:
    """The map with these tensors in the place of those of their names."""
    return replace(model_map, tensors=tuple(specs.get(t.name, t) for t in model_map.tensors))


def rescale(plan: Plan, specs: Mapping[str, TensorSpec], why: str) -> Plan:
    """The plan for tensors that are stored rescaled."""
    for name, spec in specs.items():
        plan = _changed(plan, name, lambda p, spec=spec: replace(p, tensor=spec, reason=f"{p.reason}; {why}"))
    return plan


def _with(tensor: TensorSpec, rescaled: list[Rescaled]) -> TensorSpec:
    return replace(tensor, rescaled=(*tensor.rescaled, *rescaled))


def _changed(plan: Plan, name: str, change) -> Plan:
    return replace(plan, tensors=tuple(change(p) if p.tensor.name == name else p for p in plan.tensors))
