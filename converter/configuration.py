"""config.json, read with the eyes of its architecture: defaults, dimensions, rotary embedding."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converter.architecture import Architecture, find_architecture
from converter.checkpoint import StoredTensor
from converter.rope import check_rope, rope_parameters
from converter.values import check_finite, count, number, unusable
from converter.windows import sliding_layers
from formats.errors import ConvertError

# What transformers reads for every architecture, and llama.cpp takes for granted in all.
_REQUIRED_OF_ALL: dict[str, Any] = {"is_causal": True, "per_layer_config": {}}
# What transformers takes null for; for a null that it refuses there is no default.
_NULLABLE = (
    *("num_key_value_heads", "sliding_window", "sliding_window_pattern", "partial_rotary_factor", "mlp_only_layers"),
    *("rope_theta", "rope_local_base_freq", "use_bidirectional_attention", "attn_logit_softcapping"),
)
# Two keys of one value, of which an architecture has either.
_EXPERTS = ("num_local_experts", "num_experts")
# Names of transformers' for the same function.
_SYNONYMS = {"swish": "silu"}


@dataclass(frozen=True)
class Configuration:
    """values: config.json with the architecture's defaults filled in.
    dimensions: what the architecture's shapes are written in, by name.
    rope: the rotary parameters, see `rope_parameters`.
    windowed: whether each layer sees a sliding window only.
    where: the file, for messages.
    notes: what llama.cpp will do otherwise than the configuration says, a sentence each."""

    architecture: Architecture
    values: dict[str, Any]
    dimensions: dict[str, int]
    rope: dict[str, Any]
    windowed: tuple[bool, ...]
    where: str
    notes: tuple[str, ...] = ()

    def number(self, name: str) -> float | None:
        """A dimension, or else a number of the configuration; None where there is neither."""
        if name in self.dimensions:
            return self.dimensions[name]
        return number(self.values, name, self.where) if name in self.values else None


def configure(config: dict[str, Any], where: str, tensors: Mapping[str, StoredTensor]) -> Configuration:
    """tensors: of the checkpoint, by which sizes that it cannot have are known before anything is made of them.

    Raises ConvertError for an unknown architecture, and for values that are absent, senseless or not implemented by
    llama.cpp for this architecture."""
    check_finite(config, where)
    architecture = find_architecture(config, where)
    _check_nulls(architecture, config, where)
    values = _with_one_key(architecture.completed(config), config, where)
    rope = rope_parameters(values, architecture.rope_types, architecture.local_rope, where)
    values["partial_rotary_factor"] = number(rope, "partial_rotary_factor", where)
    _check_required(architecture, values, where)
    _check_switches(architecture, values, where)
    dimensions = dimensions_of(architecture, values, where, tensors)
    _check_equal(architecture, values, dimensions, where)
    check_rope(rope, dimensions["rotary"], where)
    window, windowed = sliding_layers(values, architecture.window_keys, dimensions["layers"], where)
    longest = rope["max_position_embeddings"]
    followed = architecture.window_period > 0
    dimensions |= {"window": window, "context": longest if followed or not window else min(window, longest)}
    notes = _notes(architecture, rope, dimensions)
    return Configuration(architecture, values, dimensions, rope, windowed, where, notes)


def _notes(architecture: Architecture, rope: dict[str, Any], dimensions: dict[str, int]) -> tuple[str, ...]:
    """Where the file is not the model: llama.cpp cannot be told of all that transformers computes."""
    longest, context = rope["max_position_embeddings"], dimensions["context"]
    notes = []
    if context < longest:
        notes.append(
            f"the model's attention has a sliding window of {context} tokens, which llama.cpp does not compute for "
            f"{architecture.name}: the GGUF is right for texts of up to {context} tokens, and its context_length says "
            f"{context} where the configuration says {longest}"
        )
    if rope["rope_type"] == "dynamic":
        notes.append(
            f"llama.cpp does not scale the rotary embedding of texts longer than {longest} tokens, as the "
            f"configuration's dynamic scaling does: the GGUF is right for up to {longest} tokens"
        )
    original = rope["original_max_position_embeddings"]
    if rope["rope_type"] == "longrope" and original < longest:
        notes.append(
            f"llama.cpp takes the rope factors of long texts by the size of its context, transformers by the length of "
            f"the text: for texts of up to {original} tokens run it with a context no larger (-c {original})"
        )
    return tuple(notes)


def _check_nulls(architecture: Architecture, config: Mapping[str, Any], where: str) -> None:
    for key in architecture.requires | architecture.defaults:
        if key in config and config[key] is None and key not in _NULLABLE:
            raise unusable(key, None, "which transformers refuses", where)


def _with_one_key(values: dict[str, Any], config: dict[str, Any], where: str) -> dict[str, Any]:
    """The values with the number of experts under one key, that of config.json where it has one: transformers reads
    both in every architecture."""
    stated = {key: config[key] for key in _EXPERTS if config.get(key) is not None}
    if not stated:
        return values
    if len(stated) == 2 and len(set(map(repr, stated.values()))) == 2:
        both = " and ".join(f"{key} = {value!r}" for key, value in stated.items())
        raise ConvertError(
            f"the configuration has {both}, which are two names of one value",
            f"{where}: {' and '.join(stated)}",
            "take the wrong one out of config.json",
        )
    return {key: value for key, value in values.items() if key not in _EXPERTS or key in stated}


def _check_switches(architecture: Architecture, values: dict[str, Any], where: str) -> None:
    """Raise ConvertError for a switch that is neither true nor false: transformers refuses it."""
    for key, usual in (_REQUIRED_OF_ALL | architecture.requires | architecture.defaults).items():
        if isinstance(usual, bool) and not isinstance(values.get(key, usual), bool):
            raise unusable(key, values[key], "which is neither true nor false", where)


def _check_required(architecture: Architecture, values: dict[str, Any], where: str) -> None:
    for key, required in (_REQUIRED_OF_ALL | architecture.requires).items():
        stated = values.get(key, required)
        if stated != required and _SYNONYMS.get(str(stated)) != required:
            raise ConvertError(
                f"llama.cpp implements {architecture.name} with {key} = {required!r} only, this model has {stated!r}",
                f"{where}: {key}",
                "no GGUF of this model would run correctly in llama.cpp",
            )


def _check_equal(architecture: Architecture, values: dict[str, Any], dimensions: dict[str, int], where: str) -> None:
    for key, equal in architecture.equal.items():
        name = equal.of_layers.get(dimensions["layers"], equal.dimension)
        if (found := number(values, key, where)) != dimensions[name]:
            raise ConvertError(
                f"llama.cpp implements {architecture.name} with {key} = {dimensions[name]} only (its dimension "
                f"{name!r}), this model has {found}",
                f"{where}: {key}",
                "no GGUF of this model would run correctly in llama.cpp",
            )


def dimensions_of(
    architecture: Architecture, values: dict[str, Any], where: str, tensors: Mapping[str, StoredTensor]
) -> dict[str, int]:
    """The sizes that shapes are written in. Raises ConvertError for one that is none, or larger than what is stored
    can be."""
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    heads = count(values, "num_attention_heads", where, largest=largest)
    hidden = count(values, "hidden_size", where, largest=largest)
    mlp = count(values, "intermediate_size", where)
    key_value_heads = count(values, "num_key_value_heads", where, heads)
    if heads % key_value_heads:
        raise unusable(
            "num_key_value_heads", key_value_heads, f"which does not divide num_attention_heads = {heads}", where
        )
    head = count(values, "head_dim", where, hidden // heads, largest)
    experts = 0
    if any(rule.stacked for rule in architecture.layer):
        experts_key = "num_local_experts" if "num_local_experts" in values else "num_experts"
        experts = count(values, experts_key, where, largest=len(tensors))
        count(values, "num_experts_per_tok", where, largest=experts)
    return {
        "vocab": count(values, "vocab_size", where),
        "layers": count(values, "num_hidden_layers", where, largest=len(tensors)),
        "hidden": hidden,
        "heads": heads,
        "hidden_per_head": hidden // heads,
        "key_value_heads": key_value_heads,
        "head": head,
        "rotary": int(head * values["partial_rotary_factor"]),
        "query": heads * head,
        "key_value": key_value_heads * head,
        "qkv": (heads + 2 * key_value_heads) * head,
        "mlp": mlp,
        "gate_up": 2 * mlp,
        "experts": experts,
        "expert_mlp": count(values, "moe_intermediate_size", where, mlp),
    }
