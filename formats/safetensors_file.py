"""Writing a safetensors file of which nothing is in memory but the tensor that is being written.

    header's length, 8 bytes little endian | header, JSON padded with blanks to 8 bytes | the tensors without gaps

Names, dtypes and shapes are known before the first byte, so the file's size and every tensor's place are, and tensors
may come in any order. In the file they stand as the safetensors library itself would put them: the widest dtypes first,
which keeps all of them aligned (readers map them and refuse others), then by name. Same tensors, same bytes.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from formats.errors import ConvertError
from formats.whole_file import whole_file

NUMPY_DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "F8_E4M3": np.dtype("u1"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
}
"""What holds a tensor of safetensors' dtype here, in the library's order; of dtypes that numpy lacks, the bits."""


@dataclass(frozen=True)
class TensorSpan:
    """A tensor of the file: dtype as safetensors names it; offset: of its data from the file's start, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * NUMPY_DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class SafetensorsLayout:
    """One file, known to the byte. tensors: in the file's order."""

    header: bytes
    tensors: Mapping[str, TensorSpan]

    @property
    def n_bytes(self) -> int:
        return len(self.header) + sum(span.n_bytes for span in self.tensors.values())


def lay_out(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
    *,
    sort: bool = True,
) -> SafetensorsLayout:
    """The layout of a file with these tensors, by name: dtype and shape.

    sort: in the library's order; otherwise as they come.
    Raises ConvertError for a dtype that cannot be written.
    """
    widths = {name: position for position, name in enumerate(NUMPY_DTYPES)}
    for name, (dtype, _) in tensors.items():
        if dtype not in widths:
            raise ConvertError(
                f"tensors of dtype {dtype} cannot be written", f"tensor {name}", f"use one of {', '.join(widths)}"
            )
    ordered = [*tensors.items()]
    if sort:
        ordered.sort(key=lambda item: (-widths[item[1][0]], item[0].encode()))
    header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    ends, position = {}, 0
    for name, (dtype, shape) in ordered:
        end = position + prod(shape) * NUMPY_DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        ends[name], position = position, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data_start = 8 + len(text)
    spans = {name: TensorSpan(dtype, tuple(shape), data_start + ends[name]) for name, (dtype, shape) in ordered}
    return SafetensorsLayout(len(text).to_bytes(8, "little") + text, spans)


class SafetensorsWriter:
    """Takes the tensors of a layout, each once, in any order."""

    def __init__(self, file: BinaryIO, layout: SafetensorsLayout):
        self._file, self._layout = file, layout
        self.missing = set(layout.tensors)
        file.write(layout.header)

    def write(self, name: str, data: np.ndarray | Iterable[np.ndarray]) -> None:
        """A tensor, whole or as consecutive parts of its rows; arrays have NUMPY_DTYPES' dtype.

        Raises ValueError for a name, dtype or number of values that the layout does not have, or one written before.
        """
        if name not in self.missing:
            raise ValueError(f"{name} is no tensor of this file, or written already")
        span = self._layout.tensors[name]
        self._file.seek(span.offset)
        n_bytes = 0
        for part in [data] if isinstance(data, np.ndarray) else data:
            if part.dtype != NUMPY_DTYPES[span.dtype]:
                raise ValueError(f"{name} is {span.dtype}, and {part.dtype} came")
            n_bytes += part.nbytes
            if n_bytes > span.n_bytes:
                raise ValueError(f"{name} has {span.n_bytes} bytes, and more came")
            self._file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        if n_bytes != span.n_bytes:
            raise ValueError(f"{name} has {span.n_bytes} bytes, and {n_bytes} came")
        self.missing.remove(name)


@contextmanager
def write_safetensors(path: Path, layout: SafetensorsLayout) -> Iterator[SafetensorsWriter]:
    """A file that takes its name when every tensor has been written; until then an old one stays.

    Raises ConvertError when the disk is full or the file cannot be written, ValueError when a tensor is missing.
    """
    with whole_file(path, "weights file") as file:
        writer = SafetensorsWriter(file, layout)
        yield writer
        if writer.missing:
            raise ValueError(f"never written: {', '.join(sorted(writer.missing))}")
