"""Products of INT8 schemes on a GPU: to the last bit what formats/kernels/int8_matmul.py makes on a CPU.

The host waits for nothing here, so what is not finite raises no error, and makes outputs that are not finite. Divisors
are tensors: with a number CUDA multiplies by its inverse, which rounds otherwise.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from bitwright.formats.kernels.int8_matmul import EXACT_COLUMNS, HALF_RANGE, LEAST_SCALE, MOST_COLUMNS


@dataclass(frozen=True, eq=False)
class Int8Matrix:
    """weights: int8 [n_rows, n_columns]; row_scales: float32 [n_rows]; row_sums: int64 [n_rows], of the weights."""

    weights: torch.Tensor
    row_scales: torch.Tensor
    row_sums: torch.Tensor

    @classmethod
    def on(cls, device: torch.device, weights: np.ndarray, row_scales: np.ndarray) -> Self:
        """Raises ValueError for more than MOST_COLUMNS columns, whose sums may leave int32."""
        if weights.shape[1] > MOST_COLUMNS:
            raise ValueError(f"a sum of {weights.shape[1]} products may leave int32: at most {MOST_COLUMNS}")
        arrays = weights, row_scales.reshape(-1), weights.sum(axis=1, dtype=np.int64)
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))


@dataclass(frozen=True, eq=False)
class Int8Rows:
    """codes: float32 [n_tokens, n_columns], integers from -128 to 127; scales: float32 and zero_points: int32, both
    [n_tokens, 1] or [1], the latter None where they are symmetric."""

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None = None


def quantize_per_token(x: torch.Tensor, symmetric: bool) -> Int8Rows:
    """Every row of x, float32 [n_tokens, n_columns], with a scale of its own."""
    high, low = x.amax(1, keepdim=True).clamp(min=0), x.amin(1, keepdim=True).clamp(max=0)
    if symmetric:
        return quantize(x, _positive(torch.maximum(high, -low) / torch.full_like(high, HALF_RANGE)))
    scales = _positive((high - low) / torch.full_like(high, 255))
    zero_points = torch.round(-128 - low / scales).clamp(-128, 127).to(torch.int32)
    return quantize(x, scales, zero_points)


def quantize(x: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None = None) -> Int8Rows:
    """With scales and zero points as of Int8Rows; values beyond are cut off."""
    scaled = x / scales
    if zero_points is not None:
        scaled += zero_points
    return Int8Rows(torch.round(scaled).clamp(-128, 127), scales, zero_points)


def int8_linear(x: Int8Rows, matrix: Int8Matrix) -> torch.Tensor:
    """float32 [n_tokens, n_rows]."""
    sums = torch.zeros((len(x.codes), len(matrix.weights)), dtype=torch.int32, device=x.codes.device)
    for first in range(0, matrix.weights.shape[1], EXACT_COLUMNS):
        columns = slice(first, first + EXACT_COLUMNS)
        sums += (x.codes[:, columns] @ matrix.weights[:, columns].float().T).to(torch.int32)
    if x.zero_points is not None:
        sums = sums - x.zero_points.long() * matrix.row_sums
    return sums.float() * x.scales * matrix.row_scales


def _positive(scales: torch.Tensor) -> torch.Tensor:
    return torch.where(scales == 0, LEAST_SCALE, scales)
