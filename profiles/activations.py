"""What a profile of a safetensors directory asks of activations: its table [activations]."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from formats.errors import ConvertError, nearest
from profiles.strict import known_keys, one_table

Scales = Literal["absmax", "percentile", "mse"]
_KEYS = ("smooth", "alpha", "scales", "adapt")


@dataclass(frozen=True)
class ActivationRules:
    """smooth: whether outliers are moved into the weights first; alpha: how far. scales: how the range of a static
    scale is found. adapt: whether a scheme that a matrix's inputs cannot bear is replaced."""

    smooth: bool = False
    alpha: float | Literal["auto"] = 0.5
    scales: Scales = "mse"
    adapt: bool = True


def parse_activations(table: object, where: str, inherited: ActivationRules) -> ActivationRules:
    """From the TOML table, on top of what is inherited. Raises ConvertError with the key that is wrong."""
    table = one_table(table, where, "activations")
    known_keys(table, _KEYS, where)
    changes: dict = {}
    for key in ("smooth", "adapt"):
        if key in table:
            if not isinstance(table[key], bool):
                raise ConvertError(f"{table[key]!r} is neither true nor false", f"{where}, key {key}", "write true")
            changes[key] = table[key]
    if "alpha" in table:
        changes["alpha"] = _alpha(table["alpha"], f"{where}, key alpha")
    if "scales" in table:
        scales, known = table["scales"], list(get_args(Scales))
        if scales not in known:
            raise ConvertError(f"unknown scales {scales!r}", f"{where}, key scales", nearest(str(scales), known))
        changes["scales"] = scales
    return replace(inherited, **changes)


def _alpha(value: object, where: str) -> float | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConvertError(f"alpha is {value!r}", where, 'write a number from 0 to 1, or "auto"')
    return float(value)
