"""Exact products of INT8 matrices, and the arithmetic of a W8A8 layer around them: what integer hardware computes.

    y[i, j] = x_scale[i] * w_scale[j] * sum over l of (x[i, l] - x_zero_point[i]) * w[j, l]

The sum is an exact int32. It is added up from products of float32 matrices of at most 1024 columns: 1024 products of
magnitude 2**14 at most are integers up to 2**24, which float32 holds without rounding in whatever order they are added,
and a BLAS multiplies floats faster than a compiler's loop multiplies bytes. calibration/stream/device/int8_products.py
does the same on a GPU. Runtimes on CPUs without VNNI instructions
saturate pairs of products at 16 bits instead; those errors belong to the runtime, not to the artifact.
"""

from dataclasses import dataclass

import numpy as np

EXACT_COLUMNS = 1024
MOST_COLUMNS = (1 << 17) - 1
"""Of more columns a sum of 2**14 each may leave int32."""
_BLOCK_ROWS = 2048

# The step of values up to the largest one: compressed-tensors divides it by half of the range -128 .. 127, vLLM by 127.
HALF_RANGE = 127.5
# In the place of a scale of zero, that of a row of zeros.
LEAST_SCALE = 2.0**-7


@dataclass(frozen=True)
class QuantizedActivations:
    """codes: int8 [n_tokens, n_columns]; scales: float32 [n_tokens, 1]; zero_points: int32 [n_tokens, 1], or None where
    they are symmetric. A value is scale * (code - zero point)."""

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None = None

    def dequantize(self) -> np.ndarray:
        codes = self.codes if self.zero_points is None else self.codes - self.zero_points
        values: np.ndarray = codes.astype(np.float32) * self.scales
        return values


def int8_matmul(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x @ weight.T, exactly: int8 [m, k] and int8 [n, k] to int32 [m, n].

    Raises ValueError for other dtypes or shapes, and for more than MOST_COLUMNS columns.
    """
    if (
        x.dtype != np.int8
        or weight.dtype != np.int8
        or x.ndim != 2
        or weight.ndim != 2
        or x.shape[1] != weight.shape[1]
    ):
        raise ValueError(
            f"int8 [m, k] and int8 [n, k] are needed, not {x.dtype} {x.shape}, {weight.dtype} {weight.shape}"
        )
    if x.shape[1] > MOST_COLUMNS:
        raise ValueError(f"a sum of {x.shape[1]} products may leave int32: at most {MOST_COLUMNS}")
    sums = np.zeros((len(x), len(weight)), np.int32)
    for first in range(0, x.shape[1], EXACT_COLUMNS):
        columns = slice(first, first + EXACT_COLUMNS)
        floats = x[:, columns].astype(np.float32)
        for start in range(0, len(weight), _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            sums[:, block] += (floats @ weight[block, columns].astype(np.float32).T).astype(np.int32)
    return sums


def quantize_per_token(x: np.ndarray, symmetric: bool = True, half_range: float = HALF_RANGE) -> QuantizedActivations:
    """Every row of x, float32 [n_tokens, n_columns], with a scale of its own, as a runtime does with dynamic scales.

    half_range: what the largest magnitude is divided by; symmetric only. Rows of zeros stay zeros.
    Raises ValueError for values that are not finite: no scale would hold them.
    """
    high = np.maximum(x.max(axis=1, keepdims=True, initial=0), 0)
    low = np.minimum(x.min(axis=1, keepdims=True, initial=0), 0)
    if not (np.isfinite(high).all() and np.isfinite(low).all()):
        raise ValueError("an activation is not a finite number")
    if symmetric:
        scales = _positive(np.maximum(high, -low) / np.float32(half_range))
        return quantize(x, scales)
    scales = _positive((high - low) / np.float32(255))
    zero_points = np.clip(np.rint(-128 - low / scales), -128, 127).astype(np.int32)
    return quantize(x, scales, zero_points)


def quantize(x: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None = None) -> QuantizedActivations:
    """With scales, float32, and zero points, int32, that broadcast to [n_tokens, 1]; values beyond are cut off."""
    scaled = x / scales
    if zero_points is not None:
        scaled += zero_points
    codes = np.clip(np.rint(scaled), -128, 127).astype(np.int8)
    shape = (len(x), 1)
    points = None if zero_points is None else np.broadcast_to(np.asarray(zero_points, np.int32), shape)
    return QuantizedActivations(codes, np.broadcast_to(np.asarray(scales, np.float32), shape), points)


def int8_linear(
    x: QuantizedActivations, weight: np.ndarray, weight_scales: np.ndarray, bias: np.ndarray | None = None
) -> np.ndarray:
    """A linear layer: weight int8 [n, k], its scales float32 [n] or [n, 1], bias float32 [n]; float32 [n_tokens, n]."""
    sums: np.ndarray = int8_matmul(x.codes, weight)
    if x.zero_points is not None:
        # Codes less their zero point have nine bits: with many columns int32 could not hold their sums.
        sums = sums - x.zero_points.astype(np.int64) * weight.sum(axis=1, dtype=np.int64)
    y: np.ndarray = sums.astype(np.float32) * x.scales
    y *= weight_scales.reshape(-1)
    if bias is not None:
        y += bias
    return y


def _positive(scales: np.ndarray) -> np.ndarray:
    return np.where(scales == 0, np.float32(LEAST_SCALE), scales).astype(np.float32)
