"""What a profile of a safetensors directory asks of activations: its table [activations]."""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from formats.errors import ConvertError, nearest
from profiles.kv_cache import NO_CACHE_SCHEME, parse_cache_scheme
from profiles.precision import Phase
from profiles.strict import known_keys, one_table

Scales = Literal["absmax", "average", "percentile", "mse"]
_KEYS = ("smooth", "alpha", "scales", "adapt", "phase", "prompt_tokens", "kv_cache")


@dataclass(frozen=True)
class ActivationRules:
    """smooth: whether outliers are moved into the weights first; alpha: how far. scales: how the range of a static
    scale is found. adapt: whether a scheme that a matrix's inputs cannot bear is replaced; phase and prompt_tokens (of
    the longest prompts in use): what the model is for, see profiles.precision.Context. kv_cache: the scheme of the
    cache of keys and values, see formats.cache_scheme, or NO_CACHE_SCHEME."""

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
    changes: dict[str, Any] = {}
    for key in ("smooth", "adapt"):
        if key in table:
            if not isinstance(table[key], bool):
                raise ConvertError(f"{table[key]!r} is neither true nor false", f"{where}, key {key}", "write true")
            changes[key] = table[key]
    if "alpha" in table:
        changes["alpha"] = _alpha(table["alpha"], f"{where}, key alpha")
    for key, kind in (("scales", Scales), ("phase", Phase)):
        if key in table:
            value, known = table[key], list(get_args(kind))
            if value not in known:
                raise ConvertError(f"unknown {key} {value!r}", f"{where}, key {key}", nearest(str(value), known))
            changes[key] = value
    if "prompt_tokens" in table:
        n_tokens = table["prompt_tokens"]
        if type(n_tokens) is not int or n_tokens < 1:
            raise ConvertError(
                f"{n_tokens!r} is no number of tokens", f"{where}, key prompt_tokens", "write 4096, for instance"
            )
        changes["prompt_tokens"] = n_tokens
    if "kv_cache" in table:
        changes["kv_cache"] = parse_cache_scheme(table["kv_cache"], f"{where}, key kv_cache")
    return replace(inherited, **changes)


def _alpha(value: object, where: str) -> float | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConvertError(f"alpha is {value!r}", where, 'write a number from 0 to 1, or "auto"')
    return float(value)
