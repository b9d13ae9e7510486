"""Matrices of levels times scales: FP8, integers, ternary, and FP4 of both kinds.

weight = (level - zero point) * scale        and, of NVFP4, times the scale of the tensor
"""

from dataclasses import dataclass

import numpy as np

from bitwright.formats.files.stored_tensor import StoredTensor, to_float32
from bitwright.formats.quantized.decoded_tensor import ByRows, unusable
from bitwright.formats.quantized.grids import Grid
from bitwright.formats.quantized.levels import Levels


@dataclass(frozen=True)
class ScaledLevels(ByRows):
    """width: columns that share a scale. zeros: None for levels around zero. groups: I32 [n_columns], the block whose
    scale a column has; None where they follow each other."""

    kind: str
    levels: Levels
    scales: Grid
    width: int
    zeros: Grid | None = None
    groups: StoredTensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.levels.shape

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        others = [grid.tensor for grid in (self.scales, self.zeros) if grid is not None]
        return (self.levels.tensor, *others, *([self.groups] if self.groups is not None else []))

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        values = self.levels.rows(name, start, stop)
        scales = self.scales.rows(name, start, stop)
        if self.zeros is not None:
            self._spread(name, values, self.zeros.rows(name, start, stop), np.subtract)
        self._spread(name, values, scales, np.multiply)
        return values

    def _spread(self, name: str, values: np.ndarray, blocks: np.ndarray, operation: np.ufunc) -> None:
        """values, [n, n_columns], become operation(values, what of blocks [n, blocks of a row] is a column's)."""
        n_columns = values.shape[1]
        if self.groups is not None:
            operation(values, blocks[:, self._group_indices(name, blocks.shape[1])], out=values)
        elif blocks.shape[1] == 1 or n_columns % self.width == 0:
            parts = values.reshape(len(values), blocks.shape[1], -1)
            operation(parts, blocks[..., None], out=parts)
        else:
            operation(values, np.repeat(blocks, self.width, axis=1)[:, :n_columns], out=values)

    def _group_indices(self, name: str, n_blocks: int) -> np.ndarray:
        assert self.groups is not None
        indices = self.groups.read(name)
        if indices.min(initial=0) < 0 or indices.max(initial=0) >= n_blocks:
            raise unusable(f"the columns of {name!r} name scales that are not stored (g_idx)", name, self.groups)
        return indices


@dataclass(frozen=True)
class OneScale(ByRows):
    """Levels times a scale of the tensor, which is divided by where `divides`: bitnet's ternary matrices."""

    kind: str
    levels: Levels
    scale: StoredTensor
    divides: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.levels.shape

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return self.levels.tensor, self.scale

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.levels.rows(name, start, stop) * np.float32(self.tensor_scale(name))

    def tensor_scale(self, name: str) -> float:
        value = _scalar(name, self.scale)
        return float(1 / value) if self.divides else float(value)


@dataclass(frozen=True)
class Nvfp4(ByRows):
    """FP4 in blocks of 16 whose scales are E4M3, times a scale of the tensor, by which is divided where `divides`.

    The product of level and block scale is exact: the second scale multiplies it last, as a runtime of GGUF does.
    """

    kind: str
    blocks: ScaledLevels
    scale: StoredTensor
    divides: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.blocks.shape

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return (*self.blocks.stored, self.scale)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.blocks.rows(name, start, stop) * np.float32(self.tensor_scale(name))

    def tensor_scale(self, name: str) -> float:
        value = _scalar(name, self.scale)
        return float(np.float32(1) / value) if self.divides else float(value)

    def divisor(self, name: str) -> float:
        value = _scalar(name, self.scale)
        return float(value) if self.divides else float(np.float32(1) / value)


def _scalar(name: str, tensor: StoredTensor) -> np.float32:
    """The only value of a tensor. Raises ConvertError for one that is no positive number."""
    value: np.float32 = to_float32(tensor.read(name), tensor.dtype).reshape(-1)[0]
    if not 0 < value < np.inf:
        raise unusable(f"the scale of {name!r} is {value:g}", name, tensor)
    return value
