"""Even signs and scales, packed as IQ2_XXS and IQ3_XXS have them in common."""

import numpy as np

# A byte with an even number of bits set is known by its lower seven.
EVEN_BYTES = np.array([seven | (seven.bit_count() & 1) << 7 for seven in range(128)], np.uint8)
_SIGN_SHIFTS = 7 * np.arange(4, dtype=np.uint32)


def pack_signs_and_scales(signs: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Even sign bytes uint8 [n, 4 m] and 4-bit scales uint8 [n, m] to little endian words uint32 [n, m].

    Signs k of a sub-block are at bits 7 k .. 7 k + 6, its scale at bits 28 .. 31.
    """
    sevens = (signs & 127).reshape(len(signs), -1, 4).astype(np.uint32) << _SIGN_SHIFTS
    words: np.ndarray = np.bitwise_or.reduce(sevens, axis=2) | scales.astype(np.uint32) << 28
    return words.astype("<u4")


def unpack_signs_and_scales(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of pack_signs_and_scales."""
    sevens = words[:, :, None] >> _SIGN_SHIFTS & 127
    return EVEN_BYTES[sevens].reshape(len(words), -1), (words >> 28).astype(np.uint8)
