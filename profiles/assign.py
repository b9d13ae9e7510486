"""assign(profile, model map, overrides, ...) -> Plan: every tensor's format, by rules, tiers, or a budget."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from formats.block_format import BlockFormat, Effort
from formats.errors import ConvertError, nearest
from formats.gguf_file import padded, tensor_info_bytes
from formats.registry import FORMATS, get_format
from profiles.allocate import Fixed, allocate, group_tensors, known_loss, loss_of
from profiles.budget import Budget
from profiles.evidence import Evidence
from profiles.plan import Plan, PlannedTensor, Spent
from profiles.rules import LayerQuantizationConfig
from profiles.schema import QuantizationProfile
from profiles.tiers import Tier, tiers_of_layers
from profiles.vocabulary import ModelMap, Role, TensorSpec

# Formats a fallback may choose, the better encoder first where sizes are equal. Ternary, 1-bit and FP4 formats are made
# for models trained or hardware built for them: nobody should get one without asking.
_FALLBACKS = ("IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16")

# Headers of split files depend on how the tensors fall into them, so that a budget may take a few attempts.
_ATTEMPTS = 8


def fitting_format(wanted: BlockFormat, n_columns: int) -> BlockFormat:
    """The wanted format, or the smallest one with at least as many bits whose block divides the row."""
    if wanted.fits(n_columns):
        return wanted
    candidates = [FORMATS[name] for name in _FALLBACKS if name in FORMATS]
    candidates = [c for c in candidates if c.fits(n_columns) and c.bits_per_weight >= wanted.bits_per_weight]
    return min(candidates, key=lambda c: c.bits_per_weight)


def scale_of(tensor: TensorSpec, format_name: str) -> TensorSpec | None:
    """The tensor of second-level scales that goes with a tensor in this format; None where none does: of another
    format, or where the runtime would not apply them, so that the blocks' own scales are all there is."""
    if get_format(format_name).tensor_scale is None or not tensor.scale_applied:
        return None
    name = f"{tensor.name.removesuffix('.weight')}.scale"
    return TensorSpec(name, (tensor.n_matrices,), Role.SCALE, tensor.layer, transform="scale")


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
            "`convert profiles list` names the target of every profile",
        )
    if evidence is None and profile.needs_sensitivity:
        raise ConvertError(
            f"the profile {profile.name!r} decides by measured sensitivity, and there is none",
            f"--profile {profile.name}",
            "choose a profile whose rules decide everything; `convert profiles list` describes each",
        )
    check_overrides(overrides, model_map)
    assigner = _Assigner(profile, model_map, overrides, effort, evidence)
    if profile.budget is not None and profile.budget.has_goal:
        return assigner.within(profile.budget, with_importance, file_bytes)
    return assigner.plan({})


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
        if not tensor.quantizable:
            return PlannedTensor(tensor, "F32", f"{tensor.role}: runtimes compute with it in F32")
        decision = chosen.get(tensor.name) or self._decided(tensor)
        if decision is None:
            if self.profile.base is None:
                raise ConvertError(
                    f"the profile {self.profile.name!r} chooses formats for a target, and none is given",
                    f"--profile {self.profile.name}",
                    "add --target-size SIZE, --target-bpw BITS or --target-kld NATS",
                )
            decision = self.profile.base, f"{self.profile.name}: base"
        planned = _fitting(tensor, *decision)
        return replace(planned, predicted_loss=known_loss(self.evidence, tensor, planned.format))

    def _decided(self, tensor: TensorSpec) -> tuple[str, str] | None:
        """What overrides, rules or tiers say of the tensor, in this order: its format and the reason."""
        for override in reversed(self.overrides):
            if override.matches(tensor, self.model_map.n_layers):
                return override.format, override.text
        if (rule := self._rule(tensor)) is not None:
            return rule.format, rule.text
        if tensor.layer is not None and tensor.layer in self.tiers:
            tier = self.tiers[tensor.layer]
            return tier.format, tier.text
        return None

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
        assert self.evidence is not None
        matrices = [t for t in self.model_map.tensors if t.quantizable]
        free = [t for t in matrices if self._decided(t) is None]
        fixed = {t.name: (t, _fitting(t, *of).format) for t in matrices if (of := self._decided(t)) is not None}
        whole_file = budget.bpw is None
        count = file_bytes if whole_file and file_bytes is not None else lambda plan: plan.n_bytes
        groups = group_tensors(
            free,
            fixed,
            budget,
            self.evidence,
            self._file_bytes_of if whole_file else self._bytes_of,
            with_importance,
            self.tied,
        )
        least = {t.name: g.formats[int(g.n_bytes.argmin())] for g in groups for t in g.tensors}
        smallest = self._spending(budget, least, {}, 0.0, True)
        rest = count(smallest) - sum(int(group.n_bytes.min()) for group in groups)
        decided = [row for row in smallest.tensors if row.tensor.quantizable and row.tensor.name not in least]
        loss = sum(loss_of(self.evidence, row.tensor, row.format) for row in decided)
        for _ in range(_ATTEMPTS):
            found = allocate(groups, budget, Fixed(rest, loss, smallest.n_weights))
            plan = self._spending(budget, found.formats, found.reasons, found.gap, found.exact)
            excess = 0 if budget.size is None else count(plan) - budget.size
            if excess <= 0:
                return plan
            rest += excess
        raise ConvertError(
            f"no split of the files was found that stays below {budget.size} bytes", budget.where, "raise --split-size"
        )

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
        """The same with padding, and with what the header says of the scales."""
        scale = scale_of(tensor, format_name)
        data = padded(tensor.n_rows * get_format(format_name).row_bytes(tensor.n_columns))
        return data + (0 if scale is None else padded(4 * scale.n_weights) + tensor_info_bytes(scale.name, 1))


def _tiers(profile: QuantizationProfile, model_map: ModelMap, evidence: Evidence | None) -> dict[int, Tier]:
    if not profile.tiers:
        return {}
    assert evidence is not None
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
