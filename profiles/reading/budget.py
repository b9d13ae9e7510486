"""What a budget asks for: a size or a quality, the formats to choose among, and what may never be chosen."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import inf

from bitwright.formats.errors import ConvertError, nearest
from bitwright.formats.registry import FORMATS, get_format
from bitwright.profiles.mixes import MIXES
from bitwright.profiles.reading.rules import check_range, in_range
from bitwright.profiles.reading.strict import known_keys, number, one_table, role_patterns, strings
from bitwright.profiles.sizes import parse_size, size_text
from bitwright.profiles.vocabulary import Role

_BUDGET_KEYS = ("size", "bpw", "kld", "mix", "formats", "floors", "alike")

_AS_RULES = "rules"
"""The size of a budget that has as many bytes as the rules of its profile give."""

# Ternary and 1-bit formats are for models trained that way, and F32 and BF16 gain nothing over F16.
_DEFAULT_FORMATS = ("IQ*", "Q*_K", "Q4_*", "Q5_*", "Q8_0", "NVFP4", "MXFP4", "F16")


@dataclass(frozen=True)
class Floor:
    """Tensors of these roles, in these layers, get no format of fewer bits than this one has. layers: a range, see
    rules.in_range; "all" is for tensors outside of the layers, too."""

    roles: str
    format: str
    layers: str = "all"

    @property
    def text(self) -> str:
        return f"{self.roles}={self.format}" + ("" if self.layers == "all" else f" in layers {self.layers}")

    def holds_for(self, role: Role, layer: int | None, n_layers: int) -> bool:
        if not fnmatchcase(role, self.roles):
            return False
        return self.layers == "all" or (layer is not None and in_range(layer, n_layers, self.layers))


@dataclass(frozen=True)
class Budget:
    """size: bytes of the whole artifact, at most. bpw: bits a weight of the tensors' data, at most, as llama.cpp counts
    them. kld: predicted mean KL divergence in nats a token, at most. as_rules: the profile's base and rules say no
    more than how many bytes of tensors' data there are to spend, which a plan has as data_bytes. mix: one of
    llama.cpp's, whose bits a weight, for the model at hand, are the goal; bpw has them then, and before the model is
    known those of Llama-3.1-8B. At most one of the sizes is given; beside one of them kld is a condition, and alone it
    is the goal: the smallest artifact that meets it.

    formats: names to choose among. alike: groups of roles whose tensors of a layer share one format. where: what asked
    for the goal, for messages.
    """

    size: int | None = None
    bpw: float | None = None
    kld: float | None = None
    mix: str | None = None
    as_rules: bool = False
    data_bytes: int | None = None
    formats: tuple[str, ...] = ()
    floors: tuple[Floor, ...] = ()
    alike: tuple[tuple[Role, ...], ...] = ()
    where: str = "the budget"

    @property
    def has_goal(self) -> bool:
        return self.limits_size or self.kld is not None

    @property
    def limits_size(self) -> bool:
        return self.as_rules or self.size is not None or self.bpw is not None

    @property
    def most_loss(self) -> float:
        """The predicted divergence that is allowed, in nats a token: infinite where none is asked for."""
        return inf if self.kld is None else self.kld

    @property
    def goal(self) -> str:
        """For people; nothing for the rules' size."""
        goals = [
            size_text(self.size) if self.size is not None else "",
            f"{self.bpw:.4g} bits per weight" if self.bpw is not None else "",
            f"a KL divergence of {self.kld:g}" if self.kld is not None else "",
        ]
        return " and ".join(filter(None, goals))

    def least_bits(self, roles: Sequence[Role], layer: int | None = None, n_layers: int = 1) -> float:
        """Bits a weight that a tensor which plays these roles has at least."""
        bits = [
            get_format(floor.format).bits_per_weight
            for floor in self.floors
            if any(floor.holds_for(role, layer, n_layers) for role in roles)
        ]
        return max(bits, default=0.0)

    def aiming_at(self, size: int | None, bpw: float | None, kld: float | None, where: str) -> "Budget":
        """This budget with another goal; None, None, None leaves the goal as it is."""
        if size is None and bpw is None and kld is None:
            return self
        _refuse_two_sizes(size, bpw, where)
        return replace(self, size=size, bpw=bpw, kld=kld, mix=None, as_rules=False, where=where)


