"""Rows of a GGUF tensor in blocks, decoded by our own codec of its type, or by the `gguf` package's."""

from dataclasses import dataclass
from math import prod
from typing import cast

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from bitwright.formats.files.gguf import EncodedTensor
from bitwright.formats.files.stored_tensor import StoredTensor
from bitwright.formats.quantized.decoded_tensor import ByRows


@dataclass(frozen=True)
class GgmlRows(ByRows):
    tensor: EncodedTensor

    @property
    def kind(self) -> str:
        return self.tensor.ggml_type.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        n_rows = prod(self.tensor.shape[:-1])
        bytes_of = (n_rows, self.tensor.n_bytes // n_rows)
        return (StoredTensor("U8", bytes_of, self.tensor.path, self.tensor.offset),)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        from bitwright.formats.registry import FORMATS  # with it comes the compiler

        data = self.encoded(start, stop)
        if self.kind in FORMATS:
            rows = FORMATS[self.kind].decode(data)
        else:
            rows = dequantize(data, cast(GGMLQuantizationType, self.tensor.ggml_type))
        if self.tensor.scales:
            matrices = np.arange(start, stop) * len(self.tensor.scales) // self.tensor.n_rows
            rows = rows.reshape(stop - start, -1) * np.array(self.tensor.scales, np.float32)[matrices, None]
        return rows

    def encoded(self, start: int, stop: int) -> np.ndarray:
        """Rows as they are stored: uint8 [stop - start, row_bytes]."""
        return self.tensor.read(start, stop)
