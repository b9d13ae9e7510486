"""What a block format is: a name, a block's geometry, and a codec."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np

from bitwright.formats.choices import Effort
from bitwright.formats.parts import PointBlocks, ScalarBlocks, ScalarParts


class NewerType(IntEnum):
    """Tensor types of ggml that the gguf package's GGMLQuantizationType does not list yet, by ggml's ids."""

    Q2_0 = 42


class Encode(Protocol):
    """rows: float32 [n_rows, n_columns], C-contiguous, n_columns % block_size == 0, finite.
    importance: float32 [n_columns], finite and non-negative, or None for uniform importance.
    Returns uint8 [n_rows, n_columns // block_size * type_size]. The bytes of a row depend on that row, the importance
    and the effort alone: never on threads, on the other rows, or on how rows are cut into calls."""

    def __call__(
        self, rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best"
    ) -> np.ndarray: ...


Search = Callable[[np.ndarray, np.ndarray | None, Effort, ScalarBlocks], ScalarParts]
"""Rows, importance and effort as Encode takes them, and the format's blocks; to the parts of the rows' blocks."""


@dataclass(frozen=True)
class BlockFormat:
    """One ggml tensor type.

    ggml_type: its id, a member of gguf's GGMLQuantizationType or of NewerType; `name` is ggml's name for it ("Q4_K").
    block_size: weights in a block; type_size: bytes of a block.
    encode, decode: the codec; decode maps uint8 [n_rows, row_bytes] to float32 [n_rows, n_columns].
    needs_importance: the format is so coarse that encoding without an importance matrix is refused.
    tensor_scale: for a format with a second-level scale a matrix, the scale that suits the largest magnitude of its
        weights; `encode` takes it as the keyword tensor_scale, and `decode` leaves it out.
    blocks: how its blocks come apart, for what re-chooses codes under the scales that an encoder found; None for plain
        numbers.
    """

    ggml_type: IntEnum
    block_size: int
    type_size: int
    encode: Encode
    decode: Callable[[np.ndarray], np.ndarray]
    needs_importance: bool = False
    tensor_scale: Callable[[float], float] | None = None
    blocks: ScalarBlocks | PointBlocks | None = None

    @property
    def name(self) -> str:
        return self.ggml_type.name

    @property
    def bits_per_weight(self) -> float:
        return self.type_size * 8 / self.block_size

    def fits(self, n_columns: int) -> bool:
        return n_columns % self.block_size == 0

    def row_bytes(self, n_columns: int) -> int:
        """Bytes of a row of n_columns weights; n_columns must be a multiple of block_size."""
        if not self.fits(n_columns):
            raise ValueError(f"{n_columns} columns are no multiple of {self.name}'s block of {self.block_size}")
        return n_columns // self.block_size * self.type_size


def scalar_format(ggml_type: IntEnum, blocks: ScalarBlocks, search: Search) -> BlockFormat:
    """A format of scaled levels, whose encoder packs what `search` chooses."""

    def encode(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
        return blocks.pack(search(rows, importance, effort, blocks)).reshape(len(rows), -1)

    return BlockFormat(ggml_type, blocks.block_size, blocks.type_size, encode, blocks.decode, blocks=blocks)
