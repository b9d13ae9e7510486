"""One data file per architecture: what its checkpoints are made of, and what llama.cpp calls it.

Every file in `architectures/` is one table of facts; docs/add-an-architecture.md explains each key. This module reads
them and finds the one of a configuration.
"""

import re
import tomllib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from gguf import MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map

from formats.errors import ConvertError, nearest
from profiles.vocabulary import Role, TensorSpec

# Buffers that old versions stored, of whatever dtype: runtimes compute them, and would not know the tensor.
COMPUTED = re.compile(r"\.rotary_emb(_local)?\.inv_freq$|(^|\.)position_ids$")

# A model that was saved without its head (AutoModel) has names without this beginning.
_WITHOUT_HEAD = re.compile(r"^(?=(embed_tokens|layers|norm)\.)")

# Without a value these mean that there is none, or that it follows from others; any other key then has its default.
_MEANT_WITHOUT_VALUE = ("num_key_value_heads", "sliding_window", "rope_theta")


@dataclass(frozen=True)
class TensorRule:
    """One kind of tensor of the checkpoint.

    pattern: its name, with {layer} and {expert} in the place of the indices.
    shape: names of dimensions, see configuration.py; of one expert's matrix where the tensors are stacked.
    rotary: dimension that counts the heads, where llama.cpp wants their rows in another order, see `Transform`.
    when: key of the configuration that says whether it is there (biases); empty where it always is.
    """

    pattern: str
    role: Role
    shape: tuple[str, ...]
    transform: Literal["none", "plus_one"] = "none"
    rotary: str = ""
    when: str = ""

    @property
    def stacked(self) -> bool:
        return "{expert}" in self.pattern


@dataclass(frozen=True)
class Equal:
    """A dimension that llama.cpp computes with in the place of a value of the configuration.

    of_layers: number of layers -> another dimension, where llama.cpp knows a model by that number."""

    dimension: str
    of_layers: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """name: of the data file. gguf_name: llama.cpp's architecture. model_types: values of config.json's `model_type`.
    before, layer, after: the tensors before, in and after the decoder layers, in the order of the artifact.
    prefixes: beginnings of names that some checkpoints use, and what they stand for.
    spellings: regular expressions of names that transformers reads as well, and what they are called here instead.
    ignored: regular expressions of names without use to a runtime.
    defaults: values of config.json that its authors may leave out, as transformers assumes them.
    requires: values that llama.cpp's implementation takes for granted.
    equal: key of the configuration -> the dimension that llama.cpp takes for it.
    rope_types: the rope scalings that llama.cpp implements for it. local_rope: whether rope_parameters has a table for
    each kind of layer.
    window_keys: keys by which transformers gives layers a sliding window, see windows.py. window_period:
    llama.cpp gives none to every so-manieth layer unless the file says otherwise; 0 where it computes no window.
    feeds: tensor of a layer -> the matrices that are multiplied with what it makes and nothing else is, see
    smoothing_groups.py; names like the rules'.
    scales_applied: the roles whose products llama.cpp multiplies with second-level scales.
    scales_applied_without_bias: those whose products it does so where it adds no bias to them, and ends where it does.
    uint32, float32: GGUF key (without the architecture's prefix) -> key of the configuration or dimension."""

    name: str
    gguf_name: str
    model_types: tuple[str, ...]
    before: tuple[TensorRule, ...]
    layer: tuple[TensorRule, ...]
    after: tuple[TensorRule, ...]
    prefixes: dict[str, str] = field(default_factory=dict)
    spellings: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    requires: dict[str, Any] = field(default_factory=dict)
    equal: dict[str, Equal] = field(default_factory=dict)
    rope_types: tuple[str, ...] = ()
    local_rope: bool = False
    window_keys: tuple[str, ...] = ()
    window_period: int = 0
    feeds: dict[str, tuple[str, ...]] = field(default_factory=dict)
    scales_applied: tuple[Role, ...] = ()
    scales_applied_without_bias: tuple[Role, ...] = ()
    uint32: dict[str, str] = field(default_factory=dict)
    float32: dict[str, str] = field(default_factory=dict)

    def completed(self, config: dict[str, Any]) -> dict[str, Any]:
        """The configuration with what transformers assumes where it says nothing."""
        without = {key for key in _MEANT_WITHOUT_VALUE if key in config and config[key] is None}
        defaults = {key: value for key, value in self.defaults.items() if key not in without}
        return {**defaults, **{key: value for key, value in config.items() if value is not None}}

    def spelled(self, name: str) -> str:
        """The name that transformers would write where it reads this one, too."""
        for pattern, replacement in self.spellings.items():
            name = re.sub(pattern, replacement, name)
        return _WITHOUT_HEAD.sub("model.", name)

    def named(self, role: Role) -> str:
        """The only tensor of that role outside of the layers, as the rules spell it."""
        return next(rule.pattern for rule in (*self.before, *self.after) if rule.role is role)

    def canonical_name(self, name: str) -> str | None:
        """The name as the rules spell it; None for a tensor to ignore."""
        if COMPUTED.search(name) or any(re.search(pattern, name) for pattern in self.ignored):
            return None
        for prefix, replacement in self.prefixes.items():
            if name.startswith(prefix):
                return replacement + name.removeprefix(prefix)
        return name


