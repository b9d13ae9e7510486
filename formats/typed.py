"""Parsed data and what a declaration says of it: types as they are written in dataclasses."""

from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from math import isfinite
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def is_a(value: object, declared: Any) -> bool:
    """True for a value of the declared type: a class, Literal, union, tuple[T, ...], list[T], or dict[K, V].

    A bool is no int, an int is a float too, and a float is finite.
    """
    origin, options = get_origin(declared), get_args(declared)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in options)
    if origin in (Union, UnionType):
        return any(is_a(value, option) for option in options)
    if origin in (tuple, list, dict):
        parts: list[Any] = list(zip(*value.items(), strict=True)) if isinstance(value, dict) else [value]
        return isinstance(value, origin) and all(
            is_a(item, of) for items, of in zip(parts, options, strict=False) for item in items
        )
    if declared is float:
        return (type(value) is float and isfinite(value)) or (type(value) is int and value.bit_length() < 1024)
    return type(value) is declared if declared in (int, bool) else isinstance(value, declared)


class Absent(Enum):
    """What a field holds whose key a record does not have."""

    ABSENT = "absent"

    def __bool__(self) -> Literal[False]:
        return False


ABSENT = Absent.ABSENT


def to_plain(value: object) -> Any:
    """The value as JSON holds it: dataclasses as dicts without the fields that are ABSENT, tuples as lists."""
    if is_dataclass(value):
        members = {field.name: getattr(value, field.name) for field in fields(value)}
        return {name: to_plain(member) for name, member in members.items() if member is not ABSENT}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def from_plain(declared: Any, plain: object, where: str = "the record") -> Any:
    """The value of the declared type that to_plain makes this of; declared: as for is_a, or a dataclass.

    A key that the record lacks counts as the field's default, or as None where the field may be None: an earlier
    version did not know it. Keys that no field has are ignored. A float may be infinite or no number. Raises ValueError
    for anything else, with the place as a path that begins with `where`.
    """
    origin, options = get_origin(declared), get_args(declared)
    if origin in (Union, UnionType):
        for option in options:
            with suppress(ValueError):
                return from_plain(option, plain, where)
    elif isinstance(declared, type) and is_dataclass(declared):
        if isinstance(plain, dict):
            members = {}
            for name, (of, required) in _members(declared).items():
                if name in plain or required:
                    members[name] = from_plain(of, plain.get(name), f"{where}.{name}")
            return declared(**members)
    elif origin is tuple and isinstance(plain, (tuple, list)):
        of = options[:1] * len(plain) if options[-1] is Ellipsis else options
        if len(of) == len(plain):
            pairs = zip(of, plain, strict=True)
            return tuple(from_plain(item_type, item, f"{where}.{i}") for i, (item_type, item) in enumerate(pairs))
    elif origin is dict and isinstance(plain, dict) and all(is_a(key, options[0]) for key in plain):
        return {key: from_plain(options[1], item, f"{where}.{key}") for key, item in plain.items()}
    elif (declared is float and type(plain) is float) or (origin not in (tuple, dict) and is_a(plain, declared)):
        return plain
    raise ValueError(f"{where} is not what it should be")


@cache
def _members(declared: type) -> dict[str, tuple[Any, bool]]:
    """The type of each field of a dataclass, and whether it has no default."""
    types = get_type_hints(declared)
    return {
        field.name: (types[field.name], field.default is MISSING and field.default_factory is MISSING)
        for field in fields(declared)
    }
