"""The range of a static activation scale: what lies beyond it is cut off, what lies within is rounded more coarsely the
wider it is."""

from typing import Literal

import numpy as np

from bitwright.calibration.choices import DEFAULT_METHOD, RangeMethod
from bitwright.calibration.statistics.activations import MatrixInputs
from bitwright.calibration.statistics.histogram import CENTERS, magnitudes, quantile

Grid = Literal["int8", "fp8"]

DEFAULT_PERCENTILE = 99.9

# Ranges that `mse` tries: the whole one and what is smaller, in steps of an eighth of an octave.
_TRIED = np.exp2(-np.arange(8 * 12 + 1) / 8)
_E4M3_LARGEST, _E4M3_LEAST_EXPONENT, _E4M3_MANTISSA_BITS = 448.0, -6, 3


def static_range(
    inputs: MatrixInputs,
    matrix: int = 0,
    method: RangeMethod = DEFAULT_METHOD,
    *,
    grid: Grid = "int8",
    symmetric: bool = True,
    percentile: float = DEFAULT_PERCENTILE,
) -> tuple[float, float]:
    """(low, high) of the inputs of one of a tensor's matrices; of one that no token reached, or none of those
    that the histogram counts, of all together.

    absmax: everything that was seen. average: the range of a micro-batch, exponentially smoothed over all of them.
    percentile: what that share of all values does not leave. mse: the part of absmax's range with the least mean
    squared error of rounding and cutting off, by the histogram, on this grid. symmetric: both ends equally far from
    zero.
    """
    if not inputs.values[matrix].any():
        inputs, matrix = inputs.together(), 0
    low, high = float(inputs.minima[matrix].min()), float(inputs.maxima[matrix].max())
    if method == "average":
        low, high = (float(end) for end in inputs.ranges[matrix])
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    if method == "percentile":
        return _percentile(inputs.values[matrix], percentile / 100, low, high, symmetric)
    if method == "mse" and high > low:
        part = best_part(inputs.values[matrix], low, high, grid)
        return low * part, high * part
    return low, high


def best_part(counts: np.ndarray, low: float, high: float, grid: Grid = "int8") -> float:
    """The part of a range with the least range_error."""
    errors = [range_error(counts, low * part, high * part, grid) for part in _TRIED]
    return float(_TRIED[int(np.argmin(errors))])


def range_error(counts: np.ndarray, low: float, high: float, grid: Grid = "int8") -> float:
    """The mean squared error, by the histogram, of values that are cut off at low and high and rounded to the grid
    between. A value below half a step becomes zero; others are taken to lie anywhere between two steps."""
    total = counts.sum()
    if not total:
        return 0.0
    beyond = np.maximum(low - CENTERS, 0) + np.maximum(CENTERS - high, 0)
    sizes = np.minimum(np.abs(CENTERS), max(-low, high))
    steps = np.full_like(sizes, (high - low) / 255)
    if grid == "fp8":
        scale = max(-low, high) / _E4M3_LARGEST
        exponents = np.floor(np.log2(np.maximum(sizes / scale, 2.0**_E4M3_LEAST_EXPONENT)))
        steps = scale * np.exp2(exponents - _E4M3_MANTISSA_BITS)
    rounding = np.where(sizes < steps / 2, np.square(sizes), np.square(steps) / 12)
    return float(counts @ np.where(beyond > 0, np.square(beyond), rounding) / total)


def _percentile(counts: np.ndarray, share: float, low: float, high: float, symmetric: bool) -> tuple[float, float]:
    if symmetric:
        end = min(quantile(magnitudes(counts), share), high)
        return -end, end
    outside = (1 - share) / 2
    return max(quantile(counts, outside), low), min(quantile(counts, 1 - outside), high)
