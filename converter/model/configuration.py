"""config.json, read with the eyes of its architecture: defaults, dimensions, rotary embedding."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bitwright.converter.architectures.architecture import find_architecture
from bitwright.converter.architectures.description import Architecture
from bitwright.converter.architectures.expression import Expression, Unknown
from bitwright.converter.architectures.refusal import NotInLlamaCpp
from bitwright.converter.model.rope import check_rope, rope_parameters
from bitwright.converter.model.windows import sliding_layers
from bitwright.converter.source.values import MAX_COUNT, check_finite, count, number, table, unusable, with_floats
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.stored_tensor import SourceTensor

# What transformers reads for every architecture, and llama.cpp takes for granted in all.
_REQUIRED_OF_ALL: dict[str, Any] = {"is_causal": True, "per_layer_config": {}}
# What transformers takes null for; for a null that it refuses there is no default.
_NULLABLE = (
    *("num_key_value_heads", "sliding_window", "sliding_window_pattern", "partial_rotary_factor", "mlp_only_layers"),
    *("rope_theta", "rope_local_base_freq", "use_bidirectional_attention"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)
# Ends the name of what a key is in every layer.
_OF_LAYERS = "_of_layers"
# Two keys of one value, of which an architecture has either.
_EXPERTS = ("num_local_experts", "num_experts")
_USED, _LAYERS, _LENGTH = "num_experts_per_tok", "num_hidden_layers", "max_position_embeddings"
# What turned columns of a head are, where the architecture's data file says nothing else.
_ROTARY = Expression("(head_dim or hidden_size // num_attention_heads) * partial_rotary_factor")
# Names of transformers' for the same function.
_SYNONYMS = {"swish": "silu"}


@dataclass(frozen=True)
class Configuration:
    """values: config.json with the architecture's defaults filled in.
    dimensions: what the architecture's shapes are written in, by name.
    rope: the rotary parameters, see `rope_parameters`; empty where the architecture has none.
    windowed: whether each layer sees a sliding window only.
    kinds: of every layer the architecture's kinds that it is of, that which predicts several tokens as the last.
    where: the file, for messages.
    notes: what llama.cpp will do otherwise than the configuration says, a sentence each."""

    architecture: Architecture
    values: dict[str, Any]
    dimensions: dict[str, int]
    rope: dict[str, Any]
    windowed: tuple[bool, ...]
    where: str
    kinds: tuple[frozenset[str], ...] = ()
    notes: tuple[str, ...] = ()

    def names(self, layer: int | None = None) -> dict[str, Any]:
        """What the expressions of the data file may name: dimensions (with `mtp_layers`, how many layers that predict
        several tokens follow the others), keys of the configuration and of its rope table,
        `windowed`; in a layer its index as `layer`, and the kinds of layers, whether it is of them."""
        names = {**self.rope, **self.values, **self.dimensions, "windowed": list(self.windowed)}
        if layer is not None:
            names |= {"layer": layer, **{kind: kind in self.kinds[layer] for kind in self.architecture.kinds}}
        return names

    def value(self, expression: Expression, names: Mapping[str, Any]) -> Any:
        """What the expression comes to, None where it names what is not there. Raises ConvertError for a value that the
        configuration has to have for it."""
        return evaluated(expression, names, self.where)

    def size(self, expression: Expression, names: Mapping[str, Any]) -> int:
        """What the expression comes to, which is a size. Raises ConvertError where it is none."""
        size = evaluated(expression, names, self.where)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise unusable(expression.text, size, "which is no size", self.where)
        return int(size)


def evaluated(expression: Expression, names: Mapping[str, Any], where: str) -> Any:
    """The value of an expression of a data file. Raises ConvertError for what the configuration lacks."""
    try:
        return expression.evaluate(names)
    except Unknown as unknown:
        raise unusable(str(unknown), names.get(str(unknown)), f"of which {expression.text} is made", where) from None


def configure(
    config: dict[str, Any], where: str, tensors: Mapping[str, SourceTensor], keeps_mtp: bool = True
) -> Configuration:
    """tensors: of the checkpoint, by which sizes that it cannot have are known before anything is made of them.
    keeps_mtp: whether a layer that predicts several tokens is part of the model, where one is stored.

    Raises ConvertError for an unknown architecture, and for values that are absent, senseless or not implemented by
    llama.cpp for this architecture."""
    config = with_floats(config)
    check_finite(config, where)
    architecture = find_architecture(config, where)
    _check_nulls(architecture, config, where)
    values = _with_one_key(architecture.completed(config), config, where)
    n_layers = count(values, "num_hidden_layers", where, largest=len(tensors))
    for key, expression in architecture.per_layer.items():
        if values.get(key) in (None, []):
            each = [evaluated(expression, {**values, "layer": layer}, where) for layer in range(n_layers)]
            values[key] = each
        if not isinstance(values[key], list) or len(values[key]) != n_layers:
            why = f"which is no list of {n_layers}, one for each of num_hidden_layers"
            raise unusable(key, values[key], why, where)
    _take_per_layer_config(architecture, values, n_layers, where)
    rope: dict[str, Any] = {}
    if architecture.rope_types:
        rope = rope_parameters(values, architecture.rope_types, architecture.local_rope, where, architecture.rope_keys)
        values["partial_rotary_factor"] = number(rope, "partial_rotary_factor", where)
    _check_required(architecture, values, where)
    _check_switches(architecture, values, where)
    dimensions = dimensions_of(architecture, values, where, tensors)
    dimensions["mtp_layers"] = int(keeps_mtp and architecture.stores_mtp(tensors, n_layers))
    _check_equal(architecture, values, dimensions, where)
    if rope:
        names = {**values, **rope, **dimensions}
        rope |= {key: evaluated(value, names, where) for key, value in architecture.rope.items()}
        made_of = architecture.dimensions.get("rotary", _ROTARY).text
        check_rope(rope, dimensions["rotary"], where, architecture.rope_keys, made_of)
    window, windowed = sliding_layers(values, architecture.window_keys, dimensions["layers"], where)
    dimensions["window"] = window
    if (longest := values.get(_LENGTH)) is not None:
        own = next((name for name, usual in architecture.aliases.items() if usual == _LENGTH), _LENGTH)
        longest = count({own: longest}, own, where)
        followed = architecture.window_period > 0
        dimensions["context"] = longest if followed or not window else min(window, longest)
    configuration = Configuration(architecture, values, dimensions, rope, windowed, where)
    kinds = tuple(
        frozenset(
            kind
            for kind, expression in architecture.kinds.items()
            if evaluated(expression, {**configuration.names(), "layer": layer}, where)
        )
        for layer in range(n_layers + dimensions["mtp_layers"])
    )
    configuration = replace(configuration, kinds=kinds)
    _check_refused(configuration)
    return replace(configuration, notes=(*_notes(architecture, rope, dimensions), *_own_notes(configuration)))


def _take_per_layer_config(architecture: Architecture, values: dict[str, Any], n_layers: int, where: str) -> None:
    """What per_layer_config (index of a layer -> its own values) says goes into the keys *_of_layers, whose expressions
    have no word then. What an architecture has no such keys for is left to `_check_required`, which refuses it."""
    keys = [key.removesuffix(_OF_LAYERS) for key in architecture.per_layer if key.endswith(_OF_LAYERS)]
    own = table(values, "per_layer_config", where)
    stated = {int(layer): table(own, layer, where) for layer in own if str(layer).isdigit()}
    known = all(layer < n_layers and set(keys).issuperset(overrides) for layer, overrides in stated.items())
    if not keys or "per_layer_config" not in values or len(stated) < len(own) or not known:
        return
    del values["per_layer_config"]
    for key in keys:
        values[key + _OF_LAYERS] = [stated.get(layer, {}).get(key, values.get(key)) for layer in range(n_layers)]


def _check_refused(configuration: Configuration) -> None:
    """Raises ConvertError where the architecture's data file says that llama.cpp would compute something else."""
    where, refused = configuration.where, configuration.architecture.refused.items()
    for layer in range(configuration.dimensions["layers"]) if refused else ():
        names = configuration.names(layer)
        for sentence, condition in refused:
            if evaluated(condition, names, where):
                stated = [name for name in condition.names() if name in configuration.values]
                raise NotInLlamaCpp(
                    sentence,
                    f"{where}: {', '.join(dict.fromkeys(stated))}",
                    "no GGUF of this model would run correctly in llama.cpp",
                )


