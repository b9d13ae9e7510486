"""A Hugging Face directory with safetensors weights, single or sharded; every header is checked before it is used."""

from pathlib import Path

from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.converter.source.known_cases import refuse_makers_own
from bitwright.converter.source.source_config import read_config
from bitwright.converter.source.stored_tensors import same_bytes, tensors_of
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.safetensors import INDEX_NAME, SINGLE_NAME, read_header, read_weight_map, shard_names

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def open_directory(directory: Path, model_id: str, revision: str | None = None) -> Checkpoint:
    """The checkpoint in this directory. Raises ConvertError when it has no config.json, no safetensors weights, or a
    shard that is missing, cut short or malformed, and when it holds an adapter, too."""
    config, weight_map = read_config(directory, str(directory)), read_weight_map(directory)
    headers = {shard.name: read_header(shard)[0] for shard in _present_shards(directory, weight_map)}
    config, tensors, notes = tensors_of(config, headers, weight_map, same_bytes, str(directory / INDEX_NAME))
    notes = [*index_notes(directory, weight_map), *notes]
    return Checkpoint(directory, model_id, revision, config, tensors, notes=tuple(notes))


def index_notes(directory: Path, weight_map: dict[str, str] | None) -> list[str]:
    """What to note of an index that is not read: beside a single file, which transformers takes first."""
    if weight_map is not None or not (directory / INDEX_NAME).is_file():
        return []
    return [f"{SINGLE_NAME} is read, as transformers does, and neither {INDEX_NAME} beside it nor the shards it names"]


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
    refuse_makers_own(directory)
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
