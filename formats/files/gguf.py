"""GGUF files: the exact layout before a byte is written, and a reader that distrusts what it reads.

    header | key-values | tensor infos | padding to 32 | data of tensor 0 | padding to 32 | data of tensor 1 | ...

The header comes from the `gguf` package's own writer; only the tensor data is streamed by this project, so that no
tensor has to be whole in memory and the size is known in advance.
"""

import os
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFWriter, Keys
from gguf.constants import GGUFValueType
from gguf.gguf_writer import SHARD_NAME_FORMAT, GGUFValue
from gguf.quants import dequantize

from bitwright.formats.block_format import BlockFormat, NewerType
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.gguf_fields import (
    NUMBER_DTYPES,
    BigEndian,
    GgufField,
    TensorInfo,
    read_header,
    tensor_info_bytes,
)
from bitwright.formats.files.regular_file import open_regular

T = TypeVar("T")


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the file: its GGUF name, shape (slowest dimension first), ggml type id and bytes of data."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    n_bytes: int


@dataclass(frozen=True)
class GgufLayout:
    """One file, known to the byte: the header with its padding, the tensors, and where each one's data starts."""

    file_name: str
    header: bytes
    tensors: tuple[TensorEntry, ...]
    offsets: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return self.offsets[-1] + padded(self.tensors[-1].n_bytes) if self.tensors else len(self.header)


