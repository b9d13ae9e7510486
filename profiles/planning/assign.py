"""assign(profile, model map, overrides, ...) -> Plan: every tensor's format, by rules, tiers, or a budget."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

from bitwright.formats.choices import Effort
from bitwright.formats.errors import ConvertError, nearest
from bitwright.formats.files.gguf import padded
from bitwright.formats.files.gguf_fields import tensor_info_bytes
from bitwright.formats.registry import get_format
from bitwright.profiles.evidence import Evidence
from bitwright.profiles.planning.allocate import Fixed, allocate, group_tensors, known_loss, loss_of
from bitwright.profiles.planning.fallbacks import fitting_format
from bitwright.profiles.planning.floors import ROLE_FLOORS, UNMEASURED, least_bits, raised
from bitwright.profiles.planning.plan import Plan, PlannedTensor, Spent
from bitwright.profiles.reading.budget import Budget
from bitwright.profiles.reading.rules import LayerQuantizationConfig
from bitwright.profiles.reading.schema import QuantizationProfile
from bitwright.profiles.reading.tiers import Tier, tiers_of_layers
from bitwright.profiles.vocabulary import ModelMap, Role, TensorSpec

# Headers of split files depend on how the tensors fall into them, so that a budget may take a few attempts.
_ATTEMPTS = 8


def scale_of(tensor: TensorSpec, format_name: str) -> TensorSpec | None:
    """The tensor of second-level scales that goes with a tensor in this format; None where none does: of another
    format, or where the runtime would not apply them, so that the blocks' own scales are all there is."""
    if get_format(format_name).tensor_scale is None or not tensor.scale_applied:
        return None
    name = f"{tensor.name.removesuffix('.weight')}.scale"
    return TensorSpec(name, (tensor.n_matrices,), Role.SCALE, tensor.layer, origin="scale")


def assign(
    profile: QuantizationProfile,
    model_map: ModelMap,
    overrides: Sequence[LayerQuantizationConfig] = (),
    effort: Effort = "best",
    evidence: Evidence | None = None,
    with_importance: Collection[str] = (),
    file_bytes: Callable[[Plan], int] | None = None,
) -> Plan:
    """Every tensor's format. Overrides come last; one that matches nothing is an error, as is one on a tensor that
    runtimes need in F32.

    evidence: what was measured of the model, without which a budget and tiers decide nothing. with_importance: the
    tensors whose columns have an importance, which a budget takes into account. file_bytes: the exact size of the
    artifact of a plan, for a budget of the whole file's size.
    """
    if profile.target != "gguf":
        raise ConvertError(
            f"the profile {profile.name!r} has schemes of a safetensors directory, and no formats of a GGUF",
            f"--profile {profile.name}",
            "`bitwright profiles list` names the target of every profile",
        )
    if profile.needs_sensitivity:
        _needed(evidence, profile)
    check_overrides(overrides, model_map)
    budget = profile.budget
    if budget is not None and budget.as_rules:
        by_rules = _Assigner(profile.by_rules(), model_map, overrides, effort, evidence).plan({})
        budget, profile = replace(budget, data_bytes=by_rules.n_bytes), profile.beyond_size()
    assigner = _Assigner(profile, model_map, overrides, effort, evidence)
    if budget is not None and budget.has_goal:
        return assigner.within(budget, with_importance, file_bytes)
    return assigner.plan({})


def _needed(evidence: Evidence | None, profile: QuantizationProfile) -> Evidence:
    """The evidence. Raises ConvertError where there is none."""
    if evidence is None:
        raise ConvertError(
            f"the profile {profile.name!r} decides by measured sensitivity, and there is none",
            f"--profile {profile.name}",
            "choose a profile whose rules decide everything; `bitwright profiles list` describes each",
        )
    return evidence


def check_overrides(overrides: Sequence[LayerQuantizationConfig], model_map: ModelMap) -> None:
    """Refuse an override that matches nothing."""
    matrices = [t for t in model_map.tensors if t.quantizable]
    for override in overrides:
        if not any(override.matches(t, model_map.n_layers) for t in matrices):
            pattern = (override.roles + override.tensors)[0]
            known = sorted({t.role.value for t in matrices}) + [t.name for t in matrices]
            raise ConvertError(
                f"{pattern!r} matches no tensor that can be quantized", override.text, nearest(pattern, known)
            )


