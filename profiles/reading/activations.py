"""What a profile of a safetensors directory asks of activations: its table [activations]."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from bitwright.formats.errors import ConvertError, nearest
from bitwright.formats.schemes.cache_scheme import CACHE_SCHEMES
from bitwright.profiles.reading.strict import known_keys, one_of, one_table

Scales = Literal["absmax", "average", "percentile", "mse"]
"""How the range of a static scale is found, see statistics.activation_ranges of calibration."""

Phase = Literal["prefill", "decode", "both"]
"""Where a model spends its time: in prompts, in generating, or in both."""

NO_CACHE_SCHEME = "BF16"
"""Caches stay in the 16 bits of the runtime."""

_KEYS = ("smooth", "alpha", "scales", "adapt", "phase", "prompt_tokens", "kv_cache")


@dataclass(frozen=True)
class ActivationRules:
    """smooth: whether outliers are moved into the weights first; alpha: how far, from 0 (not at all) to 1, or "auto".
    adapt: whether a scheme that a matrix's inputs cannot bear is replaced; phase and prompt_tokens (of the longest
    prompts in use): what the model is for, see planning.precision.Context. kv_cache: the scheme of the cache of keys
    and values, see formats.schemes.cache_scheme, or NO_CACHE_SCHEME."""

    smooth: bool = False
    alpha: float | Literal["auto"] = 0.5
    scales: Scales = "mse"
    adapt: bool = True
    phase: Phase = "both"
    prompt_tokens: int = 4096
    kv_cache: str = NO_CACHE_SCHEME


def parse_activations(table: object, where: str, inherited: ActivationRules) -> ActivationRules:
    """From the TOML table, on top of what is inherited. Raises ConvertError with the key that is wrong."""
    table = one_table(table, where, "activations")
    known_keys(table, _KEYS, where)
    return replace(inherited, **{key: _value(key, value, f"{where}, key {key}") for key, value in table.items()})


def _value(key: str, value: object, where: str) -> Any:
    if key in ("smooth", "adapt"):
        return _flag(value, where)
    if key == "alpha":
        return _alpha(value, where)
    if key == "prompt_tokens":
        return _n_tokens(value, where)
    if key == "kv_cache":
        return parse_cache_scheme(value, where)
    return one_of(value, {"scales": Scales, "phase": Phase}[key], key, where)


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise ConvertError(f"{value!r} is neither true nor false", where, "write true")
    return value


def _alpha(value: object, where: str) -> float | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConvertError(f"alpha is {value!r}", where, 'write a number from 0 to 1, or "auto"')
    return float(value)


def _n_tokens(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConvertError(f"{value!r} is no number of tokens", where, "write 4096, for instance")
    return value


def parse_cache_scheme(value: object, where: str) -> str:
    """The name as CACHE_SCHEMES spells it, or NO_CACHE_SCHEME; an unknown one is an error with the nearest match."""
    known = [*CACHE_SCHEMES, NO_CACHE_SCHEME]
    if isinstance(value, str) and value.upper() in known:
        return value.upper()
    raise ConvertError(f"no scheme of a cache is called {value!r}", where, nearest(str(value), known))
