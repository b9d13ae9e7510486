"""Whether parsed data is what a declaration says: types as they are written in dataclasses."""

from math import isfinite
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


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