def _own_notes(configuration: Configuration) -> list[str]:
    """Those of the architecture's data file whose condition holds."""
    names = configuration.names()
    notes = configuration.architecture.notes.items()
    return [note for note, condition in notes if evaluated(condition, names, configuration.where)]


def _notes(architecture: Architecture, rope: dict[str, Any], dimensions: dict[str, int]) -> tuple[str, ...]:
    """Where the file is not the model: llama.cpp cannot be told of all that transformers computes."""
    notes: list[str] = []
    if not rope:
        return ()
    longest, context = rope["max_position_embeddings"], dimensions["context"]
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
            raise NotInLlamaCpp(
                f"llama.cpp implements {architecture.name} with {key} = {required!r} only, this model has {stated!r}",
                f"{where}: {key}",
                "no GGUF of this model would run correctly in llama.cpp",
            )


def _check_equal(architecture: Architecture, values: dict[str, Any], dimensions: dict[str, int], where: str) -> None:
    for key, equal in architecture.equal.items():
        name = equal.of_layers.get(dimensions["layers"], equal.dimension)
        if (found := number(values, key, where)) != dimensions[name]:
            raise NotInLlamaCpp(
                f"llama.cpp implements {architecture.name} with {key} = {dimensions[name]} only (its dimension "
                f"{name!r}), this model has {found}",
                f"{where}: {key}",
                "no GGUF of this model would run correctly in llama.cpp",
            )


