"""The header of a GGUF file, read by the file's size and not by what the file says of itself.

    "GGUF" | uint32 version | uint64 tensors | uint64 key-values
    key-value    string key | uint32 type | value
    tensor info  string name | uint32 dimensions | uint64 each, fastest first | uint32 type | uint64 offset of its data
    string       uint64 bytes | UTF-8
    array        uint32 type of the items | uint64 items | the items

No count is believed that the bytes left in the file cannot hold, so that no file makes a reader work or allocate beyond
its own size, and no array holds arrays. Arrays of numbers stay as they are stored, and texts undecoded, until somebody
asks for them.
"""

import os
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGUFValueType

NUMBER_DTYPES = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
_LENGTH_BYTES = 8
_VERSIONS = (2, 3)
# llama.cpp's own limits: GGML_MAX_DIMS, and GGML_MAX_NAME without its end.
_MOST_DIMENSIONS, _LONGEST_NAME = 4, 63
# A key's length, the type, and one byte.
_LEAST_FIELD_BYTES = 8 + 4 + 1


def tensor_info_bytes(name: str, n_dimensions: int) -> int:
    """What the header says of a tensor, in bytes: name with length, dimensions with their number, type, offset."""
    return 8 + len(name.encode()) + 4 + 8 * n_dimensions + 4 + 8


@dataclass(frozen=True, eq=False)
class GgufField:
    """A value of the header. item_type: of an array's items, None for anything else. stored: a number or truth value
    as an array of one, a text as bytes, an array of numbers as such, one of texts as a list of bytes."""

    value_type: GGUFValueType
    item_type: GGUFValueType | None
    stored: Any

    @property
    def is_array(self) -> bool:
        return self.value_type is GGUFValueType.ARRAY

    @property
    def size(self) -> int:
        """Items of an array, bytes of a text; 1 of a number."""
        return len(self.stored)

    def contents(self) -> Any:
        """The value in Python's types. Raises UnicodeDecodeError for a text that is no UTF-8."""
        if self.value_type is GGUFValueType.STRING:
            return self.stored.decode("utf-8")
        if not self.is_array:
            return self.stored.tolist()[0]
        if self.item_type is GGUFValueType.STRING:
            return [text.decode("utf-8") for text in self.stored]
        return self.stored.tolist()


class BigEndian(ValueError):
    """The file is sound, for all that is known, and its bytes are the other way round."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header describes it. shape: slowest dimension first; offset: from the beginning of the data."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


def read_header(file: BinaryIO) -> tuple[dict[str, GgufField], list[TensorInfo], int]:
    """The key-values by key, the tensors, and the byte where the header ends.

    Raises BigEndian, or another ValueError that says what is wrong, for anything but a whole little-endian header of
    version 2 or 3.
    """
    source = _Source(file)
    if source.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = source.number("<I")
    if version not in _VERSIONS:
        # A small number with its bytes the other way round.
        if version & 0xFFFF == 0:
            raise BigEndian
        raise ValueError(f"it is of version {version}, and versions 2 and 3 are read")
    n_tensors, n_fields = source.number("<Q"), source.number("<Q")
    source.expect(n_fields, _LEAST_FIELD_BYTES, "key-values")
    fields: dict[str, GgufField] = {}
    for _ in range(n_fields):
        key = source.text(source.left, "a key")
        if key in fields:
            raise ValueError(f"the key {key!r} is there twice")
        fields[key] = _read_field(source, _value_type(source.number("<I"), key), key)
    source.expect(n_tensors, tensor_info_bytes("", 1), "tensors")
    infos = [_read_info(source) for _ in range(n_tensors)]
    return fields, infos, source.position


class _Source:
    """Bytes of a file in order, none beyond its end."""

    def __init__(self, file: BinaryIO):
        self.file, self.position = file, 0
        self.size = os.fstat(file.fileno()).st_size

    @property
    def left(self) -> int:
        return self.size - self.position

    def expect(self, count: int, item_bytes: int, what: str) -> None:
        if count * item_bytes > self.left:
            raise ValueError(f"it announces {count} {what} at byte {self.position}, and ends at byte {self.size}")

    def take(self, n_bytes: int) -> bytes:
        self.expect(n_bytes, 1, "bytes")
        data = self.file.read(n_bytes)
        self.position += n_bytes
        if len(data) != n_bytes:
            raise ValueError(f"it ends before byte {self.position}")
        return data

    def number(self, code: str) -> int:
        (number,) = struct.unpack(code, self.take(struct.calcsize(code)))
        return int(number)

    def text(self, longest: int, what: str) -> str:
        n_bytes = self.number("<Q")
        if n_bytes > longest:
            raise ValueError(f"it announces {what} of {n_bytes} bytes at byte {self.position}")
        return self.take(n_bytes).decode("utf-8")

    def texts(self, count: int) -> list[bytes]:
        """Vocabularies have hundreds of thousands: this loop decides how long a header takes."""
        self.expect(count, _LENGTH_BYTES, "texts")
        read, unpack, found = self.file.read, struct.Struct("<Q").unpack, []
        for _ in range(count):
            self.position += _LENGTH_BYTES
            (n_bytes,) = unpack(read(_LENGTH_BYTES))
            if n_bytes > self.left:
                raise ValueError(f"it announces a text of {n_bytes} bytes at byte {self.position}")
            self.position += n_bytes
            found.append(read(n_bytes))
        return found


def _value_type(number: int, key: str) -> GGUFValueType:
    try:
        return GGUFValueType(number)
    except ValueError:
        raise ValueError(f"the value of {key!r} is of an unknown type {number}") from None


def _read_field(source: _Source, value_type: GGUFValueType, key: str) -> GgufField:
    if value_type is GGUFValueType.STRING:
        return GgufField(value_type, None, source.take(source.number("<Q")))
    if value_type is not GGUFValueType.ARRAY:
        return GgufField(value_type, None, _numbers(source, value_type, 1))
    item_type, count = _value_type(source.number("<I"), key), source.number("<Q")
    if item_type is GGUFValueType.ARRAY:
        raise ValueError(f"the value of {key!r} is an array of arrays, which llama.cpp does not read")
    items = source.texts(count) if item_type is GGUFValueType.STRING else _numbers(source, item_type, count)
    return GgufField(value_type, item_type, items)


def _numbers(source: _Source, value_type: GGUFValueType, count: int) -> np.ndarray:
    dtype = np.dtype(NUMBER_DTYPES[value_type])
    source.expect(count, dtype.itemsize, "values")
    values = np.frombuffer(source.take(count * dtype.itemsize), dtype)
    if value_type is GGUFValueType.BOOL and (values.view("u1") > 1).any():
        raise ValueError(f"a truth value before byte {source.position} is neither 0 nor 1")
    return values


def _read_info(source: _Source) -> TensorInfo:
    name = source.text(_LONGEST_NAME, "a tensor's name")
    n_dimensions = source.number("<I")
    if not 1 <= n_dimensions <= _MOST_DIMENSIONS:
        raise ValueError(f"the tensor {name!r} has {n_dimensions} dimensions")
    dimensions = struct.unpack(f"<{n_dimensions}Q", source.take(8 * n_dimensions))
    return TensorInfo(name, dimensions[::-1], source.number("<I"), source.number("<Q"))