def parse_budget(table: object, where: str, inherited: Budget | None = None) -> Budget:
    """A budget from its TOML table; keys that it leaves out are those of the inherited one, floors come on top."""
    table = one_table(table, where, "budget")
    known_keys(table, _BUDGET_KEYS, where)
    base = inherited or Budget(formats=_names(_DEFAULT_FORMATS, where))
    mix = _mix(table["mix"], f"{where}, key mix") if "mix" in table else None
    as_rules = table.get("size") == _AS_RULES
    size = parse_size(str(table["size"]), f"{where}, key size") if "size" in table and not as_rules else None
    bpw, kld = (number(table[key], f"{where}, key {key}") if key in table else None for key in ("bpw", "kld"))
    formats = _names(strings(table["formats"], f"{where}, key formats"), where) if "formats" in table else base.formats
    own_floors = one_table(table.get("floors", {}), f"{where}, key floors", "budget.floors")
    if mix is not None and ("size" in table or bpw is not None):
        raise ConvertError("a size and a mix are two sizes for one file", where, "give one of them")
    aimed = base.aiming_at(size, bpw if mix is None else MIXES[mix].bits, kld, where)
    if as_rules:
        _refuse_two_sizes(0, bpw, where)
        aimed = replace(aimed, size=None, bpw=None, mix=None, as_rules=True, where=where)
    return replace(
        replace(aimed, mix=mix or aimed.mix),
        formats=formats,
        floors=base.floors + tuple(f for item in own_floors.items() for f in _floors(*item, f"{where}, key floors")),
        alike=_alike(table["alike"], f"{where}, key alike") if "alike" in table else base.alike,
    )


def _mix(name: object, where: str) -> str:
    if name not in MIXES:
        raise ConvertError(f"llama.cpp has no mix {name!r} that is known here", where, nearest(str(name), list(MIXES)))
    return str(name)


def _refuse_two_sizes(size: int | None, bpw: float | None, where: str) -> None:
    if size is not None and bpw is not None:
        raise ConvertError("a size and bits per weight are two sizes for one file", where, "give one of them")


def _names(patterns: Sequence[str], where: str) -> tuple[str, ...]:
    """The formats that these names and patterns match, in the order of the registry."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern.upper()) for name in FORMATS):
            raise ConvertError(
                f"no format matches {pattern!r}", f"{where}, key formats", nearest(pattern, list(FORMATS))
            )
    return tuple(name for name in FORMATS if any(fnmatchcase(name, pattern.upper()) for pattern in patterns))


def _floors(roles: str, value: object, where: str) -> list[Floor]:
    """A format, or a table of ranges of layers with a format each."""
    role_patterns(roles, where)
    by_layers = value if isinstance(value, dict) else {"all": value}
    floors = []
    for layers, name in by_layers.items():
        if not isinstance(name, str):
            remedy = 'write for example "attention_*" = "Q3_K", or { "first:1/3" = "Q4_K" }'
            raise ConvertError(f"the floor of {roles!r} is no format", where, remedy)
        check_range(layers, f"{where}, {roles}")
        floors.append(Floor(roles, get_format(name, f"{where}, {roles}").name, layers))
    return floors


def _alike(value: object, where: str) -> tuple[tuple[Role, ...], ...]:
    if not isinstance(value, list):
        raise ConvertError("a list of lists of roles is expected", where, 'write [["mlp_gate", "mlp_up"]]')
    groups = []
    for group in value:
        patterns = role_patterns(group, where)
        groups.append(tuple(role for role in Role if any(fnmatchcase(role, pattern) for pattern in patterns)))
    named = [role for group in groups for role in group]
    if len(set(named)) < len(named):
        twice = next(role for role in named if named.count(role) > 1)
        raise ConvertError(f"{twice.value!r} is in two groups", where, "name every role once")
    return tuple(groups)
