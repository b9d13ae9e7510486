"""bfloat16, the upper half of a float32, which numpy does not have: its bits are uint16."""

import numpy as np

EPSILON_BITS = np.uint16(0x3C00)
"""What compressed-tensors stores for a scale of zero: runtimes divide by scales."""


def bfloat16(bits: np.ndarray) -> np.ndarray:
    """The values of bits, uint16 to float32 of the same shape."""
    upper = bits.astype(np.uint32)
    upper <<= 16
    return upper.view(np.float32)


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, ties to even, of finite float32 values: uint16 of the same shape."""
    bits = values.view(np.uint32)
    # Adding 0x7FFF plus the lowest kept bit rounds to nearest, ties to even.
    rounded: np.ndarray = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return rounded.astype(np.uint16)


def nearest_bfloat16(values: np.ndarray) -> np.ndarray:
    """The nearest bfloat16, ties to even, of finite float32 values: float32 of the same shape."""
    return bfloat16(bfloat16_bits(values))


def bfloat16_bits_above(values: np.ndarray) -> np.ndarray:
    """The bits of the least bfloat16 that is not below, of finite positive float32 values: uint16 of the same shape."""
    above: np.ndarray = (values.view(np.uint32) + 0xFFFF) >> 16
    return above.astype(np.uint16)
