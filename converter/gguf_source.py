"""A GGUF file in F32, F16 or BF16 as the source: its tensors and metadata are taken over as they are.

The reader trusts no length of the file: every read is checked against the file's size before it happens.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType, GGUFValueType
from gguf.gguf_writer import GGUFValue

from converter.architecture import Architecture, architectures, gguf_name, gguf_name_map
from converter.checkpoint import DTYPE_BYTES, Checkpoint, StoredTensor
from formats.errors import ConvertError, nearest
from profiles.vocabulary import ModelMap, Role, TensorSpec

_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.FLOAT64: "<d",
    GGUFValueType.BOOL: "<?",
}
# What the writer states about the new file itself.
_WRITERS_KEYS = ("general.file_type", "general.quantization_version", "general.alignment")
_MAX_DIMENSIONS = 4


def open_gguf(path: Path) -> Checkpoint:
    """The GGUF file as a checkpoint. Raises ConvertError for a file that is no GGUF of version 2 or 3, one that is cut
    short or malformed, one of several splits, and one with quantized tensors."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise _broken(path, "it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            metadata, tensors = _parse(path, data)
    if metadata.get("split.count", GGUFValue(1, GGUFValueType.UINT16)).value > 1:
        raise ConvertError(
            "this is one of several splits of a model", str(path), "merge them first: llama-gguf-split --merge"
        )
    architecture = metadata.get("general.architecture")
    config = {"model_type": architecture.value if architecture else None}
    return Checkpoint(path, path.stem, None, config, tensors, metadata)


def describe_gguf(checkpoint: Checkpoint) -> ModelMap:
    """The model map of a GGUF: tensors in the file's order, roles by their names in the known architectures."""
    metadata, where = checkpoint.metadata or {}, str(checkpoint.location)
    name = checkpoint.config["model_type"]
    known = [architecture for architecture in architectures() if architecture.gguf_name == name]
    if not known:
        names = sorted({architecture.gguf_name for architecture in architectures()})
        raise ConvertError(
            f"unknown architecture {name!r}", f"{where}: general.architecture", nearest(str(name), names)
        )
    block_count = metadata.get(f"{name}.block_count")
    if block_count is None:
        raise ConvertError(f"the file lacks the key {name}.block_count", where, "convert the original checkpoint")
    roles = _roles(known)
    tensors = tuple(
        _describe_tensor(tensor_name, tensor, roles, where) for tensor_name, tensor in checkpoint.tensors.items()
    )
    kept = {key: value for key, value in metadata.items() if key not in _WRITERS_KEYS and not key.startswith("split.")}
    return ModelMap(name, block_count.value, tensors, kept)


def _roles(known: list[Architecture]) -> dict[str, Role]:
    """Role by GGUF name, with {layer} in the place of the layer's index."""
    roles = {
        "rope_freqs.weight": Role.ROPE,
        "rope_factors_long.weight": Role.ROPE,
        "rope_factors_short.weight": Role.ROPE,
    }
    for architecture in known:
        names = gguf_name_map(architecture.gguf_name, n_layers=1)
        for rule in (*architecture.before, *architecture.layer, *architecture.after):
            name = gguf_name(names, rule.pattern.replace(".{expert}", "").format(layer=0))
            roles[name.replace("blk.0.", "blk.{layer}.")] = rule.role
    return roles


def _describe_tensor(name: str, tensor: StoredTensor, roles: dict[str, Role], where: str) -> TensorSpec:
    start, _, rest = name.partition(".")
    index, _, tail = rest.partition(".")
    layer = int(index) if start == "blk" and index.isdecimal() else None
    role = roles.get(name if layer is None else f"blk.{{layer}}.{tail}")
    if role is None:
        raise ConvertError(
            f"the tensor {name!r} is unknown to the architecture",
            where,
            "docs/add-an-architecture.md tells how to add it",
        )
    return TensorSpec(name, tensor.shape, role, layer, (name,))


class _Reader:
    """Little-endian values out of a mapped file, none of them beyond its end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.position = path, data, 0

    def take(self, n_bytes: int) -> bytes:
        end = self.position + n_bytes
        if end > len(self.data):
            raise _broken(self.path, f"it ends at byte {len(self.data)}, inside its header")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        try:
            return self.take(self.number("<Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _broken(self.path, f"a string is no UTF-8 ({error})") from None

    def value_type(self) -> GGUFValueType:
        number = self.number("<I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise _broken(self.path, f"{number} is no type of value") from None

    def value(self) -> GGUFValue:
        value_type = self.value_type()
        if value_type is GGUFValueType.ARRAY:
            item_type, length = self.value_type(), self.number("<Q")
            return GGUFValue([self._item(item_type) for _ in range(length)], value_type, item_type)
        return GGUFValue(self._item(value_type), value_type)

    def _item(self, value_type: GGUFValueType) -> Any:
        if value_type is GGUFValueType.STRING:
            return self.string()
        if value_type is GGUFValueType.ARRAY:
            raise _broken(self.path, "it has an array of arrays")
        return self.number(_SCALARS[value_type])


def _parse(path: Path, data: mmap.mmap) -> tuple[dict[str, GGUFValue], dict[str, StoredTensor]]:
    reader = _Reader(path, data)
    if reader.take(4) != b"GGUF":
        raise ConvertError("this file is no GGUF", str(path), "give a GGUF file or the directory of a checkpoint")
    version = reader.number("<I")
    if version not in (2, 3):
        raise _broken(path, f"version {version} is neither 2 nor 3")
    n_tensors, n_values = reader.number("<Q"), reader.number("<Q")
    metadata = {}
    for _ in range(n_values):
        key = reader.string()
        metadata[key] = reader.value()
    infos = [_tensor_info(reader) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", GGUFValue(32, GGUFValueType.UINT32)).value
    if not isinstance(alignment, int) or alignment <= 0:
        raise _broken(path, f"general.alignment is {alignment!r}")
    data_start = -(-reader.position // alignment) * alignment
    return metadata, {info[0]: _stored_tensor(path, info, data_start, len(data)) for info in infos}


def _tensor_info(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name, n_dimensions = reader.string(), reader.number("<I")
    if n_dimensions > _MAX_DIMENSIONS:
        raise _broken(reader.path, f"{name!r} has {n_dimensions} dimensions")
    shape = tuple(reader.number("<Q") for _ in range(n_dimensions))[::-1]
    return name, shape, reader.number("<I"), reader.number("<Q")


def _stored_tensor(path: Path, info: tuple[str, tuple[int, ...], int, int], data_start: int, size: int) -> StoredTensor:
    name, shape, type_number, offset = info
    try:
        dtype = GGMLQuantizationType(type_number).name
    except ValueError:
        dtype = f"type {type_number}"
    if dtype not in DTYPE_BYTES:
        raise ConvertError(
            f"the tensor {name!r} is quantized already ({dtype}); quantizing its rounded weights again would add their "
            "errors up",
            str(path),
            "convert from the original checkpoint, or from its GGUF in F32, F16 or BF16",
        )
    end = data_start + offset + math.prod(shape) * DTYPE_BYTES[dtype]
    if end > size:
        raise ConvertError(
            f"the file ends {end - size} bytes before the end of the tensor {name!r}",
            str(path),
            "the file was cut short: fetch or convert it again",
        )
    return StoredTensor(dtype, shape, path, data_start + offset)


def _broken(path: Path, what: str) -> ConvertError:
    return ConvertError(f"this is no valid GGUF file: {what}", str(path), "fetch or convert this file again")
