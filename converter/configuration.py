"""config.json, read with the eyes of its architecture: defaults, dimensions, rotary embedding."""

from dataclasses import dataclass
from typing import Any

from converter.architecture import Architecture, find_architecture
from converter.rope import check_rope, rope_parameters
from formats.errors import ConvertError


@dataclass(frozen=True)
class Configuration:
    """values: config.json with the architecture's defaults filled in.
    dimensions: what the architecture's shapes are written in, by name.
    rope: the rotary parameters, see `rope_parameters`.
    where: the file, for messages.
    notes: what llama.cpp will do otherwise than the configuration says, a sentence each."""

    architecture: Architecture
    values: dict[str, Any]
    dimensions: dict[str, int]
    rope: dict[str, Any]
    where: str
    notes: tuple[str, ...] = ()

    def number(self, name: str) -> float | None:
        """A dimension, or else a number of the configuration; None where there is neither."""
        value = self.dimensions.get(name, self.values.get(name))
        if value is not None and (not isinstance(value, int | float) or value < 0):
            raise ConvertError(
                f"the configuration gives {name} = {value!r}, which is no number to use",
                f"{self.where}: {name}",
                "fetch config.json of the same revision again",
            )
        return value


# Names of transformers' for the same function.
_SYNONYMS = {"swish": "silu"}


def configure(config: dict[str, Any], where: str) -> Configuration:
    """Raises ConvertError for an unknown architecture, and for values that are absent, senseless or not implemented by
    llama.cpp for this architecture."""
    architecture = find_architecture(config, where)
    values = architecture.completed(config)
    if (pattern := _sliding_window_pattern(values.get("layer_types", []))) is not None:
        values["sliding_window_pattern"] = pattern
    _check_required(architecture, values, where)
    dimensions = dimensions_of(values, where)
    rope = rope_parameters(values)
    check_rope(rope, architecture.rope_types, dimensions["rotary"], where)
    return Configuration(architecture, values, dimensions, rope, where)


def _sliding_window_pattern(layer_types: list[str]) -> int | None:
    """n where every n-th layer attends to everything and the others to a window; 0 for any other order, None where the
    kinds of the layers do not tell."""
    if "full_attention" not in layer_types:
        return None
    n = layer_types.index("full_attention") + 1
    expected = ["sliding_attention" if (i + 1) % n else "full_attention" for i in range(len(layer_types))]
    return n if layer_types == expected else 0


def _check_required(architecture: Architecture, values: dict[str, Any], where: str) -> None:
    for key, required in architecture.requires.items():
        stated = values.get(key, required)
        if stated != required and _SYNONYMS.get(str(stated)) != required:
            raise ConvertError(
                f"llama.cpp implements {architecture.name} with {key} = {required!r} only, this model has {stated!r}",
                f"{where}: {key}",
                "no GGUF of this model would run correctly in llama.cpp",
            )


def dimensions_of(values: dict[str, Any], where: str) -> dict[str, int]:
    """What the architecture's shapes are written in. Raises ConvertError for a size that is none."""

    def count(key: str, default: int | None = None) -> int:
        value = values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ConvertError(
                f"the configuration gives {key} = {value!r}, which is no size",
                f"{where}: {key}",
                "fetch config.json of the same revision again",
            )
        return value

    heads, hidden, mlp = count("num_attention_heads"), count("hidden_size"), count("intermediate_size")
    key_value_heads, head = count("num_key_value_heads", heads), count("head_dim", hidden // heads)
    rope = values.get("rope_parameters") or {}
    rotary_fraction = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    experts_key = "num_local_experts" if "num_local_experts" in values else "num_experts"
    return {
        "vocab": count("vocab_size"),
        "layers": count("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "key_value_heads": key_value_heads,
        "head": head,
        "rotary": int(head * rotary_fraction),
        "query": heads * head,
        "key_value": key_value_heads * head,
        "qkv": (heads + 2 * key_value_heads) * head,
        "mlp": mlp,
        "gate_up": 2 * mlp,
        "experts": count(experts_key) if experts_key in values else 0,
        "expert_mlp": count("moe_intermediate_size", mlp),
    }