class _Assigner:
    def __init__(
        self,
        profile: QuantizationProfile,
        model_map: ModelMap,
        overrides: Sequence[LayerQuantizationConfig],
        effort: Effort,
        evidence: Evidence | None,
    ):
        self.profile, self.model_map, self.overrides = profile, model_map, overrides
        self.effort, self.evidence = effort, evidence
        self.tied = not any(tensor.role is Role.OUTPUT for tensor in model_map.tensors)
        self.tiers = _tiers(profile, model_map, evidence)

    def plan(self, chosen: dict[str, tuple[str, str]]) -> Plan:
        """The plan, with the format and the reason of every tensor that a budget chose."""
        rows: list[PlannedTensor] = []
        for tensor in self.model_map.tensors:
            rows.append(self._row(tensor, chosen))
            scale = scale_of(tensor, rows[-1].format)
            if scale is not None:
                rows.append(PlannedTensor(scale, "F32", f"second-level scale of {rows[-1].format}"))
        decided_by = self.evidence.identity if self.evidence is not None and self.profile.needs_sensitivity else {}
        return Plan(self.profile.name, self.effort, tuple(rows), evidence=decided_by)

    def _row(self, tensor: TensorSpec, chosen: dict[str, tuple[str, str]]) -> PlannedTensor:
        if tensor.kept:
            return PlannedTensor(tensor, tensor.kept, "of unknown use: kept as the source has it")
        if not tensor.quantizable:
            return PlannedTensor(tensor, "F32", f"{tensor.role}: runtimes compute with it in F32")
        rule = self._deciding(tensor)
        decision = chosen.get(tensor.name) or self._decided(tensor)
        if decision is None and self.profile.base is None:
            decision = self._unmeasured(tensor)
        if decision is None:
            if self.profile.base is None:
                raise ConvertError(
                    f"the profile {self.profile.name!r} chooses formats for a target, and none is given",
                    f"--profile {self.profile.name}",
                    "add --target-size SIZE, --target-bpw BITS or --target-kld NATS",
                )
            decision = self.profile.base, f"{self.profile.name}: base"
        planned = _fitting(tensor, *raised(tensor, *decision, rule))
        loss = known_loss(self.evidence, tensor, planned.format)
        if loss is None and self._unmeasured(tensor) is not None:
            loss = 0.0  # which its floor keeps small
        return replace(planned, predicted_loss=loss)

    def _decided(self, tensor: TensorSpec) -> tuple[str, str] | None:
        """What overrides, rules or tiers say of the tensor, in this order: its format and the reason."""
        if (rule := self._deciding(tensor)) is not None:
            return rule.format, rule.text
        if tensor.layer is not None and tensor.layer in self.tiers:
            tier = self.tiers[tensor.layer]
            return tier.format, tier.text
        return None

    def _unmeasured(self, tensor: TensorSpec) -> tuple[str, str] | None:
        """The format of a tensor whose losses cannot be measured, as the runtime computes with it in another way than
        the model, or the model not at all, and the reason; None for all others."""
        floor = ROLE_FLOORS.get(tensor.role, None if tensor.layout.observed else UNMEASURED)
        if floor is None or self.evidence is None or tensor.name in self.evidence.losses:
            return None
        return floor, f"not measured, {floor} at least: {tensor.role}"

    def _deciding(self, tensor: TensorSpec) -> LayerQuantizationConfig | None:
        """The last override that speaks of the tensor, or else the rule that does."""
        matching = (o for o in reversed(self.overrides) if o.matches(tensor, self.model_map.n_layers))
        return next(matching, None) or self._rule(tensor)

    def _rule(self, tensor: TensorSpec) -> LayerQuantizationConfig | None:
        """The last rule that speaks of the tensor. Tied embeddings are the output head too, and the finer rule wins."""
        rules, n_layers = self.profile.rules, self.model_map.n_layers
        matching = [rule for rule in rules if rule.matches(tensor, n_layers)][-1:]
        if self.tied and tensor.role is Role.EMBEDDING:
            matching += [rule for rule in rules if rule.matches(tensor, n_layers, Role.OUTPUT)][-1:]
        return max(matching, key=lambda rule: get_format(rule.format).bits_per_weight, default=None)

    def within(
        self, budget: Budget, with_importance: Collection[str], file_bytes: Callable[[Plan], int] | None
    ) -> Plan:
        """The best plan within the budget, whose rules and overrides stay as they are."""
        evidence = _needed(self.evidence, self.profile)
        matrices = [t for t in self.model_map.tensors if t.quantizable]
        free = [t for t in matrices if self._decided(t) is None and self._unmeasured(t) is None]
        names = {t.name for t in free}
        fixed = {t.name: (t, self._row(t, {}).format) for t in matrices if t.name not in names}
        whole_file = budget.bpw is None and not budget.as_rules
        count = file_bytes if whole_file and file_bytes is not None else lambda plan: plan.n_bytes
        groups = group_tensors(
            free,
            fixed,
            budget,
            evidence,
            self._file_bytes_of if whole_file else self._bytes_of,
            with_importance,
            partial(self._least_bits, budget),
        )
        least = {t.name: g.formats[int(g.n_bytes.argmin())] for g in groups for t in g.tensors}
        smallest = self._spending(budget, least, {}, 0.0, True)
        rest = count(smallest) - sum(int(group.n_bytes.min()) for group in groups)
        decided = [row for row in smallest.tensors if row.tensor.quantizable and row.tensor.name not in least]
        measured = [row for row in decided if self._unmeasured(row.tensor) is None]
        loss = sum(loss_of(evidence, row.tensor, row.format) for row in measured)
        for _ in range(_ATTEMPTS):
            allocation = allocate(groups, budget, Fixed(rest, loss, smallest.n_weights))
            plan = self._spending(budget, allocation.formats, allocation.reasons, allocation.gap, allocation.exact)
            excess = 0 if budget.size is None else count(plan) - budget.size
            if excess <= 0:
                return plan
            rest += excess
        raise ConvertError(
            f"no split of the files was found that stays below {budget.size} bytes", budget.where, "raise --split-size"
        )

    def _least_bits(self, budget: Budget, tensor: TensorSpec) -> float:
        """Of the tensor, by its role's floor and the budget's; a tied embedding has that of the output head, too."""
        roles = (tensor.role, Role.OUTPUT) if self.tied and tensor.role is Role.EMBEDDING else (tensor.role,)
        return max(budget.least_bits(roles, tensor.layer, self.model_map.n_layers), least_bits(tensor.role))

    def _spending(
        self, budget: Budget, formats: dict[str, str], reasons: dict[str, str], gap: float, exact: bool
    ) -> Plan:
        plan = self.plan({name: (chosen, reasons.get(name, "")) for name, chosen in formats.items()})
        return replace(plan, spent=Spent(budget, gap, exact))

    def _bytes_of(self, tensor: TensorSpec, format_name: str) -> int:
        """Bytes of data in this format, second-level scales included."""
        scale = scale_of(tensor, format_name)
        data = tensor.n_rows * get_format(format_name).row_bytes(tensor.n_columns)
        return data + (0 if scale is None else 4 * scale.n_weights)

    def _file_bytes_of(self, tensor: TensorSpec, format_name: str) -> int:
        """Bytes of data with padding, and with what the header says of the scales."""
        scale = scale_of(tensor, format_name)
        data = padded(tensor.n_rows * get_format(format_name).row_bytes(tensor.n_columns))
        return data + (0 if scale is None else padded(4 * scale.n_weights) + tensor_info_bytes(scale.name, 1))


def _tiers(profile: QuantizationProfile, model_map: ModelMap, evidence: Evidence | None) -> dict[int, Tier]:
    if not profile.tiers:
        return {}
    evidence = _needed(evidence, profile)
    layers = {tensor.layer for tensor in model_map.tensors if tensor.layer is not None}
    if missing := sorted(layers - set(evidence.layer_scores)):
        raise ConvertError(
            f"the layer {missing[0]} has no score, by which tiers rank it", evidence.where, "measure the model again"
        )
    return tiers_of_layers(profile.tiers, {layer: evidence.layer_scores[layer] for layer in layers})


def _fitting(tensor: TensorSpec, wanted_name: str, reason: str) -> PlannedTensor:
    wanted = get_format(wanted_name)
    fitting = fitting_format(wanted, tensor.n_columns)
    if fitting is wanted:
        return PlannedTensor(tensor, wanted.name, reason)
    return PlannedTensor(
        tensor,
        fitting.name,
        f"{reason}; rows of {tensor.n_columns} are no multiple of {wanted.name}'s {wanted.block_size}: {fitting.name}",
        wanted.name,
    )
