"""A Hugging Face directory with safetensors weights, single or sharded; every header is checked before it is used."""

import re
from pathlib import Path

from converter.checkpoint import INDEX_NAME, Checkpoint, StoredTensor
from converter.source_config import read_config
from converter.stored_tensors import same_bytes, tensors_of
from formats import safetensors_file
from formats.errors import ConvertError
from formats.regular_file import read_json

SINGLE_NAME = "model.safetensors"
_SHARD_NAME = re.compile(r"[\w. +-]{1,200}\.safetensors", re.ASCII)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def open_directory(directory: Path, model_id: str, revision: str | None = None) -> Checkpoint:
    """The checkpoint in this directory. Raises ConvertError when it has no config.json, no safetensors weights, or a
    shard that is missing, cut short or malformed, and when it holds an adapter, too."""
    config, weight_map = read_config(directory, str(directory)), read_weight_map(directory)
    headers = {shard.name: read_header(shard) for shard in _present_shards(directory, weight_map)}
    tensors, notes = tensors_of(config, headers, weight_map, same_bytes, str(directory / INDEX_NAME))
    notes = [*index_notes(directory, weight_map), *notes]
    return Checkpoint(directory, model_id, revision, config, tensors, notes=tuple(notes))


def index_notes(directory: Path, weight_map: dict[str, str] | None) -> list[str]:
    """What to note of an index that is not read: beside a single file, which transformers takes first."""
    if weight_map is not None or not (directory / INDEX_NAME).is_file():
        return []
    return [f"{SINGLE_NAME} is read, as transformers does, and neither {INDEX_NAME} beside it nor the shards it names"]


def shard_names(weight_map: dict[str, str] | None) -> list[str]:
    return sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_NAME]


def read_weight_map(directory: Path) -> dict[str, str] | None:
    """Tensor -> name of its shard, out of the index; None for a checkpoint of a single file, which comes first."""
    index = directory / INDEX_NAME
    if not index.is_file() or (directory / SINGLE_NAME).is_file():
        return None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvertError("the index has no weight_map", str(index), "fetch the index again")
    for name in weight_map.values():
        # A shard lies beside its index: a path would let an index read any file of this machine.
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise ConvertError(
                f"the index names a shard {str(name)[:60]!r}, no safetensors file or outside of its directory",
                str(index),
                "do not use it",
            )
    return weight_map


def _present_shards(directory: Path, weight_map: dict[str, str] | None) -> list[Path]:
    names = shard_names(weight_map)
    missing = [name for name in names if not (directory / name).is_file()]
    if not missing:
        return [directory / name for name in names]
    if weight_map is not None:
        raise ConvertError(
            f"{len(missing)} of {len(names)} shards are missing, the first is {missing[0]}",
            str(directory),
            "fetch the missing files; the index names them",
        )
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise ConvertError(
            f"the weights are pickles ({pickles[0]}), which can run any code when they are loaded; only safetensors "
            "are read",
            str(directory),
            'if you trust them: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{directory}', dtype='auto').save_pretrained('{directory}')\"",
        )
    raise ConvertError(f"the directory has neither {SINGLE_NAME} nor {INDEX_NAME}", str(directory), "fetch the weights")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises ConvertError as safetensors_file.read_header does."""
    stored, _ = safetensors_file.read_header(path)
    return {name: StoredTensor(t.dtype, t.shape, path, t.offset) for name, t in stored.items()}
