"""Bit fields that several IQ formats have in common."""

import numpy as np

# A byte with an even number of bits set is known by its lower seven.
EVEN_BYTES = np.array([seven | (seven.bit_count() & 1) << 7 for seven in range(128)], np.uint8)
_SIGN_SHIFTS = 7 * np.arange(4, dtype=np.uint32)


def pack_half(d: np.ndarray) -> np.ndarray:
    """float32 [n], to float16 as uint8 [n, 2]."""
    return d.astype("<f2").view(np.uint8).reshape(-1, 2)


def unpack_half(data: np.ndarray) -> np.ndarray:
    """The inverse of pack_half, float32 [n, 1]."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 [n, 2 m] to [n, m]; of two neighbours the first goes into the low nibble."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpack_nibbles(data: np.ndarray) -> np.ndarray:
    return np.stack([data & 15, data >> 4], axis=2).reshape(len(data), -1)


def pack_signs_and_scales(signs: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Even sign bytes uint8 [n, 4 m] and 4-bit scales uint8 [n, m] to little endian words uint32 [n, m].

    Signs k of a sub-block are at bits 7 k .. 7 k + 6, its scale at bits 28 .. 31.
    """
    sevens = (signs & 127).reshape(len(signs), -1, 4).astype(np.uint32) << _SIGN_SHIFTS
    return (np.bitwise_or.reduce(sevens, axis=2) | scales.astype(np.uint32) << 28).astype("<u4")


def unpack_signs_and_scales(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of pack_signs_and_scales."""
    sevens = words[:, :, None] >> _SIGN_SHIFTS & 127
    return EVEN_BYTES[sevens].reshape(len(words), -1), (words >> 28).astype(np.uint8)


def decode_points(scales: np.ndarray, points: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Weights float32 [n_blocks, 256] = scale * point * sign.

    scales: float32 [n_blocks, n_sub]; points: [n_blocks, n_groups, n_dims]; signs: uint8 [n_blocks, 32], a bit each.
    """
    magnitudes = points.reshape(len(scales), scales.shape[1], -1)
    negative = np.unpackbits(signs, axis=1, bitorder="little").reshape(magnitudes.shape)
    return (scales[:, :, None] * magnitudes * np.where(negative, np.float32(-1), np.float32(1))).reshape(-1, 256)
