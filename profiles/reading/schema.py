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
size    = "1.2GiB"                      # or bpw = 2.4, kld = 0.05, mix = "Q4_K_M"; the command line may say it, too;
                                        # or "rules": base and rules only tell how many bytes there are to spend, and
                                        # decide where nothing is measured. Rules of a file that extends this one stand
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
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from bitwright.formats.errors import ConvertError, nearest
from bitwright.formats.files.regular_file import read_whole
from bitwright.formats.schemes.registry import SCHEMES
from bitwright.profiles.reading.activations import ActivationRules, parse_activations
from bitwright.profiles.reading.budget import Budget, parse_budget
from bitwright.profiles.reading.known_names import known_toml, other_names, own_name
from bitwright.profiles.reading.protection import Protection, parse_protection
from bitwright.profiles.reading.rules import LayerQuantizationConfig, parse_rule
from bitwright.profiles.reading.scheme_profile import scheme_toml
from bitwright.profiles.reading.strict import Table, known_keys, number, tables
from bitwright.profiles.reading.target import Target, format_name, parse_target
from bitwright.profiles.reading.tiers import Tier, parse_score, parse_tiers

# More than a person writes.
_LARGEST_BYTES = 1 << 20
PRESETS = Path(__file__).parents[1] / "presets"
_TOP_KEYS = (
    *("description", "good_for", "extends", "target", "base", "tier", "rule"),
    *("score", "budget", "activations", "protection"),
)


@dataclass(frozen=True)
class QuantizationProfile:
    """A named set of decisions, independent of any model.

    base: None where a budget decides. text: the TOML it was read from; inherited: that of the presets it extends, the
    first one first. Both are part of a job's identity. score: shares of what layers are ranked by for tiers, where they
    are not the usual ones. asked_as: another name that people have for it, by which it was asked for. n_rules_of_size:
    how many of the rules, the first ones, only tell the size that the budget spends, as the base does then.
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
    n_rules_of_size: int = 0
    protection: Protection = field(default_factory=Protection)
    activations: ActivationRules = field(default_factory=ActivationRules)
    inherited: tuple[str, ...] = ()
    asked_as: str = field(default="", compare=False)

    @property
    def kind(self) -> str:
        """What it makes, for people."""
        return "a GGUF for llama.cpp" if self.target == "gguf" else "a safetensors directory for vLLM and transformers"

    @property
    def needs_sensitivity(self) -> bool:
        """Whether its decisions rest on what was measured of the model."""
        return bool(self.tiers) or (self.budget is not None and self.budget.has_goal)

    @property
    def has_rules_instead(self) -> bool:
        """Whether its base and rules decide where nothing is measured: its budget spends the bytes they take."""
        return self.budget is not None and self.budget.as_rules

    def by_rules(self) -> "QuantizationProfile":
        """What it is where nothing is measured: its base and rules alone, if they decide then; itself, if not."""
        return replace(self, budget=None, n_rules_of_size=0) if self.has_rules_instead else self

    def beyond_size(self) -> "QuantizationProfile":
        """The same without the base and the rules that only tell the size."""
        return replace(self, base=None, rules=self.rules[self.n_rules_of_size :], n_rules_of_size=0)

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
        budget = self.budget or _preset_budget()
        profile = self.beyond_size() if self.has_rules_instead else self
        return replace(profile, budget=budget.aiming_at(size, bpw, kld, where))


def parse_profile(text: str, name: str, where: str, _extending: tuple[str, ...] = ()) -> QuantizationProfile:
    """A profile from TOML text. name: of the profile; where: as errors name the text.

    Raises ConvertError with file, key and remedy."""
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
    budget: Budget | None = _of(parent, "budget")
    if "budget" in table:
        budget = parse_budget(table["budget"], f"{where}, key budget", budget)
        if parent is not None and parent.has_rules_instead and not budget.as_rules:
            parent = parent.beyond_size()
    base = format_name(table["base"], f"{where}, key base", target) if "base" in table else _of(parent, "base")
    rules = tables(table.get("rule", []), f"{where}, key rule", "rule")
    tiers = parse_tiers(tables(table.get("tier", []), f"{where}, key tier", "tier"), where, target)
    if base is None and budget is None:
        raise ConvertError("the key 'base' is missing", where, 'add base = "Q4_K", or a table [budget]')
    if budget is not None and target != "gguf":
        raise ConvertError("a budget chooses among formats of a GGUF", f"{where}, key budget", 'use target = "gguf"')
    inherited, n_of_size = _of(parent, "rules"), _of(parent, "n_rules_of_size")
    if budget is not None and budget.as_rules:
        if base is None:
            raise ConvertError('the size "rules" is that of base and rules, and there is no base', where, "add base")
        if "size" in table.get("budget", {}):
            n_of_size = len(inherited) + len(rules)
    return QuantizationProfile(
        name=name,
        description=table["description"],
        good_for=table["good_for"],
        base=base,
        rules=(*inherited, *(parse_rule(r, f"{where}, rule {i + 1}", target) for i, r in enumerate(rules))),
        n_rules_of_size=n_of_size,
        text=text,
        target=target,
        tiers=tiers or _of(parent, "tiers"),
        score=parse_score(table.get("score", {}), f"{where}, key score", _of(parent, "score")),
        budget=budget,
        activations=_activations(table, where, target, parent),
        protection=parse_protection(table.get("protection", {}), f"{where}, key protection", _of(parent, "protection")),
        inherited=() if parent is None else (*parent.inherited, parent.text),
    )


def _activations(table: Table, where: str, target: Target, parent: QuantizationProfile | None) -> ActivationRules:
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


def _preset_budget() -> Budget:
    """That of the preset `budget`, whose floors hold for whatever profile has no budget of its own."""
    budget = load_profile("budget").budget
    if budget is None:
        raise ValueError("the preset `budget` has no table [budget]")
    return budget


_NOTHING = QuantizationProfile("", "", "", None, (), "")


def _of(parent: QuantizationProfile | None, field: str) -> Any:
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
    """The names of the profiles that come with Bitwright, in alphabetical order."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def profile_names() -> list[str]:
    """The names of schemes and presets. Two that differ in their letter case alone make the same."""
    return [*SCHEMES, *preset_names()]