def known_architecture(config: dict[str, Any]) -> Architecture | None:
    """The architecture of this configuration, by its `model_type`; None where there is none."""
    model_type = config.get("model_type")
    return next((found for found in architectures() if model_type in found.model_types), None)


@cache
def architectures() -> tuple[Architecture, ...]:
    """All of them, by name."""
    found = [entry for entry in files("converter").joinpath("architectures").iterdir() if entry.name.endswith(".toml")]
    return tuple(_parse(entry.name.removesuffix(".toml"), entry.read_text("utf-8")) for entry in sorted(found, key=str))


def find_architecture(config: dict[str, Any], where: str) -> Architecture:
    """The architecture of this configuration, by its `model_type`."""
    if (architecture := known_architecture(config)) is not None:
        return architecture
    model_type = config.get("model_type")
    known = nearest(str(model_type), [name for architecture in architectures() for name in architecture.model_types])
    if "auto_map" in config:
        raise ConvertError(
            f"the model (model_type {model_type!r}) needs code from its repository, and remote code is never run",
            f"{where}: auto_map",
            f"use a checkpoint of a known architecture; {known}",
        )
    raise ConvertError(f"unknown architecture {model_type!r}", f"{where}: model_type", known)


def with_scales_applied(known: Collection[Architecture], tensors: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The tensors, marked where llama.cpp applies second-level scales. known: the architectures that it runs as this
    one, whose graph is the same."""
    tensors = tuple(tensors)
    names = {tensor.name for tensor in tensors}
    always = {role for architecture in known for role in architecture.scales_applied}
    without_bias = {role for architecture in known for role in architecture.scales_applied_without_bias}

    def applied(tensor: TensorSpec) -> bool:
        biased = f"{tensor.name.removesuffix('.weight')}.bias" in names
        return tensor.role in always or (tensor.role in without_bias and not biased)

    return tuple(replace(tensor, scale_applied=True) if applied(tensor) else tensor for tensor in tensors)


def gguf_name_map(gguf_architecture: str, n_layers: int) -> TensorNameMap:
    """gguf's own table from the names of Hugging Face checkpoints to those of llama.cpp."""
    by_name = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    return get_tensor_name_map(by_name[gguf_architecture], n_layers)


def gguf_name(names: TensorNameMap, name: str) -> str:
    """llama.cpp's name of a checkpoint's tensor; of a stacked tensor, the name without the expert's index."""
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ValueError(f"gguf has no name for {name!r}: the architecture's data file is wrong")
    return found


def _parse(name: str, text: str) -> Architecture:
    table = tomllib.loads(text)
    tensors, metadata, prefix = table.pop("tensors"), table.pop("metadata"), table.pop("layer_prefix")
    return Architecture(
        name=name,
        gguf_name=table.pop("gguf_name"),
        model_types=tuple(table.pop("model_types")),
        before=_parse_rules(tensors.pop("before")),
        layer=_parse_rules(tensors.pop("layer"), prefix),
        after=_parse_rules(tensors.pop("after")),
        ignored=tuple(table.pop("ignored", ())),
        equal={key: _parse_equal(value) for key, value in table.pop("equal", {}).items()},
        rope_types=tuple(table.pop("rope_types")),
        window_keys=tuple(table.pop("window_keys", ())),
        feeds={prefix + name: tuple(prefix + fed for fed in feeds) for name, feeds in table.pop("feeds", {}).items()},
        scales_applied=tuple(map(Role, table.pop("scales_applied", ()))),
        scales_applied_without_bias=tuple(map(Role, table.pop("scales_applied_without_bias", ()))),
        uint32=metadata.pop("uint32"),
        float32=metadata.pop("float32"),
        **table,
    )


def _parse_equal(table: dict[str, Any]) -> Equal:
    return Equal(table["dimension"], {int(n_layers): name for n_layers, name in table.get("of_layers", {}).items()})


def _parse_rules(table: dict[str, dict[str, Any]], prefix: str = "") -> tuple[TensorRule, ...]:
    return tuple(
        TensorRule(prefix + name, Role(rule.pop("role")), tuple(rule.pop("shape")), **rule)
        for name, rule in table.items()
    )
