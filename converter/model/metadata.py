"""The artifact's key-value pairs that describe the model, with the keys and types that llama.cpp's converter writes."""

from collections.abc import Iterable, Mapping
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from gguf import GGUFType, GGUFValueType, GGUFWriter, Keys, Metadata, size_label
from gguf.gguf_writer import GGUFValue

from bitwright.converter.model.configuration import Configuration
from bitwright.converter.model.rope import rope_metadata
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.converter.source.front_matter import SenselessFrontMatter, front_matter_file, read_front_matter
from bitwright.converter.source.values import float32, uint32
from bitwright.profiles.vocabulary import TensorSpec

_CARD = "README.md"
# All that gguf reads of a directory beside the card, and what it raises for entries of the card that make no sense.
_DESCRIPTIONS = ("config.json", "generation_config.json")
_SENSELESS = (ValueError, TypeError, AttributeError, KeyError)


def model_metadata(
    checkpoint: Checkpoint, configuration: Configuration, tensors: Iterable[TensorSpec]
) -> tuple[dict[str, GGUFValue], list[str]]:
    """general.* and the architecture's own keys, and what to note of the model card.
    The writer adds what it alone knows: general.file_type and general.quantization_version."""
    architecture = configuration.architecture
    own = _of_the_data_file(configuration)
    if configuration.rope:
        yarn = architecture.yarn_attention
        applied = None if yarn is None else configuration.value(yarn, configuration.names())
        own |= rope_metadata(configuration.rope, configuration.where, applied)
    own |= _windows(configuration)
    general, notes = _general(checkpoint, architecture.gguf_name, tensors)
    return general | {f"{architecture.gguf_name}.{key}": value for key, value in own.items()}, notes


def _of_the_data_file(configuration: Configuration) -> dict[str, GGUFValue]:
    """The keys that the architecture's data file lists, without those whose value is not there."""
    own: dict[str, GGUFValue] = {}
    for key, (kind, expression) in configuration.architecture.metadata.items():
        if kind.endswith("_array"):
            layers = range(len(configuration.kinds))
            values = [configuration.value(expression, configuration.names(layer)) for layer in layers]
            values = values[0] if values and isinstance(values[0], list) else values
            if all(value is not None for value in values):
                if kind == "uint32_or_array" and len(set(values)) == 1:
                    own[key] = uint32(values[0], expression.text, configuration.where)
                else:
                    own[key] = _array(_OF_ARRAYS[kind], values, expression.text, configuration.where)
        elif (value := configuration.value(expression, configuration.names())) is not None:
            own[key] = _scalar(kind, value, expression.text, configuration.where)
    return own


# Type of metadata in the data files -> that of each value of its list.
_OF_ARRAYS = {"uint32_or_array": "int32", "int32_array": "int32", "float32_array": "float32", "bool_array": "bool"}


def _scalar(kind: str, value: Any, name: str, where: str) -> GGUFValue:
    if kind == "bool":
        return GGUFValue(bool(value), GGUFValueType.BOOL)
    if kind == "string":
        return GGUFValue(str(value), GGUFValueType.STRING)
    return uint32(value, name, where) if kind == "uint32" else float32(value, name, where)


def _array(kind: str, values: list[Any], name: str, where: str) -> GGUFValue:
    if kind == "bool":
        return GGUFValue([bool(value) for value in values], GGUFValueType.ARRAY, GGUFValueType.BOOL)
    if kind == "int32":
        return GGUFValue(
            [uint32(value, name, where).value for value in values], GGUFValueType.ARRAY, GGUFValueType.INT32
        )
    # The configuration's own numbers are finite; what is made of them may be a bound that nothing reaches.
    floats = [value if value in (inf, -inf) else float32(value, name, where).value for value in values]
    return GGUFValue(floats, GGUFValueType.ARRAY, GGUFValueType.FLOAT32)


def _windows(configuration: Configuration) -> dict[str, GGUFValue]:
    """Which layers have a sliding window, where llama.cpp computes one and has another order of its own."""
    period, windowed = configuration.architecture.window_period, configuration.windowed
    if "attention.sliding_window_pattern" in configuration.architecture.metadata:
        return {}
    usual = tuple((layer + 1) % period != 0 for layer in range(len(windowed))) if period else windowed
    if windowed == usual or not any(windowed):
        return {}
    return {"attention.sliding_window_pattern": GGUFValue(list(windowed), GGUFValueType.ARRAY, GGUFValueType.BOOL)}


