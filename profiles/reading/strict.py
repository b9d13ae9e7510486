"""Reading TOML tables strictly: what is unknown or of a wrong kind is named, with the nearest right thing."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, get_args

from bitwright.formats.errors import ConvertError, nearest
from bitwright.profiles.vocabulary import Role

Table = dict[str, Any]
"""A table of a TOML file, as tomllib reads it."""


def known_keys(table: Table, keys: Sequence[str], where: str) -> None:
    """Raises ConvertError for the first key that is none of these."""
    for key in table:
        if key not in keys:
            raise ConvertError(f"unknown key {key!r}", where, nearest(key, list(keys)))


def one_of(value: object, kind: Any, what: str, where: str) -> Any:
    """The value, which is one that the Literal type `kind` has; what: of it, for the message."""
    known = get_args(kind)
    if value not in known:
        raise ConvertError(f"unknown {what} {value!r}", where, nearest(str(value), list(known)))
    return value


def strings(value: object, where: str) -> tuple[str, ...]:
    """A text, or a list of texts, as a tuple."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise ConvertError("a text or a list of texts is expected", where, 'write for example roles = ["mlp_down"]')


def role_patterns(value: object, where: str) -> tuple[str, ...]:
    """Roles, or patterns of which each matches a role."""
    patterns = strings(value, where)
    for pattern in patterns:
        if not any(fnmatchcase(role, pattern) for role in Role):
            raise ConvertError(f"no role matches {pattern!r}", where, nearest(pattern, [role.value for role in Role]))
    return patterns


def number(value: object, where: str) -> float:
    """A positive number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConvertError(f"a positive number is expected, not {value!r}", where, "write for example 0.05")
    return float(value)


def tables(value: object, where: str, header: str) -> list[Table]:
    """A list of tables, each below a line [[header]]."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ConvertError(f"`{header}` is a list of tables", where, f"write each one below a line [[{header}]]")
    return value


def one_table(value: object, where: str, header: str) -> Table:
    """A table, below a line [header]."""
    if not isinstance(value, dict):
        raise ConvertError(f"`{header}` is a table", where, f"write its keys below a line [{header}]")
    return value
