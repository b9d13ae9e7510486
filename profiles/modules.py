"""Plans of a safetensors directory: for every module the scheme that its weights are stored in, or that they are kept.

Runtimes multiply some modules as one: q, k and v; gate and up; all experts of a layer. vLLM refuses a checkpoint in
which the parts of such a group have different schemes, and loses accuracy where their second-level scales differ, so a
plan gives a group one scheme and one scale.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from formats.block_format import Effort
from formats.cache_scheme import SCALE_BYTES, SCALE_DTYPE, SCALE_SHAPE
from formats.errors import ConvertError
from formats.schemes import Scheme, get_scheme
from profiles.assign import check_overrides
from profiles.kv_cache import NO_CACHE_SCHEME, with_cache_scales
from profiles.plan import Plan, PlannedTensor
from profiles.rules import LayerQuantizationConfig
from profiles.schema import QuantizationProfile
from profiles.target import KEPT
from profiles.vocabulary import ModelMap, Role, TensorSpec

# What takes the place of a scheme that does not fit a matrix, the first that fits; at last the source's own 16 bits.
_FALLBACKS: Mapping[str, tuple[str, ...]] = {
    "W8A16": ("W8A16_CHANNEL",),
    "W4A16": ("W4A16_G64", "W4A16_G32", "W8A16_CHANNEL"),
    "W4A16_G64": ("W4A16_G32", "W8A16_CHANNEL"),
    "W4A16_G32": ("W8A16_CHANNEL",),
    "W4A16_ASYM": ("W4A16_ASYM_G64", "W4A16_ASYM_G32", "W8A16_CHANNEL"),
    "W4A16_ASYM_G64": ("W4A16_ASYM_G32", "W8A16_CHANNEL"),
    "W4A16_ASYM_G32": ("W8A16_CHANNEL",),
    "NVFP4": ("FP8",),
    "NVFP4A16": ("W8A16_CHANNEL",),
    "MXFP4": ("FP8",),
    "MXFP4A16": ("W8A16_CHANNEL",),
    "FP8_BLOCK": ("FP8",),
}

# What vLLM's fused experts do not take: INT8 needs scales that are measured by token, INT4 has no zero points.
_OF_EXPERTS: Mapping[str, str] = {
    "W8A8_STATIC": "W8A8",
    "W8A8_STATIC_ASYM": "W8A8",
    "W4A16_ASYM": "W4A16",
    "W4A16_ASYM_G64": "W4A16_G64",
    "W4A16_ASYM_G32": "W4A16_G32",
}

# Last parts of the names of modules that runtimes multiply as one.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"))
EXPERT_ROLES = frozenset({Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN})
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
    def uses_activations(self) -> bool:
        """Whether something that is stored of the matrix depends on the values of the inputs."""
        activations = None if (scheme := self.scheme) is None else scheme.activations
        return activations is not None and activations.dynamic is not True


def plan_modules(
    profile: QuantizationProfile,
    modules: ModelMap,
    dtypes: Mapping[str, str],
    overrides: Sequence[LayerQuantizationConfig] = (),
    effort: Effort = "best",
) -> Plan:
    """Every tensor's scheme. modules: the tensors under the checkpoint's own names, see converter.modules; dtypes: in
    what it stores each."""
    check_overrides(overrides, modules)
    assert profile.base is not None
    rows = [_row(profile, modules, tensor, dtypes[tensor.name], overrides) for tensor in modules.tensors]
    plan = repaired(Plan(profile.name, effort, tuple(rows)))
    if profile.activations.kv_cache == NO_CACHE_SCHEME:
        return plan
    return with_cache_scales(plan, modules.n_layers)


def _row(
    profile: QuantizationProfile,
    modules: ModelMap,
    tensor: TensorSpec,
    dtype: str,
    overrides: Sequence[LayerQuantizationConfig],
) -> PlannedModule:
    if not tensor.quantizable:
        return PlannedModule(tensor, dtype, f"{tensor.role}: kept as the source has it")
    rule = next((r for r in reversed([*profile.rules, *overrides]) if r.matches(tensor, modules.n_layers)), None)
    if rule is None and tensor.layer is None:
        return _kept(tensor, dtype, "BF16", f"{tensor.role}: kept in 16 bits unless a rule names it")
    wanted, reason = (profile.base, f"{profile.name}: base") if rule is None else (rule.format, rule.text)
    assert wanted is not None
    if wanted in KEPT:
        return _kept(tensor, dtype, wanted, reason)
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
    if tensor.role in EXPERT_ROLES and wanted in _OF_EXPERTS:
        other = _OF_EXPERTS[wanted]
        row = _fitting(tensor, dtype, other, f"{reason}; vLLM's fused experts take no {wanted}: {other}")
        return replace(row, wanted=wanted)
    where, why = tensor.name, ""
    for name in (wanted, *_FALLBACKS.get(wanted, ())):
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


def given_schemes(plan: Plan, changes: Mapping[str, tuple[str, str]], dtypes: Mapping[str, str]) -> Plan:
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


def repaired(plan: Plan) -> Plan:
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


def fused_groups(plan: Plan) -> list[tuple[str, ...]]:
    """Names of the tensors of every group of several modules that runtimes multiply as one, experts one by one."""
    groups: dict[tuple[str, int], list[str]] = {}
    for row in _modules(plan):
        parent, _, last = row.module.rpartition(".")
        for i, fused in enumerate(_FUSED):
            if last in fused and row.tensor.layer is not None:
                groups.setdefault((parent, i), []).append(row.tensor.name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _expert_groups(plan: Plan) -> list[tuple[str, ...]]:
    layers: dict[int | None, list[str]] = {}
    for row in _modules(plan):
        if row.tensor.role in EXPERT_ROLES:
            layers.setdefault(row.tensor.layer, []).append(row.tensor.name)
    return [tuple(group) for group in layers.values()]


def repair_lines(plan: Plan) -> list[str]:
    """One line for each kind of departure from what the profile asks for: how many modules, what instead, and why."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for row in _modules(plan):
        if row.wanted is not None:
            why = row.reason.partition("; ")[2]
            found.setdefault((row.wanted, row.format, why), []).append(row.extra_bytes)
    return [
        f"{len(extra)} module{'s' if len(extra) > 1 else ''} {chosen} instead of {wanted} ({why}),"
        f" {sum(extra):+d} bytes"
        for (wanted, chosen, why), extra in found.items()
    ]


def _modules(plan: Plan) -> Iterable[PlannedModule]:
    for row in plan.tensors:
        assert isinstance(row, PlannedModule)
        if row.tensor.quantizable:
            yield row


def _with(plan: Plan, change: Callable[[PlannedModule], PlannedModule]) -> Plan:
    rows = []
    for row in plan.tensors:
        assert isinstance(row, PlannedModule)
        rows.append(change(row))
    return replace(plan, tensors=tuple(rows))


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
