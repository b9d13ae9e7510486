"""A Hugging Face directory with safetensors weights, single or sharded; every header is checked before it is used."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from converter.checkpoint import DTYPE_BYTES, INDEX_NAME, Checkpoint, StoredTensor, metadata_files
from formats import safetensors_file
from formats.errors import ConvertError
from formats.regular_file import read_json

SINGLE_NAME = "model.safetensors"
# Last part of the name -> the matrices whose rows follow each other in every expert.
_FUSED_EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_SHARD_NAME = re.compile(r"[\w. +-]{1,200}\.safetensors", re.ASCII)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def open_directory(directory: Path, model_id: str, revision: str | None = None) -> Checkpoint:
    """The checkpoint in this directory. Raises ConvertError when it has no config.json, no safetensors weights, is
    quantized already, or has a shard that is missing, cut short or malformed."""
    config, weight_map = read_config(directory), read_weight_map(directory)
    tensors: dict[str, StoredTensor] = {}
    for shard in _present_shards(directory, weight_map):
        for name, tensor in read_header(shard).items():
            # A shard may hold tensors that its index gives to another shard, or to none.
            if weight_map is None or weight_map.get(name) == shard.name:
                tensors[name] = tensor
    for name, shard_name in (weight_map or {}).items():
        if name not in tensors:
            raise ConvertError(
                f"{shard_name} lacks the tensor {name!r} that the index promises",
                str(directory / INDEX_NAME),
                "fetch the index and this shard again, from the same revision",
            )
    return Checkpoint(directory, model_id, revision, config, split_experts(tensors))


def split_experts(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The experts of a layer one by one where they are stored as one 3-D tensor, as transformers 5 holds them: of
    gate_up_proj [n_experts, gate's and up's rows, n_columns] every matrix's rows follow each other."""
    split: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        parts = _FUSED_EXPERTS.get(last) if prefix.endswith(".experts") and len(tensor.shape) == 3 else None
        if parts is None or tensor.shape[1] % len(parts):
            split[name] = tensor
            continue
        n_experts, n_rows, n_columns = tensor.shape
        shape = n_rows // len(parts), n_columns
        step = tensor.n_bytes // (n_experts * len(parts))
        for i in range(n_experts * len(parts)):
            expert, part = divmod(i, len(parts))
            place = replace(tensor, shape=shape, offset=tensor.offset + i * step)
            split[f"{prefix}.{expert}.{parts[part]}.weight"] = place
    return split


def read_config(directory: Path) -> dict[str, Any]:
    """config.json, a text model's own configuration lifted to the top. Refuses quantized checkpoints."""
    metadata_files(directory)  # before anything opens one that is a trap
    path = directory / "config.json"
    if not path.is_file():
        raise ConvertError("the directory has no config.json", str(directory), "point to a Hugging Face checkpoint")
    config = read_json(path)
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise ConvertError(
            f"the checkpoint is quantized already ({method}); quantizing its rounded weights again would add their "
            "errors up",
            f"{path}: quantization_config",
            "convert the original checkpoint in F32, F16 or BF16 instead",
        )
    text_config = config.get("text_config")
    return {**config, **text_config} if isinstance(text_config, dict) else config


def shard_names(weight_map: dict[str, str] | None) -> list[str]:
    return sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_NAME]


def read_weight_map(directory: Path) -> dict[str, str] | None:
    """Tensor -> name of its shard, out of the index; None for a checkpoint of a single file, which has no index."""
    index = directory / INDEX_NAME
    if not index.is_file():
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
    """The tensors of one safetensors file. Raises ConvertError as safetensors_file.read_header does, and for a dtype
    that holds no weights."""
    stored, _ = safetensors_file.read_header(path)
    for name, tensor in stored.items():
        if tensor.dtype not in DTYPE_BYTES:
            raise unknown_dtype(name, tensor.dtype, str(path))
    return {name: StoredTensor(t.dtype, t.shape, path, t.offset) for name, t in stored.items()}


def unknown_dtype(name: str, dtype: str, where: str) -> ConvertError:
    return ConvertError(
        f"{name!r} is stored as {dtype}, which is not one of {', '.join(DTYPE_BYTES)}",
        where,
        "convert a checkpoint in F32, F16 or BF16",
    )
