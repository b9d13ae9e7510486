"""A GGUF file in F32, F16 or BF16 as the source: its tensors and metadata are taken over as they are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gguf import Keys
from gguf.gguf_writer import GGUFValue

from converter.architecture import (
    Architecture,
    TensorRule,
    architectures,
    gguf_name,
    gguf_name_map,
    with_scales_applied,
)
from converter.checkpoint import DTYPE_BYTES, Checkpoint, StoredTensor
from converter.configuration import dimensions_of
from converter.rope import FREQUENCIES, LONG_FACTORS, SHORT_FACTORS
from formats.errors import ConvertError, nearest
from formats.gguf_file import EncodedTensor, TensorEntry, read_gguf
from formats.regular_file import open_regular
from profiles.vocabulary import ModelMap, Role, TensorSpec

# What the writer states about the new file itself.
_WRITERS_KEYS = (Keys.General.FILE_TYPE, Keys.General.QUANTIZATION_VERSION, Keys.General.ALIGNMENT)

# Keys for which llama.cpp has a default, or none is needed; it loads no file without the others.
_DEFAULTED = (
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.sliding_window",
    "final_logit_softcapping",
    "rope.dimension_count",
    "rope.scaling.original_context_length",
    "vocab_size",
)
# Keys that have a name in a configuration, which says less than they do.
_OWN_KEYS = ("attention.value_length", "rope.dimension_count")
# Dimensions by their names in a configuration.
_CONFIGURATION = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "key_value_heads": "num_key_value_heads",
    "head": "head_dim",
    "mlp": "intermediate_size",
    "experts": "num_local_experts",
    "expert_mlp": "moe_intermediate_size",
    "vocab": "vocab_size",
}
_FETCH_AGAIN = "fetch the file again, or convert the original checkpoint"


def open_gguf(path: Path) -> Checkpoint:
    """The GGUF file as a checkpoint. Raises ConvertError for a file that is no GGUF, is cut short or malformed, for one
    of several splits, and for quantized tensors."""
    with open_regular(path) as file:
        if file.read(4) != b"GGUF":
            raise ConvertError("this file is no GGUF", str(path), "give a GGUF file or the directory of a checkpoint")
    reader = read_gguf(path)
    if (reader.value(Keys.Split.LLM_KV_SPLIT_COUNT, int) or 1) > 1:
        raise ConvertError(
            "this is one of several splits of a model", str(path), "merge them first: llama-gguf-split --merge"
        )
    tensors = {}
    for tensor in reader.tensors:
        dtype = tensor.ggml_type.name
        if dtype not in DTYPE_BYTES:
            raise ConvertError(
                f"{tensor.name!r} is quantized already ({dtype}); quantizing rounded weights again adds the errors up",
                str(path),
                "convert from the original checkpoint, or from its GGUF in F32, F16 or BF16",
            )
        tensors[tensor.name] = StoredTensor(dtype, tensor.shape, path, tensor.offset)
    config = {"model_type": reader.value(Keys.General.ARCHITECTURE, str)}
    return Checkpoint(path, path.stem, None, config, tensors, reader.metadata())


def open_parts(path: Path) -> tuple[dict[str, GGUFValue], dict[str, EncodedTensor], list[TensorEntry]]:
    """What a GGUF file in one piece consists of, to lay it out anew: key-values, tensors by name, and their entries in
    the file's order. Raises ConvertError for one of several splits, and as read_gguf does."""
    reader = read_gguf(path)
    metadata = reader.metadata()
    if Keys.Split.LLM_KV_SPLIT_COUNT in metadata:
        raise ConvertError(
            "this is one of several splits of a model", str(path), "merge them: llama-gguf-split --merge"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    entries = [TensorEntry(t.name, t.shape, int(t.ggml_type), t.n_bytes) for t in reader.tensors]
    return metadata, tensors, entries


def describe_gguf(checkpoint: Checkpoint) -> ModelMap:
    """The model map of a GGUF: tensors in the file's order, roles by their names in the known architectures.

    Raises ConvertError for an unknown architecture, for a key that is missing or senseless, and for tensors that are
    not those that the keys ask for, or have other shapes.
    """
    metadata, where = checkpoint.metadata or {}, str(checkpoint.location)
    name = checkpoint.config["model_type"]
    known = [architecture for architecture in architectures() if architecture.gguf_name == name]
    if not known:
        names = sorted({architecture.gguf_name for architecture in architectures()})
        raise ConvertError(
            f"unknown architecture {name!r}", f"{where}: general.architecture", nearest(str(name), names)
        )
    if not checkpoint.tensors:
        raise ConvertError("the file is a vocabulary without a model: it has no tensors", where, "name the whole model")
    has_experts = bool((experts := metadata.get(f"{name}.expert_count")) and experts.value)
    known = [entry for entry in known if any(rule.stacked for rule in entry.layer) == has_experts] or known
    dimensions = _dimensions(known[0], metadata, checkpoint.tensors, where)
    places = _places(known, dimensions)
    described = (_describe_tensor(*entry, places, where) for entry in checkpoint.tensors.items())
    tensors = with_scales_applied(known, described)
    for tensor_name, place in places.items():
        if place.required and tensor_name not in checkpoint.tensors:
            raise ConvertError(f"the file lacks the tensor {tensor_name!r}", where, _FETCH_AGAIN)
    kept = {key: value for key, value in metadata.items() if key not in _WRITERS_KEYS and not key.startswith("split.")}
    return ModelMap(name, dimensions["layers"], tensors, kept)


def _dimensions(
    architecture: Architecture, metadata: Mapping[str, GGUFValue], tensors: Mapping[str, StoredTensor], where: str
) -> dict[str, int]:
    """What the architecture's shapes are written in, from the file's keys, which are checked."""
    values: dict[str, Any] = {}
    for key, name in {**architecture.uint32, **architecture.float32}.items():
        full_key = f"{architecture.gguf_name}.{key}"
        if full_key not in metadata:
            if key in _DEFAULTED:
                continue
            raise ConvertError(f"the file lacks the key {full_key}", where, _FETCH_AGAIN)
        value = metadata[full_key].value
        if key == "block_count" and isinstance(value, int) and value > len(tensors):
            raise ConvertError(f"the file has {len(tensors)} tensors for {value} layers", where, _FETCH_AGAIN)
        kinds = int if key in architecture.uint32 else int | float
        if not isinstance(value, kinds) or isinstance(value, bool) or not (value > 0 or key in _DEFAULTED):
            raise ConvertError(f"the file has {full_key} = {value!r}, which is no size", where, _FETCH_AGAIN)
        values[key if key in _OWN_KEYS else _CONFIGURATION.get(name, name)] = value
    tokens = metadata.get(Keys.Tokenizer.LIST)
    if tokens is None or not isinstance(tokens.value, list):
        raise ConvertError(f"the file lacks the key {Keys.Tokenizer.LIST}", where, _FETCH_AGAIN)
    values["vocab_size"] = len(tokens.value)
    values.setdefault("partial_rotary_factor", 1.0)
    dimensions = dimensions_of(architecture, values, where, tensors)
    of_values = values.get("attention.value_length", dimensions["hidden"] // dimensions["heads"])
    if of_values != dimensions["head"]:
        what = f"the keys of a head have {dimensions['head']} columns, its values {of_values}"
        raise ConvertError(f"{what}, and no known architecture is like that", where, _FETCH_AGAIN)
    return dimensions | {"rotary": values.get("rope.dimension_count", dimensions["head"])}


class _Place(NamedTuple):
    """Where a tensor belongs. required: whether a model can do without it."""

    role: Role
    layer: int | None
    shape: tuple[int, ...]
    required: bool


def _places(known: list[Architecture], dimensions: dict[str, int]) -> dict[str, _Place]:
    """Every tensor that a file of these architectures may have, by name. They share the names of what they share."""
    rope = _Place(Role.ROPE, None, (dimensions["rotary"] // 2,), required=False)
    places = dict.fromkeys((FREQUENCIES, LONG_FACTORS, SHORT_FACTORS), rope)
    for architecture in known:
        names = gguf_name_map(architecture.gguf_name, dimensions["layers"])
        rules: list[tuple[TensorRule, int | None]] = [(r, None) for r in (*architecture.before, *architecture.after)]
        rules += [(rule, layer) for layer in range(dimensions["layers"]) for rule in architecture.layer]
        for rule, layer in rules:
            shape = tuple(dimensions[name] for name in rule.shape)
            if rule.stacked:
                shape = (dimensions["experts"], *shape)
            name = gguf_name(names, rule.pattern.replace(".{expert}", "").format(layer=layer))
            # Without an output, the embedding is the output.
            required = not rule.when and rule.role is not Role.OUTPUT
            places[name] = _Place(rule.role, layer, shape, required)
    return places


def _describe_tensor(name: str, tensor: StoredTensor, places: dict[str, _Place], where: str) -> TensorSpec:
    place = places.get(name)
    if place is None:
        raise ConvertError(
            f"the tensor {name!r} is unknown to the architecture, or of a layer that block_count does not count",
            where,
            "docs/add-an-architecture.md tells how to add it",
        )
    if tensor.shape != place.shape:
        raise ConvertError(
            f"{name!r} has the shape {list(tensor.shape)}, the file's keys say {list(place.shape)}", where, _FETCH_AGAIN
        )
    return TensorSpec(name, tensor.shape, place.role, place.layer, (name,))
