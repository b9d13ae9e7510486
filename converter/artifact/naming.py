"""The name of an artifact: what the model says of itself, and a label that the ecosystem reads.

Name-BW-Q4_K_M.gguf       the label is that of the nearest of llama.cpp's mixes, see profiles.planning.labels
Name-quantized.w8a8       a directory is called as people call those of its scheme

What made the artifact otherwise than its label says is in its metadata, its report and its card.
"""

import re
from collections.abc import Collection, Mapping

from gguf import Keys, LlamaFileType, naming_convention

from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.names import safe_name
from bitwright.profiles.reading.activations import NO_CACHE_SCHEME
from bitwright.profiles.reading.schema import QuantizationProfile
from bitwright.profiles.vocabulary import ModelMap

# Leaves room for the label, for the numbers of shards, and for what is kept beside a file under names longer than its
# own.
_LONGEST_STEM = 190

# Files whose names have one of these are no models to llama.cpp, whatever is in them (gguf_filename_is_model of
# common/download.cpp): a model's own name is not to have them.
_NO_MODELS = re.compile(r"mmproj|imatrix|(?:mtp|eagle3|dflash|dspark)-")
# What llama.cpp takes for the tag of a file (get_gguf_split_info there), after the number of a shard is taken off.
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_TAG = re.compile(r"[-.]([A-Z0-9_]+)$", re.IGNORECASE)

# How directories of these schemes are called on the Hub; any other has the scheme's own name.
_DIRECTORY_LABELS = {"FP8": "FP8-dynamic", "FP8_STATIC": "FP8", "FP8_BLOCK": "FP8-block"}
_INTEGERS = re.compile(r"W\d+A\d+")

Metadata = Mapping[str, object]
"""The key-values of a GGUF as plain values."""


def gguf_name(checkpoint: Checkpoint, model_map: ModelMap, mix: str) -> str:
    """The name of a GGUF of this model, where the user gives none."""
    return labelled(_metadata(model_map), checkpoint.model_id.rpartition("/")[2], mix)


def labelled(metadata: Metadata, model_name: str, mix: str | None) -> str:
    """Name-BW-MIX.gguf; None for a file that has the name of no mix."""
    label = "" if mix is None else f"-BW-{mix}"
    return f"{model_stem(metadata, model_name)}{label}.gguf"


def directory_name(checkpoint: Checkpoint, model_map: ModelMap, profile: QuantizationProfile) -> str:
    """The name of a safetensors directory of this model, where the user gives none."""
    scheme = str(profile.base)
    label = _DIRECTORY_LABELS.get(scheme, scheme)
    if _INTEGERS.match(scheme):
        label = f"quantized.{scheme.lower().replace('_', '-')}"
    if profile.activations.kv_cache != NO_CACHE_SCHEME:
        label += f"-{profile.activations.kv_cache}-KV"
    return f"{model_stem(_metadata(model_map), checkpoint.model_id.rpartition('/')[2])}-{label}"


def default_imatrix_name(checkpoint: Checkpoint, model_map: ModelMap) -> str:
    """The name of the importance matrix of this model, where the user gives none."""
    return imatrix_name(_metadata(model_map), checkpoint.model_id.rpartition("/")[2], ".gguf")


def imatrix_name(metadata: Metadata, model_name: str, suffix: str) -> str:
    """The name of the importance matrix of a model, one for all its artifacts: llama.cpp takes it for no model."""
    return f"{model_stem(metadata, model_name)}.imatrix{suffix}"


def model_stem(metadata: Metadata, model_name: str) -> str:
    """BaseName-SizeLabel-FineTune-Version of the GGUF naming convention.

    model_name: for a model whose metadata has no name. Both come with the model, and nothing in them decides where the
    file is: it is a name in one directory, see safe_name.
    """

    def text(key: str) -> str | None:
        return safe_name(str(metadata[key])) or None if key in metadata else None

    stem = naming_convention(
        model_name=text(Keys.General.NAME) or safe_name(model_name) or "model",
        base_name=text(Keys.General.BASENAME),
        finetune_string=text(Keys.General.FINETUNE),
        version_string=text(Keys.General.VERSION),
        size_label=text(Keys.General.SIZE_LABEL),
        output_type=None,
    )
    return _NO_MODELS.sub(lambda match: match[0].upper(), safe_name(stem, _LONGEST_STEM))


def file_type(mix: str) -> LlamaFileType:
    """What `general.file_type` calls a mix; GUESSED is llama.cpp's word for one that it has no number of."""
    names = (f"MOSTLY_{mix}", f"ALL_{mix}")
    return next((kind for kind in LlamaFileType if kind.name in names), LlamaFileType.GUESSED)


def mix_of_file(metadata: Metadata) -> str | None:
    """The mix that `general.file_type` of a GGUF names; None where it names none."""
    found = metadata.get(Keys.General.FILE_TYPE)
    kind = next((kind for kind in LlamaFileType if kind.value == found), LlamaFileType.GUESSED)
    return None if kind is LlamaFileType.GUESSED else re.sub("^(MOSTLY|ALL)_", "", kind.name)


def whole_name(file_name: str) -> str:
    """The name of a GGUF that this one may be a shard of; its own where it is none."""
    return f"{_SHARD.sub('', file_name.removesuffix('.gguf'))}.gguf"


def tag_of(file_name: str) -> str | None:
    """The tag by which llama.cpp, Ollama and LM Studio ask for this file of a repository; None where it has none."""
    tag = _TAG.search(_SHARD.sub("", file_name.removesuffix(".gguf")))
    return None if tag is None else tag[1].upper()


def unique_tag(file_name: str, all_names: Collection[str]) -> str | None:
    """The tag of a file, or of its first shard, where it finds no other of these files: llama.cpp looks for a tag with
    a "-" or a "." after it anywhere in a path, and so finds BF16 for F16. None where there is no such tag."""
    tag = tag_of(file_name)
    if tag is None:
        return None
    wanted = re.compile(f"{re.escape(tag)}[.-]", re.IGNORECASE)
    found = {_SHARD.sub("", name.removesuffix(".gguf")) for name in all_names if is_model(name) and wanted.search(name)}
    return tag if len(found) == 1 else None


def is_model(path: str) -> bool:
    """Whether llama.cpp takes a file of this path in a repository for a model."""
    return path.endswith(".gguf") and not _NO_MODELS.search(path.rpartition("/")[2])


def _metadata(model_map: ModelMap) -> Metadata:
    return {key: entry.value for key, entry in model_map.metadata.items()}