def source_card(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the source says of itself that a card about a conversion of it repeats: license (with its name and link),
    pipeline_tag, language, tags; texts or lists of texts. From the model card's front matter or a GGUF's own keys."""
    if checkpoint.metadata is not None:
        stated = {
            "license": checkpoint.metadata.get(Keys.General.LICENSE),
            "license_name": checkpoint.metadata.get(Keys.General.LICENSE_NAME),
            "license_link": checkpoint.metadata.get(Keys.General.LICENSE_LINK),
            "language": checkpoint.metadata.get(Keys.General.LANGUAGES),
            "tags": checkpoint.metadata.get(Keys.General.TAGS),
        }
        card = {key: entry.value for key, entry in stated.items() if entry is not None}
    else:
        try:
            card = read_front_matter(checkpoint.location / _CARD)
        except SenselessFrontMatter:
            card = {}  # said with the plan
        card = {"license": checkpoint.config.get("license"), **card}
    known: dict[str, Any] = {}
    for key in ("license", "license_name", "license_link", "pipeline_tag", "language", "tags"):
        value = card.get(key)
        if isinstance(value, list):
            known[key] = [str(item) for item in value]
        elif value is not None:
            known[key] = str(value)
    return known


def _general(
    checkpoint: Checkpoint, gguf_name: str, tensors: Iterable[TensorSpec]
) -> tuple[dict[str, GGUFValue], list[str]]:
    """Name, size label, license and base models, as gguf derives them from model card, configuration and name; without
    the card where that makes no sense, which is to be noted."""
    tensors = list(tensors)
    try:
        return _derived(checkpoint, gguf_name, tensors, read_front_matter(checkpoint.location / _CARD)), []
    except _SENSELESS as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
    note = f"{_CARD} is left out, its front matter makes no sense: {why}"
    return _derived(checkpoint, gguf_name, tensors, {}), [note]


def _derived(
    checkpoint: Checkpoint, gguf_name: str, tensors: Iterable[TensorSpec], card: Mapping[str, Any]
) -> dict[str, GGUFValue]:
    """By the checkpoint's files, with this card."""
    writer = GGUFWriter(path=None, arch=gguf_name)
    writer.add_type(GGUFType.MODEL)
    for spec in tensors:
        # Only the shape counts here, for the number of parameters.
        writer.add_tensor_info(spec.name, spec.shape, np.dtype(np.float32), spec.n_weights * 4)
    counts = writer.get_total_parameter_count()
    metadata = _load_metadata(checkpoint, counts[0], card)
    if metadata.size_label is None:
        metadata.size_label = size_label(*counts)
    metadata.set_gguf_meta_model(writer)
    return {key: _texts(value) for key, value in writer.kv_data[0].items()}


def _texts(value: GGUFValue) -> GGUFValue:
    """The value, with text where text belongs: YAML reads a version 2.0 as a number."""
    if value.type is GGUFValueType.STRING:
        return GGUFValue(str(value.value), value.type)
    if value.type is GGUFValueType.ARRAY:
        return GGUFValue([str(item) for item in value.value], value.type, GGUFValueType.STRING)
    return value


def _load_metadata(checkpoint: Checkpoint, n_parameters: int, card: Mapping[str, Any]) -> Metadata:
    """gguf reads names and sizes out of the directory's name, which in the Hub's cache is a commit hash: a directory of
    the model's own name stands in for it. The card in it is of our own making: gguf's reader follows every alias."""
    organization, _, name = checkpoint.model_id.rpartition("/")
    with TemporaryDirectory() as parent:
        directory = Path(parent) / name
        directory.mkdir()
        for file in _DESCRIPTIONS:
            if (path := checkpoint.location / file).is_file():
                (directory / file).symlink_to(path.resolve())
        if card:
            # Results of benchmarks are long, and tell gguf nothing.
            told = {key: value for key, value in card.items() if key != "model-index"}
            (directory / _CARD).write_text(front_matter_file(told), encoding="utf-8")
        metadata = Metadata.load(model_path=directory, total_params=n_parameters)
    if metadata.name is None:
        metadata.name = name
    if metadata.organization is None and organization:
        metadata.organization = Metadata.id_to_title(organization)  # type: ignore[no-untyped-call]
    return metadata
