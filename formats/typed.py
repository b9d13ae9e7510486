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
    if origin in (tuple, list):
        return isinstance(value, origin) and all(is_a(item, options[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(is_a(k, options[0]) and is_a(v, options[1]) for k, v in value.items())
    if type(value) is int and declared is float:
        return value.bit_length() < 1024
    exact = declared not in (int, bool) or type(value) is declared
    return exact and isinstance(value, declared) and (type(value) is not float or isfinite(value))
