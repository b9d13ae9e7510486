"""GGUF files: the exact layout before a byte is written, and a reader that distrusts what it reads.

    header | key-values | tensor infos | padding to 32 | data of tensor 0 | padding to 32 | data of tensor 1 | ...

The header comes from the `gguf` package's own writer; only the tensor data is streamed by this project, so that no
tensor has to be whole in memory and the size is known in advance.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import cast

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFReader, GGUFWriter, Keys
from gguf.constants import GGUFValueType
from gguf.gguf_writer import SHARD_NAME_FORMAT, GGUFValue
from gguf.quants import dequantize

from formats.errors import ConvertError


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


def _render_header(metadata: Mapping[str, GGUFValue], tensors: Sequence[TensorEntry]) -> bytes:
    architecture = metadata[Keys.General.ARCHITECTURE].value if Keys.General.ARCHITECTURE in metadata else ""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "header"
        writer = GGUFWriter(path, architecture)
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
    """The layout of a model in one file, or in shards of at most shard_bytes of tensor data each.

    Shards carry llama.cpp's split.* keys and its names (STEM-00001-of-00003.gguf); only the first describes the model.
    A tensor larger than shard_bytes has a shard of its own.
    """
    shards: list[list[TensorEntry]] = [[]]
    filled = 0
    for tensor in tensors:
        if shard_bytes and shards[-1] and filled + tensor.n_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.n_bytes
    if len(shards) == 1:
        return [_lay_out(file_name, metadata, tensors)]
    stem = file_name.removesuffix(".gguf")
    layouts = []
    for i, shard in enumerate(shards):
        split = {
            Keys.Split.LLM_KV_SPLIT_NO: GGUFValue(i, GGUFValueType.UINT16),
            Keys.Split.LLM_KV_SPLIT_COUNT: GGUFValue(len(shards), GGUFValueType.UINT16),
            Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT: GGUFValue(len(tensors), GGUFValueType.INT32),
        }
        name = SHARD_NAME_FORMAT.format(stem, i + 1, len(shards))
        layouts.append(_lay_out(name, {**metadata, **split} if i == 0 else split, shard))
    return layouts


def read_gguf(path: Path) -> GGUFReader:
    """The `gguf` package's reader (memory-mapped), behind the checks that it leaves out.

    Raises ConvertError when the file is missing, is no GGUF, is truncated, or names data outside of itself.
    """
    try:
        size = path.stat().st_size
        reader = GGUFReader(path)
    except OSError as error:
        raise ConvertError(f"the file cannot be read: {error}", str(path), "name a readable GGUF file") from None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeDecodeError, MemoryError) as error:
        raise ConvertError(
            f"this is no complete GGUF file: {error}", str(path), "fetch or write the file again"
        ) from None
    for tensor in reader.tensors:
        end = tensor.data_offset + tensor.n_bytes
        if end > size or tensor.data_offset < 0:
            raise ConvertError(
                f"the tensor's data would end at byte {end}, but the file has {size}",
                f"{path}, tensor {tensor.name}",
                "the file is truncated: fetch or write it again",
            )
    return reader


@dataclass(frozen=True)
class EncodedTensor:
    """A tensor of a GGUF file. shape: slowest dimension first; offset: of its data in the file, in bytes; scales: of
    its matrices, where it has second-level scales."""

    path: Path
    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
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
        """Rows start to stop, decoded by the `gguf` package, times the scale of their matrix: float32
        [stop - start, n_columns]."""
        rows = dequantize(self.read(start, stop), self.ggml_type).reshape(stop - start, self.shape[-1])
        if not self.scales:
            return rows
        matrices = np.arange(start, stop) * len(self.scales) // self.n_rows
        return rows * np.array(self.scales, np.float32)[matrices, None]


def read_tensors(path: Path) -> list[EncodedTensor]:
    """The tensors of a GGUF file; raises ConvertError as read_gguf does."""
    return [
        EncodedTensor(
            path, t.name, tuple(int(n) for n in t.shape[::-1]), t.tensor_type, int(t.data_offset), int(t.n_bytes)
        )
        for t in read_gguf(path).tensors
    ]
