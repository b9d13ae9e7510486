"""Plans of a safetensors directory: for every module the scheme that its weights are stored in, or that they are kept.

Runtimes multiply some modules as one: q, k and v; gate and up; all experts of a layer. vLLM refuses a checkpoint in
which the parts of such a group have different schemes, and loses accuracy where their second-level scales differ, so a
plan gives a group one scheme and one scale.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from bitwright.formats.choices import Effort
from bitwright.formats.errors import ConvertError
from bitwright.formats.schemes.cache_scheme import SCALE_BYTES, SCALE_DTYPE, SCALE_SHAPE
from bitwright.formats.schemes.expert_names import GATE, NUMBERED, UP
from bitwright.formats.schemes.registry import Scheme, get_scheme
from bitwright.formats.schemes.scheme import ActivationScheme
from bitwright.profiles.planning.assign import check_overrides
from bitwright.profiles.planning.fallbacks import scheme_of_experts, schemes_by_shape
from bitwright.profiles.planning.floors import kept_whole
from bitwright.profiles.planning.plan import Plan, PlannedTensor
from bitwright.profiles.reading.activations import NO_CACHE_SCHEME
from bitwright.profiles.reading.rules import LayerQuantizationConfig
from bitwright.profiles.reading.schema import QuantizationProfile
from bitwright.profiles.reading.target import KEPT
from bitwright.profiles.vocabulary import EXPERT_ROLES, ModelMap, Role, TensorSpec

# Last parts of the names of modules that runtimes multiply as one.
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    (GATE, UP),
    tuple(number for number, name in NUMBERED.items() if name in (GATE, UP)),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
# A scheme has fewer bits than the weights that are kept in 16.
_UNQUANTIZED_BITS = 16


@dataclass(frozen=True)
class PlannedModule(PlannedTensor):
    """One row of the plan: a matrix in a scheme, or a tensor that is kept in the dtype that `format` names.

    shares_scale_with: the matrices, itself among them, that a runtime multiplies as one; second-level
    scales are common to them.
    """

    shares_scale_with: tuple[str, ...] = ()

    @property
    def scheme(self) -> Scheme | None:
        """None for a tensor that is kept."""
        return None if self.format in KEPT else get_scheme(self.format, self.tensor.name)

    @property
    def module(self) -> str:
        return self.tensor.name.removesuffix(".weight")

    @property
    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name in the file -> (safetensors dtype, shape) of everything that stands for this tensor, in order."""
        scales = {name: (SCALE_DTYPE, SCALE_SHAPE) for name in self.cache_scales}
        if (scheme := self.scheme) is None:
            return {self.tensor.name: (self.format, self.tensor.shape), **scales}
        parts = scheme.tensors(*self.tensor.shape)
        return {f"{self.module}.{suffix}": entry for suffix, entry in parts.items()} | scales

    @property
    def n_bytes(self) -> int:
        scales = SCALE_BYTES * len(self.cache_scales)
        if (scheme := self.scheme) is None:
            return KEPT[self.format] * self.tensor.n_weights + scales
        return scheme.n_bytes(*self.tensor.shape) + scales

    @property
    def encoded_with(self) -> str:
        return min(self.shares_scale_with, default=self.tensor.name)

    @property
    def extra_bytes(self) -> int:
        """What a fallback costs: bytes beyond what the wanted scheme takes on a matrix that it fits."""
        if self.wanted is None:
            return 0
        scales = SCALE_BYTES * len(self.cache_scales)
        return self.n_bytes - scales - round(self.tensor.n_weights * _bits(self.wanted) / 8)

    @property
    def needs_importance(self) -> bool:
        return False

    @property
    def uses_importance(self) -> bool:
        return (scheme := self.scheme) is not None and scheme.weights.num_bits < 8

    @property
    def stored_activations(self) -> ActivationScheme | None:
        """How the inputs are rounded, where something that is stored of the matrix depends on their values."""
        activations = None if (scheme := self.scheme) is None else scheme.activations
        return None if activations is None or activations.dynamic is True else activations


@dataclass(frozen=True)
class ModulePlan(Plan):
    """The plan of a safetensors directory: every row is a module."""

    tensors: tuple[PlannedModule, ...]


def plan_modules(
    profile: QuantizationProfile,
    modules: ModelMap,
    dtypes: Mapping[str, str],
    overrides: Sequence[LayerQuantizationConfig] = (),
    effort: Effort = "best",
) -> ModulePlan:
    """Every tensor's scheme. modules: the tensors under the checkpoint's own names, see model/module_map.py; dtypes: in
    what it stores each."""
    if profile.target != "safetensors" or profile.base is None:
        raise ConvertError(
            f"the profile {profile.name!r} has formats of a GGUF, and no schemes of a safetensors directory",
            f"--profile {profile.name}",
            "`bitwright profiles list` names the target of every profile",
        )
    check_overrides(overrides, modules)
    base = profile.base, f"{profile.name}: base"
    rules = [*profile.rules, *overrides]
    rows = [_row(rules, base, modules.n_layers, tensor, dtypes[tensor.name]) for tensor in modules.tensors]
    plan = repaired(ModulePlan(profile.name, effort, tuple(rows)))
    if profile.activations.kv_cache == NO_CACHE_SCHEME:
        return plan
    return with_cache_scales(plan, modules.n_layers)


