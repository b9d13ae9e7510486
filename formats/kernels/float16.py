"""The two 16-bit floats in kernels: float16 by rounding of float32, bfloat16 by its bits."""

import math

import numpy as np

from bitwright.formats.compiler import Real, jit

F16_MAX, F16_MIN_NORMAL = np.float32(65504), np.float32(2**-14)
NEGLIGIBLE = np.float32(1e-30)
"""A block without a weight beyond this is zero in every format: less than 1e-20 of the least float16."""


@jit
def round_f16(value: Real) -> Real:
    """The nearest float16, as float32; beyond the range of float16 the largest one."""
    value = min(max(value, -F16_MAX), F16_MAX)
    split = value * np.float32(2**13 + 1)  # Veltkamp: leaves the upper 24 - 13 bits
    # Subnormals are multiples of 2**-24, which is the spacing of float32 in [0.5, 1).
    shift = np.float32(0.75) if value >= np.float32(0) else np.float32(-0.75)
    return (value + shift) - shift if abs(value) < F16_MIN_NORMAL else split - (split - value)


@jit
def f16_step(value: Real) -> Real:
    """What leads from a float16 to the next one when it is added and rounded: between half of the spacing and one and a
    half of it, whatever the fraction."""
    return max(abs(value) * np.float32(1.3 * 2**-11), np.float32(2**-24))


@jit
def next_f16(value: Real, step: Real) -> Real:
    """The float16 `step` (-1, 0 or 1) places further from zero."""
    distance = step * f16_step(value)
    return round_f16(value + distance if value > np.float32(0) else value - distance)


@jit
def power_of_two(largest: Real) -> int:
    """The exponent that brings weights up to `largest` near one, so that squares stay inside float32."""
    return max(-100, math.frexp(largest)[1] - 1)


@jit
def bf16_value(bits: np.int32) -> Real:
    """The bfloat16 of these bits, as float32."""
    return np.int32(bits << np.int32(16)).view(np.float32)


@jit
def bf16_bits_above(value: Real) -> np.int32:
    """The bits of the least bfloat16 that is not below a positive value."""
    return (np.float32(value).view(np.int32) + np.int32(0xFFFF)) >> np.int32(16)