# Dimension -> key of the configuration that states it.
_STATED = {
    "vocab": "vocab_size",
    "heads": "num_attention_heads",
    "hidden": "hidden_size",
    "mlp": "intermediate_size",
}
# What follows from the number of heads.
_OF_HEADS = ("hidden_per_head", "key_value_heads", "head", "rotary", "query", "key_value", "qkv")


def dimensions_of(
    architecture: Architecture, values: dict[str, Any], where: str, tensors: Mapping[str, SourceTensor]
) -> dict[str, int]:
    """The sizes that shapes are written in. Raises ConvertError for one that is none, or larger than what is stored
    can be."""
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    needed = architecture.needed
    # By the names that config.json has for them, so that these are in the messages.
    own = {usual: name for name, usual in architecture.aliases.items()}
    values = {**values, **{name: values[usual] for usual, name in own.items() if usual in values}}
    dimensions = {
        "layers": count(values, own.get("num_hidden_layers", "num_hidden_layers"), where, largest=len(tensors))
    }
    for name, key in _STATED.items():
        if isinstance(values.get(key), list) and name in architecture.dimensions:
            continue  # a value a layer, of which the data file makes one
        derived = {"heads": _OF_HEADS, "mlp": ("gate_up",)}.get(name, ())
        if values.get(key) is not None or needed.intersection((name, *derived)):
            limit = {"largest": largest} if name in ("heads", "hidden") else {}
            dimensions[name] = count(values, own.get(key, key), where, **limit)
    if "heads" in dimensions:
        dimensions |= _heads(values, dimensions["heads"], dimensions["hidden"], where, largest)
    mlp = dimensions.get("mlp")
    if mlp is not None:
        dimensions["gate_up"] = 2 * mlp
    if "expert_mlp" in needed:
        dimensions["expert_mlp"] = count(values, "moe_intermediate_size", where, mlp)
    dimensions["experts"] = 0
    if "experts" in needed or any(rule.stacked for rule in architecture.layer):
        experts_key = "num_local_experts" if "num_local_experts" in values else "num_experts"
        if values.get(experts_key) or not architecture.kinds:
            stated = own.get(experts_key, experts_key)
            dimensions["experts"] = count(values, stated, where, largest=max(len(tensors), largest))
            count(values, own.get(_USED, _USED), where, largest=dimensions["experts"])
    for name, expression in architecture.dimensions.items():
        size = evaluated(expression, {**values, **dimensions}, where)
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_COUNT:
            raise unusable(expression.text, size, "which is no size", where)
        dimensions[name] = size
    return dimensions


def _heads(values: dict[str, Any], heads: int, hidden: int, where: str, largest: int) -> dict[str, int]:
    key_value_heads = count(values, "num_key_value_heads", where, heads)
    if heads % key_value_heads:
        raise unusable(
            "num_key_value_heads", key_value_heads, f"which does not divide num_attention_heads = {heads}", where
        )
    head = count(values, "head_dim", where, max(hidden // heads, 1), largest)
    return {
        "hidden_per_head": hidden // heads,
        "key_value_heads": key_value_heads,
        "head": head,
        "rotary": int(head * values.get("partial_rotary_factor", 1.0)),
        "query": heads * head,
        "key_value": key_value_heads * head,
        "qkv": (heads + 2 * key_value_heads) * head,
    }
