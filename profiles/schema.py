"""Profiles as TOML files, read strictly: an unknown key, role or format is an error that names the nearest match.

description = "one line: what it does"
good_for    = "one line: when to use it"
base        = "Q4_K"                    # the format of every matrix that no rule below names

[[rule]]                                # the last rule that matches a tensor decides
roles  = ["mlp_gate", "attention_*"]    # roles, or patterns of roles
layers = ["first:2", "last:10%"]        # optional; also "all", "every:3", "4-7", "12"
format = "Q3_K"

[[rule]]
tensors = ["blk.*.attn_v.weight"]       # or patterns of GGUF tensor names, instead of roles
format  = "Q6_K"
"""

import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import ceil
from pathlib import Path

from formats.errors import ConvertError, nearest
from formats.registry import get_format
from profiles.vocabulary import Role, TensorSpec

PRESETS = Path(__file__).parent / "presets"
_TOP_KEYS = ["description", "good_for", "base", "rule"]
_RULE_KEYS = ["roles", "tensors", "layers", "format"]


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


@dataclass(frozen=True)
class QuantizationProfile:
    """A named set of decisions, independent of any model. text: the TOML it was read from, part of a job's identity."""

    name: str
    description: str
    good_for: str
    base: str
    rules: tuple[LayerQuantizationConfig, ...]
    text: str


def in_range(layer: int, n_layers: int, text: str) -> bool:
    """Whether a layer lies in a range such as "first:2", "last:12.5%", "every:3", "4-7", "12" or "all".

    Raises ValueError when the text is none of these. A fraction of the layers is rounded up, so that it is never empty.
    """
    kind, _, value = text.partition(":")
    if kind in ("first", "last", "every") and value:
        n = ceil(float(value[:-1]) / 100 * n_layers) if value.endswith("%") else int(value)
        if n < 1:
            raise ValueError(text)
        return {"first": layer < n, "last": layer >= n_layers - n, "every": layer % n == 0}[kind]
    if text == "all":
        return True
    first, _, last = text.partition("-")
    return int(first) <= layer <= int(last or first)


def _strings(value: object, where: str) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise ConvertError("a text or a list of texts is expected", where, 'write for example roles = ["mlp_down"]')


def _known_keys(table: dict, keys: list[str], where: str) -> None:
    for key in table:
        if key not in keys:
            raise ConvertError(f"unknown key {key!r}", where, nearest(key, keys))


def parse_rule(table: dict, where: str) -> LayerQuantizationConfig:
    """A rule from its TOML table; raises ConvertError with the key that is wrong."""
    _known_keys(table, _RULE_KEYS, where)
    if "format" not in table or ("roles" in table) == ("tensors" in table):
        raise ConvertError("a rule needs `format` and one of `roles` and `tensors`", where, "add what is missing")
    roles = _strings(table["roles"], f"{where}, key roles") if "roles" in table else ()
    for pattern in roles:
        if not any(fnmatchcase(role, pattern) for role in Role):
            raise ConvertError(
                f"no role matches {pattern!r}", f"{where}, key roles", nearest(pattern, [role.value for role in Role])
            )
    layers = _strings(table.get("layers", "all"), f"{where}, key layers")
    for text in layers:
        try:
            in_range(0, 1, text)
        except ValueError:
            raise ConvertError(
                f"{text!r} is no range of layers",
                f"{where}, key layers",
                'write "all", "first:2", "last:10%", "every:3", "4-7" or "12"',
            ) from None
    return LayerQuantizationConfig(
        format=get_format(table["format"], f"{where}, key format").name,
        text=where,
        roles=roles,
        tensors=_strings(table["tensors"], f"{where}, key tensors") if "tensors" in table else (),
        layers=layers,
    )


def parse_profile(text: str, name: str, where: str) -> QuantizationProfile:
    """A profile from TOML text; raises ConvertError with file, key and remedy."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConvertError(f"the profile is not valid TOML: {error}", where, "mend the line that is named") from None
    _known_keys(table, _TOP_KEYS, where)
    for key in ("description", "good_for", "base"):
        if not isinstance(table.get(key), str):
            raise ConvertError(f"the key {key!r} is missing or no text", where, f'add {key} = "..."')
    rules = table.get("rule", [])
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise ConvertError("rules are tables", f"{where}, key rule", "write each one below a line [[rule]]")
    return QuantizationProfile(
        name=name,
        description=table["description"],
        good_for=table["good_for"],
        base=get_format(table["base"], f"{where}, key base").name,
        rules=tuple(parse_rule(rule, f"{where}, rule {i + 1}") for i, rule in enumerate(rules)),
        text=text,
    )


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_profile(name_or_path: str) -> QuantizationProfile:
    """A preset by its name, or a TOML file by its path."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = PRESETS / f"{name_or_path}.toml"
        if name_or_path not in preset_names():
            raise ConvertError(
                f"unknown profile {name_or_path!r}",
                "--profile",
                f"{nearest(name_or_path, preset_names())} `convert profiles list` describes each; "
                "a file of your own ends in .toml",
            )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConvertError(f"the profile cannot be read: {error}", str(path), "name a readable TOML file") from None
    return parse_profile(text, path.stem, path.name)


def parse_override(text: str) -> LayerQuantizationConfig:
    """A rule from the command line, PATTERN=FORMAT; PATTERN is a role, a tensor name, or a pattern of either."""
    pattern, separator, format_name = text.partition("=")
    where = f"--set {text!r}"
    if not separator or not pattern or not format_name:
        raise ConvertError("an override is PATTERN=FORMAT", where, "for example --set 'mlp_down=Q4_K'")
    is_role = any(fnmatchcase(role, pattern) for role in Role)
    return LayerQuantizationConfig(
        format=get_format(format_name, where).name,
        text=where,
        roles=(pattern,) if is_role else (),
        tensors=() if is_role else (pattern,),
    )