def _row(
    rules: Sequence[LayerQuantizationConfig], base: tuple[str, str], n_layers: int, tensor: TensorSpec, dtype: str
) -> PlannedModule:
    """base: the scheme of what no rule names, and the reason."""
    if not tensor.quantizable:
        return PlannedModule(tensor, dtype, f"{tensor.role}: kept as the source has it")
    rule = next((rule for rule in reversed(rules) if rule.matches(tensor, n_layers)), None)
    if rule is None and tensor.layer is None:
        return _kept(tensor, dtype, "BF16", f"{tensor.role}: kept in 16 bits unless a rule names it")
    wanted, reason = base if rule is None else (rule.format, rule.text)
    if wanted in KEPT:
        return _kept(tensor, dtype, wanted, reason)
    if (kept := kept_whole(tensor, rule)) is not None:
        return replace(_kept(tensor, dtype, "BF16", f"{reason}; {kept}"), wanted=wanted)
    if tensor.role is Role.EMBEDDING or (tensor.role is Role.OUTPUT and not _for_heads(wanted)):
        row = _kept(tensor, dtype, "BF16", f"{reason}; no runtime reads the {tensor.role} in {wanted}")
        return replace(row, wanted=wanted)
    return _fitting(tensor, dtype, wanted, reason)


def _for_heads(format_name: str) -> bool:
    """Whether vLLM reads an output head in this scheme: integers whose input stays as it is."""
    scheme = get_scheme(format_name)
    return scheme.activations is None and scheme.weights.type == "int"


def _kept(tensor: TensorSpec, dtype: str, wanted: str, reason: str) -> PlannedModule:
    """16 bits are those of the source where it has 16: F16 has mantissa bits that BF16 would lose."""
    if wanted == "BF16" and dtype == "F16":
        return PlannedModule(tensor, dtype, f"{reason}; the source is F16")
    return PlannedModule(tensor, wanted, reason)


def _fitting(tensor: TensorSpec, dtype: str, wanted: str, reason: str) -> PlannedModule:
    """The wanted scheme, or the first of its fallbacks whose shape rules the matrix meets."""
    if tensor.role in EXPERT_ROLES and (other := scheme_of_experts(wanted)) != wanted:
        row = _fitting(tensor, dtype, other, f"{reason}; vLLM's fused experts take no {wanted}: {other}")
        return replace(row, wanted=wanted)
    where, why = tensor.name, ""
    for name in schemes_by_shape(wanted):
        try:
            _check_shape(get_scheme(name, where), tensor, where)
        except ConvertError as error:
            why = why or error.what
            continue
        if name == wanted:
            return PlannedModule(tensor, name, reason)
        return PlannedModule(tensor, name, f"{reason}; {why}: {name}", wanted)
    return replace(_kept(tensor, dtype, "BF16", f"{reason}; {why}: 16 bits"), wanted=wanted)


def _check_shape(scheme: Scheme, tensor: TensorSpec, where: str) -> None:
    """Raises ConvertError for a matrix that the scheme cannot hold, or that runtimes cannot fuse with others in it."""
    scheme.check_shape(tensor.shape[0], tensor.shape[1], where)
    block = scheme.weights.block_structure
    if block is not None and tensor.shape[0] % block[0]:
        what = f"vLLM fuses blocks of {block[0]} rows only, and the matrix has {tensor.shape[0]}"
        raise ConvertError(what, where, "choose another scheme")


def given_schemes(plan: ModulePlan, changes: Mapping[str, tuple[str, str]], dtypes: Mapping[str, str]) -> ModulePlan:
    """The plan with other formats for these matrices, and what follows from that for those that they are multiplied
    with. changes: tensor -> format and why; dtypes: as of plan_modules."""

    def given(row: PlannedModule) -> PlannedModule:
        name = row.tensor.name
        if name not in changes:
            return row
        wanted, why = changes[name]
        reason = f"{row.reason}; {why}"
        placed = _kept if wanted in KEPT else _fitting
        changed = placed(row.tensor, dtypes[name], wanted, reason)
        return replace(changed, wanted=row.wanted or row.format, cache_scales=row.cache_scales)

    return repaired(_with(plan, given))


