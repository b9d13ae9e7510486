"""Safetensors files: the beginning, known before the first tensor is, and the one reader, which trusts no file.

    header's length, 8 bytes little endian | header, JSON padded with blanks to 8 bytes | the tensors without gaps

So a file's size and every tensor's place are known as well, and nothing is in memory but the tensor that is written.
Read is nothing but a file whose tensors fill it to the byte (https://github.com/huggingface/safetensors#format).
"""

import json
import os
import re
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from bitwright.formats.errors import ConvertError
from bitwright.formats.files.regular_file import open_regular, read_json
from bitwright.formats.files.stored_tensor import DTYPE_BITS, NUMPY_DTYPES, StoredTensor

SINGLE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
"""A model's only file; the index of its shards, where it has some."""

# The reference implementation's own limit on the header's length.
_MAX_HEADER_BYTES = 100_000_000
# What numpy can hold, and more than any model has.
_MOST_DIMENSIONS = 32
_SHARD_NAME = re.compile(r"[\w. +-]{1,200}\.safetensors", re.ASCII)


def header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Everything before the data of these tensors, which follow each other in this order: name -> dtype and shape.

    metadata: {"format": "pt"} by default, which transformers asks for.
    Raises ConvertError for a dtype that cannot be written.
    """
    described: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in NUMPY_DTYPES:
            raise ConvertError(
                f"tensors of dtype {dtype} cannot be written", f"tensor {name}", f"use one of {', '.join(NUMPY_DTYPES)}"
            )
        start, end = end, end + prod(shape) * NUMPY_DTYPES[dtype].itemsize
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path, remedy: str = "fetch this file again") -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """The tensors by name, and the metadata. Raises ConvertError, with that remedy, for anything but a whole file."""
    with open_regular(path, remedy) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 0 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise _Broken(f"its header of {length} bytes does not fit into a file of {size}")
            header = _parse_header(file.read(length))
            metadata = header.pop("__metadata__", {})
            if not isinstance(metadata, dict):
                raise _Broken("its metadata is no JSON object")
            data_start, spans, tensors = 8 + length, [], {}
            for name, entry in header.items():
                dtype, shape, begin, end = _parse_entry(name, entry)
                spans.append((begin, end, name))
                tensors[name] = StoredTensor(dtype, shape, path, data_start + begin)
            _check_spans(sorted(spans), size - data_start)
        except (_Broken, OSError) as error:
            raise ConvertError(f"this is no valid safetensors file: {error}", str(path), remedy) from None
    return tensors, metadata


def read_weight_map(directory: Path) -> dict[str, str] | None:
    """Tensor -> name of its shard, out of the index; None for a model of a single file, which comes first."""
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


def shard_names(weight_map: dict[str, str] | None) -> list[str]:
    """The names of a model's files."""
    return sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_NAME]


def read_headers(directory: Path, remedy: str) -> dict[str, StoredTensor]:
    """Every tensor of a model by its name. Raises ConvertError, with that remedy, for a file that is absent or
    damaged."""
    weight_map = read_weight_map(directory)
    stored: dict[str, StoredTensor] = {}
    for shard in shard_names(weight_map):
        tensors, _ = read_header(directory / shard, remedy)
        stored |= {name: t for name, t in tensors.items() if weight_map is None or weight_map.get(name) == shard}
    return stored


class _Broken(Exception):
    """What is wrong with a file."""


def _parse_header(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _Broken(f"its header is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise _Broken("its header is no JSON object")
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Broken("its header names something twice")
    return found


def _parse_entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _Broken(f"its entry for {name!r} lacks dtype, shape or data_offsets") from None
    if not isinstance(shape, list) or not all(_is_size(n) for n in [*shape, begin, end]):
        raise _Broken(f"its entry for {name!r} has sizes that are no whole numbers")
    if len(shape) > _MOST_DIMENSIONS:
        raise _Broken(f"{name!r} has {len(shape)} dimensions")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _Broken(f"{name!r} is stored as {str(dtype)[:60]}, which safetensors does not know")
    n_bits = prod(shape) * DTYPE_BITS[dtype]
    if n_bits != 8 * (end - begin):
        raise _Broken(
            f"{name!r} of shape {shape} in {dtype} takes {-(-n_bits // 8)} bytes, its entry says {end - begin}"
        )
    return dtype, tuple(shape), begin, end


def _check_spans(spans: list[tuple[int, int, str]], n_data_bytes: int) -> None:
    position = 0
    for begin, end, name in spans:
        if end > n_data_bytes:
            raise _Broken(f"the file ends {end - n_data_bytes} bytes before the end of the tensor {name!r}")
        if begin != position:
            problem = "overlaps" if begin < position else "leaves a gap after"
            raise _Broken(f"the data of {name!r} {problem} the tensor before it")
        position = end
    if position != n_data_bytes:
        raise _Broken(f"{n_data_bytes - position} bytes after the last tensor belong to none")


def _is_size(n: Any) -> bool:
    return type(n) is int and 0 <= n < 1 << 64