def padded(n_bytes: int) -> int:
    return -(-n_bytes // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT


class _HeaderWriter(GGUFWriter):
    """The package's writer; arrays of texts, the longest part of a header, and of numbers are packed as a whole, and
    the latter may be empty, which it refuses."""

    def _pack_val(
        self, val: Any, vtype: GGUFValueType, add_vtype: bool, sub_type: GGUFValueType | None = None
    ) -> bytes:
        if vtype is GGUFValueType.ARRAY and isinstance(val, list) and val and isinstance(val[0], str):
            texts = [text.encode() for text in val]
            packed = b"".join(len(text).to_bytes(8, "little") + text for text in texts)
            return struct.pack("<IIQ", vtype, GGUFValueType.STRING, len(texts)) + packed
        if (
            vtype is GGUFValueType.ARRAY
            and isinstance(val, list)
            and sub_type is None
            and len(set(map(type, val))) == 1
        ):
            sub_type = GGUFValueType.get_type(val[0])
        if vtype is not GGUFValueType.ARRAY or sub_type is None or not (sub_type in NUMBER_DTYPES or len(val) == 0):
            return super()._pack_val(val, vtype, add_vtype, sub_type)
        packed = np.array(val, NUMBER_DTYPES.get(sub_type)).tobytes()
        return struct.pack("<IIQ", vtype, sub_type, len(val)) + packed


def _render_header(metadata: Mapping[str, GGUFValue], tensors: Sequence[TensorEntry]) -> bytes:
    architecture = metadata[Keys.General.ARCHITECTURE].value if Keys.General.ARCHITECTURE in metadata else ""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "header"
        writer = _HeaderWriter(path, architecture)
        if not architecture:  # a later shard of a split file describes nothing but itself
            writer.kv_data[0].clear()
        for key, value in metadata.items():
            if key != Keys.General.ARCHITECTURE:
                writer.add_key_value(key, value.value, value.type, value.sub_type)
        for tensor in tensors:
            # The writer asks the numpy dtype only for the shape of byte tensors; ours is the logical shape. Of the type
            # it writes the number, which may be newer than its list of types.
            ggml_type = cast(GGMLQuantizationType, tensor.ggml_type)
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, ggml_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    return header + bytes(padded(len(header)) - len(header))


def key_value_bytes(key: str, value: GGUFValue) -> int:
    """What a key and its value take of a header."""
    content = value.value
    if value.type is GGUFValueType.ARRAY and content and isinstance(content[0], str):
        # The longest by far, and not packed to be counted: type, type and number of the texts, each with its length.
        packed = 16 + 8 * len(content) + sum(map(len, map(str.encode, content)))
    else:
        packed = len(_HeaderWriter(None, arch="")._pack_val(content, value.type, True, value.sub_type))
    return 8 + len(key.encode()) + packed  # a text is its length in eight bytes, then itself


def _lay_out(file_name: str, metadata: Mapping[str, GGUFValue], tensors: Sequence[TensorEntry]) -> GgufLayout:
    header = _render_header(metadata, tensors)
    offsets, position = [], len(header)
    for tensor in tensors:
        offsets.append(position)
        position += padded(tensor.n_bytes)
    return GgufLayout(file_name, header, tuple(tensors), tuple(offsets))


def lay_out(
    file_name: str, metadata: Mapping[str, GGUFValue], tensors: Sequence[TensorEntry], shard_bytes: int | None = None
) -> list[GgufLayout]:
    """The layout of a model in one file, or in shards of at most shard_bytes each.

    Shards carry llama.cpp's split.* keys and its names (STEM-00001-of-00003.gguf); only the first describes the model.
    A tensor for which shard_bytes is too little has a shard of its own.
    """
    whole = _lay_out(file_name, metadata, tensors)
    if not shard_bytes or whole.n_bytes <= shard_bytes:
        return [whole]
    shards: list[list[TensorEntry]] = [[]]
    header_bytes = len(_render_header({**metadata, **_split_keys(0, 0, 0)}, []))
    later_header_bytes = len(_render_header(_split_keys(0, 0, 0), []))
    filled = 0
    for tensor in tensors:
        n_bytes = tensor_info_bytes(tensor.name, len(tensor.shape)) + padded(tensor.n_bytes)
        # The infos are padded as a whole.
        if shards[-1] and header_bytes + filled + n_bytes + GGUF_DEFAULT_ALIGNMENT > shard_bytes:
            shards.append([])
            filled, header_bytes = 0, later_header_bytes
        shards[-1].append(tensor)
        filled += n_bytes
    if len(shards) == 1:
        return [whole]
    stem = file_name.removesuffix(".gguf")
    layouts = []
    for i, shard in enumerate(shards):
        split = _split_keys(i, len(shards), len(tensors))
        name = SHARD_NAME_FORMAT.format(stem, i + 1, len(shards))
        layouts.append(_lay_out(name, {**metadata, **split} if i == 0 else split, shard))
    return layouts


def _split_keys(index: int, count: int, n_tensors: int) -> dict[str, GGUFValue]:
    return {
        Keys.Split.LLM_KV_SPLIT_NO: GGUFValue(index, GGUFValueType.UINT16),
        Keys.Split.LLM_KV_SPLIT_COUNT: GGUFValue(count, GGUFValueType.UINT16),
        Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT: GGUFValue(n_tensors, GGUFValueType.INT32),
    }


@dataclass(frozen=True)
class EncodedTensor:
    """A tensor of a GGUF file. shape: slowest dimension first; offset: of its data in the file, in bytes; scales: of
    its matrices, where it has second-level scales."""

    path: Path
    name: str
    shape: tuple[int, ...]
    ggml_type: IntEnum
    offset: int
    n_bytes: int
    scales: tuple[float, ...] = ()

    @property
    def n_rows(self) -> int:
        """Rows over all matrices; a vector is one row."""
        return prod(self.shape[:-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Encoded rows start to stop: uint8 [stop - start, row_bytes]. A plain file read: a mapping would count every
        page it has touched as resident memory."""
        row_bytes = self.n_bytes // self.n_rows
        n_bytes = (stop - start) * row_bytes
        data = np.fromfile(self.path, np.uint8, count=n_bytes, offset=self.offset + start * row_bytes)
        return data.reshape(stop - start, row_bytes)

    def decode(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop, times the scale of their matrix: float32 [stop - start, n_columns].

        The decoder is the `gguf` package's, which shares no mistake with our encoders; the tests hold our own, of the
        types that it cannot decode, against ggml's.
        """
        data = self.read(start, stop)
        try:
            rows = dequantize(data, cast(GGMLQuantizationType, self.ggml_type))
        except NotImplementedError:
            rows = _codec(self.ggml_type).decode(data)
        rows = rows.reshape(stop - start, self.shape[-1])
        if not self.scales:
            return rows
        matrices = np.arange(start, stop) * len(self.scales) // self.n_rows
        return rows * np.array(self.scales, np.float32)[matrices, None]


@dataclass(frozen=True, eq=False)
class GgufFile:
    """A file's key-values and tensors, in its order; types that the `gguf` package does not know yet are read too, and
    no tensor lies outside of the file or upon another."""

    path: Path
    fields: Mapping[str, GgufField]
    tensors: tuple[EncodedTensor, ...]

    def value(self, key: str, kind: type[T]) -> T | None:
        """The key's value, None when the file has no such key. Raises ConvertError for one of another kind."""
        if key not in self.fields:
            return None
        value = self.contents(key)
        if not isinstance(value, kind):
            raise self._odd(key, f"is {str(value)[:60]!r}")
        return value

    def metadata(self) -> dict[str, GGUFValue]:
        """All key-values, as the `gguf` package's writer takes them. Raises ConvertError for a text that is no text."""
        return {
            key: GGUFValue(self.contents(key), field.value_type, field.item_type) for key, field in self.fields.items()
        }

    def contents(self, key: str) -> Any:
        """The value of a key that is there. Raises ConvertError for a text that is no text."""
        try:
            return self.fields[key].contents()
        except UnicodeDecodeError as error:
            raise self._odd(key, f"is no UTF-8 ({error.reason})") from None

    def _odd(self, key: str, problem: str) -> ConvertError:
        return ConvertError(f"the value of {key} {problem}", str(self.path), "fetch or write the file again")


def _tensors(path: Path, infos: Sequence[TensorInfo], data_start: int, size: int) -> tuple[EncodedTensor, ...]:
    """Raises ValueError for what lies outside of the file, and for what llama.cpp would not load."""
    tensors: dict[str, EncodedTensor] = {}
    for info in infos:
        name, shape = info.name, info.shape
        if name in tensors:
            raise ValueError(f"the tensor {name!r} is there twice")
        if 0 in shape:
            raise ValueError(f"the tensor {name!r} has no elements")
        ggml_type, block_size, type_size = _geometry(info.type_id)
        if shape[-1] % block_size:
            raise ValueError(f"rows of {shape[-1]} in {name!r} are no multiple of {block_size}")
        n_bytes = prod(shape) // block_size * type_size
        start = data_start + info.offset
        if start + n_bytes > size:
            raise ValueError(f"the data of {name!r} would end at byte {start + n_bytes} of {size}")
        tensors[name] = EncodedTensor(path, name, shape, ggml_type, start, n_bytes)
    in_order = sorted(tensors.values(), key=lambda tensor: tensor.offset)
    for before, tensor in pairwise(in_order):
        if before.offset + before.n_bytes > tensor.offset:
            raise ValueError(f"the data of {tensor.name!r} overlaps that of {before.name!r}")
    return tuple(tensors.values())


def _alignment(fields: Mapping[str, GgufField]) -> int:
    field = fields.get(Keys.General.ALIGNMENT)
    if field is None:
        return GGUF_DEFAULT_ALIGNMENT
    alignment = field.contents()
    if field.value_type is not GGUFValueType.UINT32 or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {alignment!r}, and must be a power of two")
    return int(alignment)


def _geometry(type_id: int) -> tuple[IntEnum, int, int]:
    """The type of that id with its block size and bytes; ValueError for an unknown one."""
    if type_id in list(NewerType):
        block_format = _codec(NewerType(type_id))
        return block_format.ggml_type, block_format.block_size, block_format.type_size
    ggml_type = GGMLQuantizationType(type_id)
    return ggml_type, *GGML_QUANT_SIZES[ggml_type]


def _codec(ggml_type: IntEnum) -> BlockFormat:
    """Our own codec; the registry brings the compiler, which reading a file's header can do without."""
    from bitwright.formats.registry import get_format

    return get_format(ggml_type.name)


def read_gguf(path: Path) -> GgufFile:
    """A GGUF file. Raises ConvertError when it is missing, no little-endian GGUF, cut short, or names data outside of
    itself."""
    with open_regular(path, "name a readable GGUF file") as file:
        try:
            fields, infos, end = read_header(file)
            alignment, size = _alignment(fields), os.fstat(file.fileno()).st_size
            tensors = _tensors(path, infos, -(-end // alignment) * alignment, size)
        except BigEndian:
            raise ConvertError(
                "the file is big-endian, and little-endian ones are read",
                str(path),
                f"turn a copy of it round: gguf-convert-endian {path} little",
            ) from None
        except (OSError, ValueError, struct.error) as error:
            raise ConvertError(
                f"this is no complete GGUF file: {error}", str(path), "fetch or write the file again"
            ) from None
    return GgufFile(path, fields, tensors)
