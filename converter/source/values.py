"""Typed access to what config.json states, and the numbers of GGUF: a value that is of no use is named with its key."""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from bitwright.formats.errors import ConvertError
from bitwright.formats.names import is_text, printable

MAX_COUNT = 2**31 - 1
"""llama.cpp and its libraries count in 32 bits with a sign."""
_MAX_FLOAT, _MIN_FLOAT = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)


def is_number(value: object) -> TypeGuard[float]:
    """Whether this is a number that a float32 can hold, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_FLOAT


def is_positive(value: object) -> bool:
    """Whether this is a number above zero, to a float32 too."""
    return is_number(value) and value >= _MIN_FLOAT


def is_count(value: object, largest: int = MAX_COUNT) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= largest


def with_floats(value: Any) -> Any:
    """The value of a configuration with the numbers that transformers 5 spells {"__float__": "Infinity"} as such."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: with_floats(inner) for key, inner in value.items()}
    return [with_floats(inner) for inner in value] if isinstance(value, list) else value


def check_finite(config: Mapping[str, Any], where: str) -> None:
    """Raises ConvertError for infinity and NaN anywhere in the configuration: JSON has neither, Python reads both. For
    the longest step of a state space infinity is the usual limit."""
    pending: list[tuple[str, Any]] = list(config.items())
    while pending:
        path, value = pending.pop()
        if isinstance(value, float) and not math.isfinite(value) and (path != "time_step_limit" or math.isnan(value)):
            raise unusable(path, value, "which is no number to use", where)
        if isinstance(value, dict):
            pending += ((f"{path}.{key}", inner) for key, inner in value.items())
        elif isinstance(value, list):
            pending += ((path, inner) for inner in value)


def check_text(config: Mapping[str, Any], where: str) -> None:
    """Raises ConvertError for half of a surrogate pair anywhere in what was read of JSON, keys included: JSON can spell
    it, and no file of UTF-8 can hold it."""
    pending: list[tuple[str, Any]] = list(config.items())
    while pending:
        path, value = pending.pop()
        if not is_text(path) or (isinstance(value, str) and not is_text(value)):
            raise unusable(printable(path), value, "which is no text", where)
        if isinstance(value, dict):
            pending += ((f"{path}.{key}", inner) for key, inner in value.items())
        elif isinstance(value, list):
            pending += ((path, inner) for inner in value)


def count(values: Mapping[str, Any], key: str, where: str, default: int | None = None, largest: int = MAX_COUNT) -> int:
    """The size that is stated at this key. largest: what is stored allows for no more."""
    value = values.get(key, default)
    if not is_count(value):
        raise unusable(key, value, "which is no size", where)
    if value > largest:
        raise unusable(key, value, f"and what is stored allows for {largest} at most", where)
    return int(value)


def number(values: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    """The number that is stated at this key; not negative, and within float32."""
    value = values.get(key, default)
    if not is_number(value) or value < 0:
        raise unusable(key, value, "which is no number to use", where)
    return value


def table(values: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """The JSON object at this key; an empty one where there is none."""
    value = values.get(key)
    if value is not None and not isinstance(value, dict):
        raise unusable(key, value, "which is no table", where)
    return value or {}


def uint32(value: float, key: str, where: str) -> GGUFValue:
    if not is_number(value) or not 0 <= value < 2**32 or value != int(value):
        raise unusable(key, value, "which is no whole number of 32 bits", where)
    return GGUFValue(int(value), GGUFValueType.UINT32)


def float32(value: float, key: str, where: str) -> GGUFValue:
    if not is_number(value):
        raise unusable(key, value, "which is no number of 32 bits", where)
    return GGUFValue(float(value), GGUFValueType.FLOAT32)


def unusable(key: str, value: object, why: str, where: str) -> ConvertError:
    said = repr(value)
    if len(said) > 80:
        said = said[:77] + "..."
    return ConvertError(
        f"the configuration gives {key} = {said}, {why}",
        f"{where}: {key}",
        "fetch config.json of the same revision again",
    )