def has_name(profile: QuantizationProfile) -> bool:
    """Whether it is what its name alone stands for, and no file that has this name."""
    is_known = profile.name in profile_names() or known_toml(profile.name) is not None
    return is_known and load_profile(profile.name).text == profile.text


def load_profile(name_or_path: str) -> QuantizationProfile:
    """A preset or a scheme by its name, in any letter case, or by one that people have for it; or a TOML file by its
    path."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        name = _own_name(name_or_path)
        if name in SCHEMES:
            return _asked(parse_profile(scheme_toml(name), name, name), name_or_path)
        if name not in preset_names():
            usual, text = known_toml(name) or _unknown(name_or_path)
            return _asked(parse_profile(text, usual, usual), name_or_path)
        path = PRESETS / f"{name}.toml"
    remedy = "name a readable TOML file"
    try:
        text = read_whole(path, _LARGEST_BYTES, remedy).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConvertError(f"the profile cannot be read: {error}", str(path), remedy) from None
    return _asked(
        parse_profile(text, path.stem, path.name), path.stem if name_or_path.endswith(".toml") else name_or_path
    )


def _own_name(name: str) -> str:
    """The preset or scheme of this name, in any letter case; the name itself where there is none."""
    names = profile_names()
    folded = {own.casefold(): own for own in names}
    return name if name in names else folded.get(name.casefold()) or own_name(name) or name


def _asked(profile: QuantizationProfile, name: str) -> QuantizationProfile:
    return replace(profile, asked_as=name) if name.casefold() != profile.name.casefold() else profile


def _unknown(name: str) -> NoReturn:
    """Raises ConvertError with the three names that are most like it."""
    names = {known.casefold(): known for known in [*other_names(), *profile_names()]}
    like = [names[match] for match in get_close_matches(name.casefold(), list(names), n=3, cutoff=0.0)]
    raise ConvertError(
        f"there is no profile {name!r}",
        "--profile",
        f"did you mean {like[0]}, {like[1]} or {like[2]}? `bitwright profiles list` has them all; a file ends in .toml",
    )
