"""What a profile asks for super weights: its table [protection]."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from bitwright.profiles.choices import Mode
from bitwright.profiles.reading.strict import known_keys, number, one_of, one_table
from bitwright.profiles.reading.target import format_name

Action = Literal["raise", "pin", "rescale", "exclude"]
"""A way to protect a tensor's super weights, see planning.protect."""

_KEYS = ("super_weights", "tolerance", "raise_to")


@dataclass(frozen=True)
class Protection:
    """tolerance: the largest error, as a share of its magnitude, with which a super weight counts as covered. raise_to:
    the format of `raise`."""

    super_weights: Mode = "auto"
    tolerance: float = 0.05
    raise_to: str = "Q6_K"


def parse_protection(table: object, where: str, inherited: Protection) -> Protection:
    """From the TOML table, on top of what is inherited. Raises ConvertError with the key that is wrong."""
    table = one_table(table, where, "protection")
    known_keys(table, _KEYS, where)
    changes: dict[str, Any] = {}
    if "super_weights" in table:
        changes["super_weights"] = parse_mode(table["super_weights"], f"{where}, key super_weights")
    if "tolerance" in table:
        changes["tolerance"] = number(table["tolerance"], f"{where}, key tolerance")
    if "raise_to" in table:
        changes["raise_to"] = format_name(table["raise_to"], f"{where}, key raise_to", "gguf")
    return replace(inherited, **changes)


def parse_mode(value: object, where: str) -> Mode:
    """The mode of that name; an unknown one is an error with the nearest match."""
    mode: Mode = one_of(value, Mode, "protection", where)
    return mode
