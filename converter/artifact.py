"""What the artifact is, before it is written: its name, its key-values with the recipe inside, its exact layout."""

from collections.abc import Mapping

from gguf import GGML_QUANT_VERSION, Keys, LlamaFileType, naming_convention
from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue

from calibration.importance import ImportanceMatrix
from converter.checkpoint import Checkpoint
from converter.job import Job
from converter.recipe import importance_name, recipe
from formats.gguf_file import GgufLayout, TensorEntry, lay_out
from formats.names import safe_name
from formats.registry import get_format
from profiles.plan import Plan
from profiles.vocabulary import ModelMap

# llama.cpp's name for a file whose matrices are mostly of a K type is that of its medium mix.
_FILE_TYPES = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M"}


# Leaves room for the numbers of shards, and for what is kept beside a file under names longer than its own.
_LONGEST_STEM = 200


def file_name(metadata: Mapping[str, object], model_name: str, profile_name: str) -> str:
    """BaseName-SizeLabel-FineTune-Version-Encoding.gguf, the GGUF naming convention; the encoding is the profile.

    metadata: the model's key-values as plain values. model_name: for a model whose metadata has no name. Both come
    with the model, and nothing in them decides where the file is: it is a name in one directory, see safe_name.
    """

    def text(key: str) -> str | None:
        return safe_name(str(metadata[key])) or None if key in metadata else None

    stem = naming_convention(
        model_name=text(Keys.General.NAME) or safe_name(model_name) or "model",
        base_name=text(Keys.General.BASENAME),
        finetune_string=text(Keys.General.FINETUNE),
        version_string=text(Keys.General.VERSION),
        size_label=text(Keys.General.SIZE_LABEL),
        output_type=profile_name.replace("-", "_"),
    )
    return f"{safe_name(stem, _LONGEST_STEM)}.gguf"


def _file_type(plan: Plan) -> int:
    name = plan.dominant_format
    label = _FILE_TYPES.get(name, f"MOSTLY_{name}")
    return LlamaFileType[label if label in LlamaFileType.__members__ else "GUESSED"].value


def artifact_metadata(
    job: Job, checkpoint: Checkpoint, model_map: ModelMap, plan: Plan, importance: ImportanceMatrix | None
) -> dict[str, GGUFValue]:
    """The model's key-values, then how it was quantized: llama.cpp's own keys, and the recipe under `bitwright.`.

    importance: what the encoders use, or the identity it will have; only its identity and entry count are read, so the
    result has the same length before and after the calibration. Nothing here depends on paths, dates or threads.
    """

    def string(value: str) -> GGUFValue:
        return GGUFValue(value, GGUFValueType.STRING)

    metadata = dict(model_map.metadata)
    metadata[Keys.General.FILE_TYPE] = GGUFValue(_file_type(plan), GGUFValueType.UINT32)
    metadata[Keys.General.QUANTIZATION_VERSION] = GGUFValue(GGML_QUANT_VERSION, GGUFValueType.UINT32)
    metadata[Keys.General.QUANTIZED_BY] = string("bitwright")
    if importance is not None:
        metadata["quantize.imatrix.file"] = string(importance_name(job))
        metadata["quantize.imatrix.dataset"] = string(importance.corpus or "unknown")
        for key, n in (("entries_count", len(importance.sums)), ("chunks_count", importance.samples or 0)):
            metadata[f"quantize.imatrix.{key}"] = GGUFValue(n, GGUFValueType.INT32)
    for key, value in recipe(job, checkpoint, plan, importance).items():
        metadata[f"bitwright.{key}"] = GGUFValue(value, _kind(value))
    return metadata


def _kind(value: str | int | float) -> GGUFValueType:
    if isinstance(value, str):
        return GGUFValueType.STRING
    if isinstance(value, float):
        return GGUFValueType.FLOAT64
    return GGUFValueType.UINT32 if value < 1 << 32 else GGUFValueType.UINT64


def artifact_layout(file: str, metadata: dict[str, GGUFValue], plan: Plan, shard_bytes: int | None) -> list[GgufLayout]:
    """The files to write, to the byte."""
    entries = [
        TensorEntry(p.tensor.name, p.tensor.shape, get_format(p.format).ggml_type, p.n_bytes) for p in plan.tensors
    ]
    return lay_out(file, metadata, entries, shard_bytes)
