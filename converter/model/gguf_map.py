"""What a GGUF source is: its architecture, and the role of every tensor, read back from its names.

A file of an architecture that has a data file is held against it. Of any other the names of the tensors say what they
are, and the keys are taken over as they are: whoever wrote the file knew the model.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from gguf import Keys
from gguf.gguf_writer import GGUFValue

from bitwright.converter.architectures.architecture import architectures, gguf_tensors, with_scales_applied
from bitwright.converter.architectures.description import Architecture
from bitwright.converter.model.configuration import dimensions_of
from bitwright.converter.model.gguf_roles import layer_of, role_of
from bitwright.converter.model.rope import FREQUENCIES, LONG_FACTORS, SHORT_FACTORS
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.stored_tensor import SourceTensor
from bitwright.profiles.vocabulary import UNQUANTIZED_ROLES, ModelMap, Role, TensorSpec

# What the writer states about the new file itself.
_WRITERS_KEYS = (Keys.General.FILE_TYPE, Keys.General.QUANTIZATION_VERSION, Keys.General.ALIGNMENT)

# Keys for which llama.cpp has a default, or none is needed; it loads no file without the others.
_DEFAULTED = (
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.sliding_window",
    "final_logit_softcapping",
    "pooling_type",
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

# Of tensors that are told of together, those that are named.
_NAMED = 4

_FETCH_AGAIN = "fetch the file again, or convert the original checkpoint"


def describe_gguf(checkpoint: Checkpoint, keeps_mtp: bool = True) -> ModelMap:
    """The model map of a GGUF: tensors in the file's order, roles by their names. keeps_mtp: as of `describe`.

    Raises ConvertError for a file that is no model; of an architecture with a data file for a key that is missing or
    senseless, and for tensors that are not those that the keys ask for, or have other shapes.
    """
    metadata, where = checkpoint.metadata or {}, str(checkpoint.location)
    name = checkpoint.config["model_type"]
    if not checkpoint.tensors:
        raise ConvertError("the file is a vocabulary without a model: it has no tensors", where, "name the whole model")
    first_mtp = _first_mtp_layer(metadata, name)
    if first_mtp is not None and not keeps_mtp:
        raise ConvertError(
            "the keys of a GGUF with layers that predict several tokens (MTP) count these layers",
            f"--mtp drop, {where}",
            "convert the original checkpoint without them, or keep them",
        )
    known = architectures_of_gguf(name)
    if not known or not all(architecture.plain for architecture in known):
        return _by_names(checkpoint, metadata, where, known, first_mtp)
    has_experts = bool((experts := metadata.get(f"{name}.expert_count")) and experts.value)
    known = [entry for entry in known if any(rule.stacked for rule in entry.layer) == has_experts] or known
    dimensions = _dimensions(known[0], metadata, checkpoint.tensors, where)
    places = _places(known, dimensions)
    described = (_describe_tensor(*entry, places, where) for entry in checkpoint.tensors.items())
    tensors = with_scales_applied(known, described)
    for tensor_name, place in places.items():
        if place.required and tensor_name not in checkpoint.tensors:
            raise ConvertError(f"the file lacks the tensor {tensor_name!r}", where, _FETCH_AGAIN)
    return ModelMap(name, dimensions["layers"], tensors, _kept_keys(metadata), source_notes=checkpoint.notes)


def architectures_of_gguf(name: object) -> list[Architecture]:
    """The data files of the architectures that llama.cpp runs under this name; none of one that only its names tell."""
    return [architecture for architecture in architectures() if architecture.gguf_name == name]


def _first_mtp_layer(metadata: Mapping[str, GGUFValue], architecture: object) -> int | None:
    """The first of the layers that predict several tokens, which block_count counts as the last; None without any."""
    keys = (f"{architecture}.{key}" for key in ("block_count", "nextn_predict_layers"))
    counts = [metadata[key].value for key in keys if key in metadata]
    if len(counts) < 2 or not all(isinstance(n, int) for n in counts) or not 0 < counts[1] < counts[0]:
        return None
    return int(counts[0] - counts[1])


def _kept_keys(metadata: Mapping[str, GGUFValue]) -> dict[str, GGUFValue]:
    return {key: value for key, value in metadata.items() if key not in _WRITERS_KEYS and not key.startswith("split.")}


def _by_names(
    checkpoint: Checkpoint,
    metadata: Mapping[str, GGUFValue],
    where: str,
    known: Collection[Architecture],
    first_mtp: int | None,
) -> ModelMap:
    """The map of an architecture without a data file, or with one whose sizes do not follow from the keys of a GGUF. A
    tensor whose name says nothing keeps the type that it has. known: the architecture's data files. first_mtp: of the
    layers that predict several tokens the first, None where there is none."""
    architecture = checkpoint.config["model_type"]
    kind = metadata.get(Keys.General.TYPE)
    if not isinstance(architecture, str) or (kind is not None and kind.value != "model"):
        what = f"of the kind {kind.value!r}" if kind is not None else "without general.architecture"
        raise ConvertError(f"the GGUF is {what}, and no model", where, "name the GGUF of a whole model")
    tensors = [_named(name, stored, first_mtp) for name, stored in checkpoint.tensors.items()]
    if not any(tensor.quantizable for tensor in tensors):
        raise ConvertError(
            f"no tensor of this file (architecture {architecture!r}) has a name of llama.cpp's for a language model",
            where,
            "name the GGUF of a text model: towers of images and sound stay as they are",
        )
    n_layers = 1 + max((tensor.layer for tensor in tensors if tensor.layer is not None), default=-1)
    notes = []
    if not known:
        notes.append(
            f"the architecture {architecture!r} has no data file here: roles follow from the tensors' names, and all"
            " keys are taken over as they are"
        )
    if kept := [tensor.name for tensor in tensors if tensor.kept]:
        notes.append(f"{len(kept)} tensors of unknown use keep the source's type: {_some(kept)}")
    described = with_scales_applied(known, tensors)
    return ModelMap(architecture, n_layers, described, _kept_keys(metadata), checkpoint.notes, tuple(notes))


def _named(name: str, stored: SourceTensor, first_mtp: int | None) -> TensorSpec:
    role, layer = role_of(name), layer_of(name)
    kept = "" if role is not None else stored.dtype.replace("F64", "F32")
    if layer is not None and first_mtp is not None and layer >= first_mtp:
        role, layer = Role.MTP if role is not None and role not in UNQUANTIZED_ROLES else role, None
    return TensorSpec(name, stored.shape, role or Role.OTHER, layer, (name,), kept=kept)


def _some(names: list[str]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _dimensions(
    architecture: Architecture, metadata: Mapping[str, GGUFValue], tensors: Mapping[str, SourceTensor], where: str
) -> dict[str, int]:
    """What the architecture's shapes are written in, from the file's keys, which are checked."""
    values: dict[str, Any] = {}
    for key, (kind, expression) in architecture.metadata.items():
        name = expression.text
        full_key = f"{architecture.gguf_name}.{key}"
        if full_key not in metadata:
            if key in _DEFAULTED:
                continue
            raise ConvertError(f"the file lacks the key {full_key}", where, _FETCH_AGAIN)
        value = metadata[full_key].value
        if key == "block_count" and isinstance(value, int) and value > len(tensors):
            raise ConvertError(f"the file has {len(tensors)} tensors for {value} layers", where, _FETCH_AGAIN)
        kinds = int if kind == "uint32" else int | float
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
        for name, rule, layer in gguf_tensors(architecture, dimensions["layers"]):
            shape = tuple(size.evaluate(dimensions) for size in rule.shape)
            if rule.stacked:
                shape = (dimensions["experts"], *shape)
            # Without an output, the embedding is the output.
            required = not rule.when and rule.role is not Role.OUTPUT
            places[name] = _Place(rule.role, layer, shape, required)
    return places


def _describe_tensor(name: str, tensor: SourceTensor, places: dict[str, _Place], where: str) -> TensorSpec:
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
