"""Rules: which tensors, by role or name and layer, get which format."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from math import ceil

from bitwright.formats.errors import ConvertError
from bitwright.profiles.reading.strict import Table, known_keys, role_patterns, strings
from bitwright.profiles.reading.target import Target, format_name
from bitwright.profiles.vocabulary import Role, TensorSpec

_RULE_KEYS = ("roles", "tensors", "layers", "format")


@dataclass(frozen=True)
class LayerQuantizationConfig:
    """One rule: the format of all tensors of these roles (or these names) in these layers.

    roles, tensors: patterns (fnmatch); exactly one of the two is given. layers: ranges, any of which may match; a
    tensor outside of the decoder layers matches only a rule without layers. text: how a plan's reasons quote the rule.
    """

    format: str
    text: str
    roles: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    layers: tuple[str, ...] = ("all",)

    def matches(self, tensor: TensorSpec, n_layers: int, role: Role | None = None) -> bool:
        """Whether the rule speaks of this tensor, in its own role or in the one it is asked to play."""
        named = any(fnmatchcase(tensor.name, pattern) for pattern in self.tensors)
        named = named or any(fnmatchcase(role or tensor.role, pattern) for pattern in self.roles)
        if not named or self.layers == ("all",):
            return named
        return tensor.layer is not None and any(in_range(tensor.layer, n_layers, text) for text in self.layers)


def in_range(layer: int, n_layers: int, text: str) -> bool:
    """Whether a layer lies in a range: "all", "12", "4-7", "first:2", "last:12.5%", "first:1/3", "every:3", "1/3-2/3".

    Raises ValueError when the text is none of these. A share of the layers is rounded up, so that "first" and "last"
    are never empty, and ranges of shares that meet share no layer.
    """
    kind, _, value = text.partition(":")
    if kind in ("first", "last", "every") and value:
        share = None if kind == "every" else _share(value)
        n = int(value) if share is None else ceil(share * n_layers)
        if n < 1:
            raise ValueError(text)
        return {"first": layer < n, "last": layer >= n_layers - n, "every": layer % n == 0}[kind]
    if text == "all":
        return True
    first, _, last = text.partition("-")
    start, stop = _share(first), _share(last)
    if start is not None and stop is not None and start < stop:
        return ceil(start * n_layers) <= layer < ceil(stop * n_layers)
    bounds = int(first), int(last) if "-" in text else int(first)
    if bounds[0] > bounds[1]:
        raise ValueError(text)
    return bounds[0] <= layer <= bounds[1]


def _share(text: str) -> Fraction | None:
    """The share that "12.5%" or "1/3" is; None for a text that is no share of at most 1."""
    try:
        share = Fraction(text[:-1]) / 100 if text.endswith("%") else Fraction(text) if "/" in text else None
    except ZeroDivisionError:
        raise ValueError(text) from None
    if share is not None and not 0 <= share <= 1:
        raise ValueError(text)
    return share


def check_range(text: str, where: str) -> None:
    """Raises ConvertError for what is no range of layers."""
    try:
        in_range(0, 1, text)
    except ValueError:
        raise ConvertError(
            f"{text!r} is no range of layers",
            where,
            'write "all", "12", "4-7", "first:2", "last:10%", "first:1/3", "1/3-3/3" or "every:3"',
        ) from None


def parse_rule(table: Table, where: str, target: Target) -> LayerQuantizationConfig:
    """A rule from its TOML table; raises ConvertError with the key that is wrong."""
    known_keys(table, _RULE_KEYS, where)
    if "format" not in table or ("roles" in table) == ("tensors" in table):
        raise ConvertError("a rule needs `format` and one of `roles` and `tensors`", where, "add what is missing")
    layers = strings(table.get("layers", "all"), f"{where}, key layers")
    for text in layers:
        check_range(text, f"{where}, key layers")
    return LayerQuantizationConfig(
        format=format_name(table["format"], f"{where}, key format", target),
        text=where,
        roles=role_patterns(table["roles"], f"{where}, key roles") if "roles" in table else (),
        tensors=strings(table["tensors"], f"{where}, key tensors") if "tensors" in table else (),
        layers=layers,
    )


def parse_override(text: str, target: Target = "gguf") -> LayerQuantizationConfig:
    """A rule from the command line, PATTERN=FORMAT; PATTERN is a role, a tensor name, or a pattern of either."""
    pattern, separator, name = text.partition("=")
    where = f"--set {text!r}"
    if not separator or not pattern or not name:
        raise ConvertError("an override is PATTERN=FORMAT", where, "for example --set 'mlp_down=Q4_K'")
    is_role = any(fnmatchcase(role, pattern) for role in Role)
    return LayerQuantizationConfig(
        format=format_name(name, where, target),
        text=where,
        roles=(pattern,) if is_role else (),
        tensors=() if is_role else (pattern,),
    )
