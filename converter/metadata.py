"""The artifact's key-value pairs that describe the model, with the keys and types that llama.cpp's converter writes."""

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml
from gguf import GGUFType, GGUFValueType, GGUFWriter, Keys, Metadata, size_label
from gguf.gguf_writer import GGUFValue

from converter.checkpoint import Checkpoint
from converter.configuration import Configuration
from converter.rope import rope_metadata
from formats.errors import ConvertError
from profiles.vocabulary import TensorSpec


def model_metadata(
    checkpoint: Checkpoint, configuration: Configuration, tensors: Iterable[TensorSpec]
) -> dict[str, GGUFValue]:
    """general.* and the architecture's own keys.
    The writer adds what it alone knows: general.file_type and general.quantization_version."""
    architecture = configuration.architecture
    own: dict[str, GGUFValue] = {}
    for key, name in architecture.uint32.items():
        if (value := configuration.number(name)) is not None:
            own[key] = GGUFValue(int(value), GGUFValueType.UINT32)
    for key, name in architecture.float32.items():
        if (value := configuration.number(name)) is not None:
            own[key] = GGUFValue(float(value), GGUFValueType.FLOAT32)
    own |= rope_metadata(configuration.rope)
    general = _general(checkpoint, architecture.gguf_name, tensors)
    return general | {f"{architecture.gguf_name}.{key}": value for key, value in own.items()}


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
        card = {"license": checkpoint.config.get("license"), **Metadata.load_model_card(checkpoint.location)}
    known: dict[str, Any] = {}
    for key in ("license", "license_name", "license_link", "pipeline_tag", "language", "tags"):
        value = card.get(key)
        if isinstance(value, list):
            known[key] = [str(item) for item in value]
        elif value is not None:
            known[key] = str(value)
    return known


def _general(checkpoint: Checkpoint, gguf_name: str, tensors: Iterable[TensorSpec]) -> dict[str, GGUFValue]:
    """Name, size label, license and base models, as gguf derives them from model card, configuration and name."""
    writer = GGUFWriter(path=None, arch=gguf_name)
    writer.add_type(GGUFType.MODEL)
    for spec in tensors:
        # Only the shape counts here, for the number of parameters.
        writer.add_tensor_info(spec.name, spec.shape, np.dtype(np.float32), spec.n_weights * 4)
    counts = writer.get_total_parameter_count()
    metadata = _load_metadata(checkpoint, counts[0])
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


def _load_metadata(checkpoint: Checkpoint, n_parameters: int) -> Metadata:
    """gguf reads names and sizes out of the directory's name, which in the Hub's cache is a commit hash: a link of the
    model's own name stands in for it."""
    organization, _, name = checkpoint.model_id.rpartition("/")
    with TemporaryDirectory() as parent:
        link = Path(parent) / name
        link.symlink_to(checkpoint.location.resolve(), target_is_directory=True)
        try:
            metadata = Metadata.load(model_path=link, total_params=n_parameters)
        except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise ConvertError(
                f"the model card's front matter makes no sense: {str(error).splitlines()[0]}",
                str(checkpoint.location / "README.md"),
                "correct it, or take README.md out of the directory",
            ) from None
    if metadata.name is None:
        metadata.name = name
    if metadata.organization is None and organization:
        metadata.organization = Metadata.id_to_title(organization)
    return metadata
