"""What a budget asks for: a size or a quality, the formats to choose among, and what may never be chosen."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from formats.errors import ConvertError, nearest
from formats.registry import FORMATS, get_format
from profiles.strict import known_keys, number, one_table, role_patterns, strings
from profiles.vocabulary import Role

_BUDGET_KEYS = ("size", "bpw", "kld", "formats", "floors", "alike")

# Ternary and 1-bit formats are for models trained that way, and F32 and BF16 gain nothing over F16.
_DEFAULT_FORMATS = ("IQ*", "Q*_K", "Q4_*", "Q5_*", "Q8_0", "NVFP4", "MXFP4", "F16")


@dataclass(frozen=True)
class Floor:
    """Tensors of these roles get no format of fewer bits than this one has."""

    roles: str
    format: str


@dataclass(frozen=True)
class Budget:
    """size: bytes of the whole artifact, at most. bpw: bits a weight of the tensors' data, at most, as llama.cpp counts
    them. kld: predicted mean KL divergence in nats a token, at most. At most one of size and bpw is given; beside one
    of them kld is a condition, and alone it is the goal: the smallest artifact that meets it.

    formats: names to choose among. alike: groups of roles whose tensors of a layer share one format. where: what asked
    for the goal, for messages.
    """

    size: int | None = None
    bpw: float | None = None
    kld: float | None = None
    formats: tuple[str, ...] = ()
    floors: tuple[Floor, ...] = ()
    alike: tuple[tuple[Role, ...], ...] = ()
    where: str = "the budget"

    @property
    def has_goal(self) -> bool:
        return any(goal is not None for goal in (self.size, self.bpw, self.kld))

    @property
    def label(self) -> str:
        """The goal in a word, for the name of a file: "2.4bpw", "1200MB", "kld0.05"."""
        goals = [
            f"{self.size / 1e6:.4g}MB" if self.size is not None else "",
            f"{self.bpw:g}bpw" if self.bpw is not None else "",
            f"kld{self.kld:g}" if self.kld is not None else "",
        ]
        return "_".join(filter(None, goals))

    def least_bits(self, roles: Sequence[Role]) -> float:
        """Bits a weight that a tensor which plays these roles has at least."""
        bits = [
            get_format(floor.format).bits_per_weight
            for floor in self.floors
            if any(fnmatchcase(role, floor.roles) for role in roles)
        ]
        return max(bits, default=0.0)

    def aiming_at(self, size: int | None, bpw: float | None, kld: float | None, where: str) -> "Budget":
        """This budget with another goal; None, None, None leaves the goal as it is."""
        if size is None and bpw is None and kld is None:
            return self
        _refuse_two_sizes(size, bpw, where)
        return replace(self, size=size, bpw=bpw, kld=kld, where=where)


def parse_budget(table: object, where: str, inherited: Budget | None = None) -> Budget:
    """A budget from its TOML table; keys that it leaves out are those of the inherited one, floors come on top."""
    table = one_table(table, where, "budget")
    known_keys(table, _BUDGET_KEYS, where)
    base = inherited or Budget(formats=_names(_DEFAULT_FORMATS, where))
    size = parse_size(str(table["size"]), f"{where}, key size") if "size" in table else None
    bpw, kld = (number(table[key], f"{where}, key {key}") if key in table else None for key in ("bpw", "kld"))
    formats = _names(strings(table["formats"], f"{where}, key formats"), where) if "formats" in table else base.formats
    own_floors = one_table(table.get("floors", {}), f"{where}, key floors", "budget.floors")
    return replace(
        base.aiming_at(size, bpw, kld, where),
        formats=formats,
        floors=base.floors + tuple(_floor(*item, f"{where}, key floors") for item in own_floors.items()),
        alike=_alike(table["alike"], f"{where}, key alike") if "alike" in table else base.alike,
    )


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


def _floor(roles: str, name: object, where: str) -> Floor:
    role_patterns(roles, where)
    if not isinstance(name, str):
        raise ConvertError(f"the floor of {roles!r} is no format", where, 'write for example "attention_*" = "Q3_K"')
    return Floor(roles, get_format(name, f"{where}, {roles}").name)


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


def parse_size(text: str, where: str) -> int:
    """Bytes from a text such as 500M, 20GB or 1.5GiB: decimal units, binary ones with an i."""
    match = re.fullmatch(r"([0-9.]+)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    try:
        amount = float(match[1]) if match else 0.0
    except ValueError:
        amount = 0.0
    if match is None or amount <= 0:
        raise ConvertError(f"{text!r} is no size", where, "write for example 500M, 20GB or 1.5GiB")
    base = 1024 if match[3] else 1000
    return int(amount * base ** " KMGT".index(match[2].upper() or " "))
