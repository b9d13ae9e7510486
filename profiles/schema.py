"""Profiles as TOML files, read strictly: an unknown key, role or format is an error that names the nearest match.

description = "one line: what it does"
good_for    = "one line: when to use it"
extends     = "balanced-4bit"           # optional: a preset whose decisions come first
target      = "gguf"                    # optional: or "safetensors", whose formats are schemes ("W4A16")
base        = "Q4_K"                    # the format of every matrix that nothing below names

[[tier]]                                # optional: layers ranked by importance, the first tier gets the top ones
share  = 0.2
format = "Q8_0"

[[rule]]                                # the last rule that matches a tensor decides, also over tiers
roles  = ["mlp_gate", "attention_*"]    # roles, or patterns of roles
layers = ["first:2", "last:10%"]        # optional; also "all", "every:3", "4-7", "12", "1/3-2/3"
format = "Q3_K"

[[rule]]
tensors = ["blk.*.attn_v.weight"]       # or patterns of GGUF tensor names, instead of roles
format  = "Q6_K"

[budget]                                # instead of `base`: measured sensitivity chooses what no rule names
size    = "1.2GiB"                      # or bpw = 2.4, or kld = 0.05; the command line may say it, too
formats = ["IQ*", "Q*_K"]               # optional: what to choose among
alike   = [["mlp_gate", "mlp_up"]]      # optional: roles that share a format within a layer
floors  = { "attention_*" = "Q2_K" }    # optional: no fewer bits than this

[activations]                           # optional, for a safetensors directory: how activations are rounded
smooth = true                           # move their outliers into the weights first (SmoothQuant)
alpha  = 0.5                            # how far: 0 to 1, or "auto", by group
scales = "mse"                          # static scales: or "absmax", "average", "percentile"
adapt  = true                           # what they cannot bear falls back to a scheme that they can
phase  = "both"                         # for prompts ("prefill"), generating ("decode"), or both; prompt_tokens = 4096
                                        # says the rest of what the model is for
kv_cache = "FP8"                        # the cache of keys and values, with scales from calibration; "BF16" without

[protection]                            # optional: what is done for super weights
super_weights = "auto"                  # what measurement shows to help; or off, raise, pin, rescale, exclude
tolerance     = 0.05                    # the share of its magnitude by which one may be off
raise_to      = "Q6_K"                  # the format of "raise"
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from formats.errors import ConvertError, nearest
from formats.regular_file import read_whole
from formats.schemes import SCHEMES
from profiles.activations import ActivationRules, parse_activations
from profiles.budget import Budget, parse_budget
from profiles.protection import Protection, parse_protection
from profiles.rules import LayerQuantizationConfig, parse_rule
from profiles.scheme_profile import scheme_toml
from profiles.strict import known_keys, number, tables
from profiles.target import Target, format_name, parse_target
from profiles.tiers import Tier, parse_score, parse_tiers

# More than a person writes.
_LARGEST_BYTES = 1 << 20
PRESETS = Path(__file__).parent / "presets"
_TOP_KEYS = (
    *("description", "good_for", "extends", "target", "base", "tier", "rule"),
    *("score", "budget", "activations", "protection"),
)


@dataclass(frozen=True)
class QuantizationProfile:
    """A named set of decisions, independent of any model.

    base: None where a budget decides. text: the TOML it was read from; inherited: that of the presets it extends, the
    first one first. Both are part of a job's identity. score: shares of what layers are ranked by for tiers, where they
    are not the usual ones.
    """

    name: str
    description: str
    good_for: str
    base: str | None
    rules: tuple[LayerQuantizationConfig, ...]
    text: str
    target: Target = "gguf"
    tiers: tuple[Tier, ...] = ()
    score: Mapping[str, float] = field(default_factory=dict)
    budget: Budget | None = None
    protection: Protection = field(default_factory=Protection)
    activations: ActivationRules = field(default_factory=ActivationRules)
    inherited: tuple[str, ...] = ()

    @property
    def needs_sensitivity(self) -> bool:
        """Whether its decisions rest on what was measured of the model."""
        return bool(self.tiers) or (self.budget is not None and self.budget.has_goal)

    @property
    def label(self) -> str:
        """The name, and the goal where it has one."""
        return f"{self.name}_{self.budget.label}" if self.budget is not None and self.budget.has_goal else self.name

    def aiming_at(self, size: int | None, bpw: float | None, kld: float | None, where: str) -> "QuantizationProfile":
        """This profile with a goal, whose budget then decides what no rule names; all None leaves it as it is."""
        if size is None and bpw is None and kld is None:
            return self
        if self.target != "gguf":
            raise ConvertError(
                f"a target chooses among formats of a GGUF, and {self.name!r} makes a safetensors directory",
                where,
                "leave the target out, or name a profile whose target is a GGUF",
            )
        for number_of in (bpw, kld):
            if number_of is not None:
                number(number_of, where)
        budget = self.budget or load_profile("budget").budget  # whose floors hold for whatever has none of its own
        assert budget is not None
        return replace(self, budget=budget.aiming_at(size, bpw, kld, where))


def parse_profile(text: str, name: str, where: str, _extending: tuple[str, ...] = ()) -> QuantizationProfile:
    """A profile from TOML text; raises ConvertError with file, key and remedy."""
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"the profile is not valid TOML: {error}", where, "mend the line that is named") from None
    known_keys(table, _TOP_KEYS, where)
    for key in ("description", "good_for"):
        if not isinstance(table.get(key), str):
            raise ConvertError(f"the key {key!r} is missing or no text", where, f'add {key} = "..."')
    parent = _parent(table["extends"], where, _extending) if "extends" in table else None
    target = parse_target(table["target"], f"{where}, key target") if "target" in table else _of(parent, "target")
    if parent is not None and parent.target != target:
        raise ConvertError(f"{parent.name!r} has the target {parent.target}", f"{where}, key extends", "extend another")
    base = format_name(table["base"], f"{where}, key base", target) if "base" in table else _of(parent, "base")
    rules = tables(table.get("rule", []), f"{where}, key rule", "rule")
    tiers = parse_tiers(tables(table.get("tier", []), f"{where}, key tier", "tier"), where, target)
    budget: Budget | None = _of(parent, "budget")
    if "budget" in table:
        budget = parse_budget(table["budget"], f"{where}, key budget", budget)
    if base is None and budget is None:
        raise ConvertError("the key 'base' is missing", where, 'add base = "Q4_K", or a table [budget]')
    if budget is not None and target != "gguf":
        raise ConvertError("a budget chooses among formats of a GGUF", f"{where}, key budget", 'use target = "gguf"')
    return QuantizationProfile(
        name=name,
        description=table["description"],
        good_for=table["good_for"],
        base=base,
        rules=(*_of(parent, "rules"), *(parse_rule(r, f"{where}, rule {i + 1}", target) for i, r in enumerate(rules))),
        text=text,
        target=target,
        tiers=tiers or _of(parent, "tiers"),
        score=parse_score(table.get("score", {}), f"{where}, key score", _of(parent, "score")),
        budget=budget,
        activations=_activations(table, where, target, parent),
        protection=parse_protection(table.get("protection", {}), f"{where}, key protection", _of(parent, "protection")),
        inherited=() if parent is None else (*parent.inherited, parent.text),
    )


def _activations(table: dict, where: str, target: Target, parent: QuantizationProfile | None) -> ActivationRules:
    inherited: ActivationRules = _of(parent, "activations")
    if "activations" not in table:
        return inherited
    here = f"{where}, key activations"
    if target != "safetensors" and isinstance(table["activations"], dict) and "kv_cache" in table["activations"]:
        raise ConvertError(
            "a GGUF says nothing of the cache of keys and values: llama.cpp is told its type when it runs",
            f"{here}, key kv_cache",
            'leave it out, and run with --cache-type-k q8_0 --cache-type-v q8_0; or use target = "safetensors"',
        )
    if target != "safetensors":
        raise ConvertError("a GGUF says nothing of activations", here, 'use target = "safetensors"')
    return parse_activations(table["activations"], here, inherited)


_NOTHING = QuantizationProfile("", "", "", None, (), "")


def _of(parent: QuantizationProfile | None, field: str):
    """What a profile that says nothing of this field has: the field of the preset it extends."""
    return getattr(parent or _NOTHING, field)


def _parent(name: object, where: str, extending: tuple[str, ...]) -> QuantizationProfile:
    here = f"{where}, key extends"
    if name not in preset_names():
        raise ConvertError(f"no preset is called {name!r}", here, nearest(str(name), preset_names()))
    if name in extending:
        raise ConvertError(f"the preset {name!r} would extend itself", here, "extend another one")
    path = PRESETS / f"{name}.toml"
    return parse_profile(path.read_text(encoding="utf-8"), path.stem, path.name, (*extending, path.stem))


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def profile_names() -> list[str]:
    """Of schemes and presets: a scheme and a preset may differ in their letter case alone."""
    return [*SCHEMES, *preset_names()]


def load_profile(name_or_path: str) -> QuantizationProfile:
    """A preset or a scheme by its name, or a TOML file by its path."""
    if name_or_path in SCHEMES:
        return parse_profile(scheme_toml(name_or_path), name_or_path, name_or_path)
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = PRESETS / f"{name_or_path}.toml"
        if name_or_path not in preset_names():
            raise ConvertError(
                f"unknown profile {name_or_path!r}",
                "--profile",
                f"{nearest(name_or_path, profile_names())} `convert profiles list` describes each; "
                "a file of your own ends in .toml",
            )
    remedy = "name a readable TOML file"
    try:
        text = read_whole(path, _LARGEST_BYTES, remedy).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConvertError(f"the profile cannot be read: {error}", str(path), remedy) from None
    return parse_profile(text, path.stem, path.name)
