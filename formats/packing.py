"""Bit fields of blocks: float16, and codes of fewer than eight bits."""

import numpy as np


def pack_half(d: np.ndarray) -> np.ndarray:
    """float32 [n] or [n, m], values of float16, to uint8 [n, 2] or [n, 2 m], little endian."""
    return d.astype("<f2").view(np.uint8).reshape(len(d), -1)


def unpack_half(data: np.ndarray) -> np.ndarray:
    """The inverse of pack_half: uint8 [n, 2 m] to float32 [n, m]."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def pack_bits(codes: np.ndarray, n_bits: int, stride: int = 1) -> np.ndarray:
    """Codes below 2**n_bits, uint8 [n, m], to uint8 [n, m * n_bits / 8]; n_bits: 1, 2 or 4.

    Byte l of each `stride` bytes holds the codes l, stride + l, 2 stride + l .. of theirs, lowest bits first.
    """
    fields = codes.reshape(len(codes), -1, 8 // n_bits, stride)
    packed = fields[:, :, 0].copy()
    for i in range(1, 8 // n_bits):
        packed |= fields[:, :, i] << i * n_bits
    return packed.reshape(len(codes), -1)


def unpack_bits(data: np.ndarray, n_bits: int, stride: int = 1) -> np.ndarray:
    """The inverse of pack_bits: uint8 [n, m] to uint8 [n, m * 8 / n_bits]."""
    groups = data.reshape(len(data), -1, stride)
    codes = np.empty((len(data), groups.shape[1], 8 // n_bits, stride), np.uint8)
    for i in range(8 // n_bits):
        codes[:, :, i] = groups >> i * n_bits & (1 << n_bits) - 1
    return codes.reshape(len(data), -1)
