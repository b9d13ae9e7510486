"""bfloat16, the upper half of a float32, which numpy does not have: its bits are uint16."""

import numpy as np

from formats.plain import decode_bf16

EPSILON_BITS = np.uint16(0x3C00)
"""What compressed-tensors stores for a scale of zero: runtimes divide by scales."""


def bfloat16(bits: np.ndarray) -> np.ndarray:
    """The values of bits, uint16 to float32."""
    return decode_bf16(np.ascontiguousarray(bits).view(np.uint8)).reshape(bits.shape)


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, ties to even, of finite float32 values, uint16."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def bfloat16_bits_above(values: np.ndarray) -> np.ndarray:
    """The bits of the least bfloat16 that is not below, of finite positive float32 values, uint16."""
    return ((values.view(np.uint32) + 0xFFFF) >> 16).astype(np.uint16)
