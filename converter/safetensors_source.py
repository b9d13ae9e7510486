"""A Hugging Face directory with safetensors weights, single or sharded; every header is checked before it is used."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

from converter.checkpoint import DTYPE_BYTES, INDEX_NAME, Checkpoint, StoredTensor
from formats.errors import ConvertError

SINGLE_NAME = "model.safetensors"
# The reference implementation's own limit on the header's length.
MAX_HEADER_BYTES = 100_000_000
# Last part of the name -> the matrices whose rows follow each other in every expert.
_FUSED_EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
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
    path = directory / "config.json"
    if not path.is_file():
        raise ConvertError("the directory has no config.json", str(directory), "point to a Hugging Face checkpoint")
    config = _read_json(path)
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
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvertError("the index has no weight_map", str(index), "fetch the index again")
    for name in weight_map.values():
        # A shard lies beside its index: a path would let an index read any file of this machine.
        if not isinstance(name, str) or Path(name).name != name:
            raise ConvertError(
                f"the index names a shard {name!r} outside of its directory", str(index), "do not use it"
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
    """The tensors of one safetensors file: 8 bytes of length, little endian, JSON of that length, then the data,
    which the tensors fill without gap or overlap (https://github.com/huggingface/safetensors#format)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if length < 0 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _broken(path, f"its header of {length} bytes does not fit into a file of {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise _broken(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        tensors[name], span = _parse_entry(path, name, entry, data_start=8 + length)
        spans.append((*span, name))
    _check_spans(path, sorted(spans), n_data_bytes=size - 8 - length)
    return tensors


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> tuple[StoredTensor, tuple[int, int]]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _broken(path, f"its entry for {name!r} lacks dtype, shape or data_offsets") from None
    if not isinstance(shape, list) or not all(_is_count(n) for n in [*shape, begin, end]):
        raise _broken(path, f"its entry for {name!r} has sizes that are no whole numbers")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise unknown_dtype(name, dtype, str(path))
    tensor = StoredTensor(dtype, tuple(shape), path, data_start + begin)
    if end - begin != tensor.n_bytes:
        raise _broken(
            path, f"{name!r} of shape {shape} in {dtype} takes {tensor.n_bytes} bytes, its entry says {end - begin}"
        )
    return tensor, (begin, end)


def _check_spans(path: Path, spans: list[tuple[int, int, str]], n_data_bytes: int) -> None:
    position = 0
    for begin, end, name in spans:
        if end > n_data_bytes:
            raise ConvertError(
                f"the file ends {end - n_data_bytes} bytes before the end of the tensor {name!r}",
                str(path),
                "the download was cut short: fetch this file again",
            )
        if begin != position:
            raise _broken(
                path,
                f"the data of {name!r} {'overlaps' if begin < position else 'leaves a gap after'} the tensor before it",
            )
        position = end
    if position != n_data_bytes:
        raise _broken(path, f"{n_data_bytes - position} bytes after the last tensor belong to none")


def _is_count(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= 0


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path.name} is no JSON: {error}", str(path), "fetch this file again") from None
    if not isinstance(content, dict):
        raise ConvertError(f"{path.name} is no JSON object", str(path), "fetch this file again")
    return content


def unknown_dtype(name: str, dtype: str, where: str) -> ConvertError:
    return ConvertError(
        f"{name!r} is stored as {dtype}, which is not one of {', '.join(DTYPE_BYTES)}",
        where,
        "convert a checkpoint in F32, F16 or BF16",
    )


def _broken(path: Path, what: str) -> ConvertError:
    return ConvertError(f"this is no valid safetensors file: {what}", str(path), "fetch this file again")