def repaired(plan: ModulePlan) -> ModulePlan:
    """The plan with one scheme in every group of modules that runtimes multiply as one: the finest of its members'."""
    formats: dict[str, PlannedModule] = {}
    shared: dict[str, tuple[str, ...]] = {}
    for group in fused_groups(plan):
        shared |= dict.fromkeys(group, group)
    for group in [*fused_groups(plan), *_expert_groups(plan)]:
        members = [formats.get(row.tensor.name, row) for row in _modules(plan) if row.tensor.name in group]
        finest = max(members, key=lambda row: _fineness(row.format))
        for row in members:
            if row.format != finest.format:
                why = f"multiplied as one with {finest.module.rpartition('.')[2]}, which is {finest.format}"
                formats[row.tensor.name] = replace(
                    row, format=finest.format, reason=f"{row.reason}; {why}", wanted=row.wanted or row.format
                )

    def one(row: PlannedModule) -> PlannedModule:
        row = formats.get(row.tensor.name, row)
        group = () if row.scheme is None else shared.get(row.tensor.name, (row.tensor.name,))
        return replace(row, shares_scale_with=group)

    return _with(plan, one)


def fused_groups(plan: ModulePlan) -> list[tuple[str, ...]]:
    """Names of the tensors of every group of several modules that runtimes multiply as one, experts one by one."""
    groups: dict[tuple[str, int], list[str]] = {}
    for row in _modules(plan):
        parent, _, last = row.module.rpartition(".")
        for i, fused in enumerate(_FUSED):
            if last in fused and row.tensor.layer is not None:
                groups.setdefault((parent, i), []).append(row.tensor.name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _expert_groups(plan: ModulePlan) -> list[tuple[str, ...]]:
    layers: dict[int | None, list[str]] = {}
    for row in _modules(plan):
        if row.tensor.role in EXPERT_ROLES:
            layers.setdefault(row.tensor.layer, []).append(row.tensor.name)
    return [tuple(group) for group in layers.values()]


def repair_lines(plan: ModulePlan) -> list[str]:
    """One line for each kind of departure from what the profile asks for: how many modules, what instead, and why."""
    departures: dict[tuple[str, str, str], list[int]] = {}
    for row in _modules(plan):
        if row.wanted is not None:
            why = row.reason.partition("; ")[2]
            departures.setdefault((row.wanted, row.format, why), []).append(row.extra_bytes)
    return [
        f"{len(extra)} module{'s' if len(extra) > 1 else ''} {chosen} instead of {wanted} ({why}),"
        f" {sum(extra):+d} bytes"
        for (wanted, chosen, why), extra in departures.items()
    ]


def _modules(plan: ModulePlan) -> Iterable[PlannedModule]:
    return (row for row in plan.tensors if row.tensor.quantizable)


def _with(plan: ModulePlan, change: Callable[[PlannedModule], PlannedModule]) -> ModulePlan:
    return replace(plan, tensors=tuple(map(change, plan.tensors)))


def _bits(format_name: str) -> float:
    """Bits per weight on a large matrix, scales included."""
    if format_name in KEPT:
        return 8.0 * KEPT[format_name]
    return get_scheme(format_name).bits_per_weight(1 << 13, 1 << 13)


def _fineness(format_name: str) -> tuple[float, int, bool, str]:
    """Bits of the weights, then of the inputs, then whether every scale of these is measured when they are there."""
    if format_name in KEPT:
        return _bits(format_name), _UNQUANTIZED_BITS, True, format_name
    bits, activations = round(_bits(format_name), 1), get_scheme(format_name).activations
    if activations is None:
        return bits, _UNQUANTIZED_BITS, True, format_name
    return bits, activations.num_bits, activations.dynamic is True, format_name


_SCALES_OF = {
    Role.ATTENTION_KEY: ("k_scale",),
    Role.ATTENTION_VALUE: ("v_scale",),
    Role.ATTENTION_QKV: ("k_scale", "v_scale"),
}


def with_cache_scales(plan: ModulePlan, n_layers: int) -> ModulePlan:
    """The plan with a scale for the keys and one for the values of every layer.

    Raises ConvertError for a layer without attention, or with one that caches something else.
    """
    rows = []
    scaled: set[tuple[int | None, str]] = set()
    for row in plan.tensors:
        scales = _SCALES_OF.get(row.tensor.role, ())
        attention = row.tensor.name.removesuffix(".weight").rpartition(".")[0]
        rows.append(replace(row, cache_scales=tuple(f"{attention}.{scale}" for scale in scales)))
        scaled |= {(row.tensor.layer, scale) for scale in scales}
    lacking = [i for i in range(n_layers) if not {(i, "k_scale"), (i, "v_scale")} <= scaled]
    if lacking:
        raise ConvertError(
            f"{len(lacking)} layers have no attention that caches keys and values, the first is layer {lacking[0]}",
            f"profile {plan.profile}, key kv_cache",
            f'leave caches in 16 bits: kv_cache = "{NO_CACHE_SCHEME}"',
        )
    return replace(plan, tensors=tuple(rows))
