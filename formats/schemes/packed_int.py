"""The packing of `pack-quantized`: signed codes of n bits as a stream of bits in little-endian int32 words.

A code q is stored as q + 2**(n - 1). Code l of a row occupies the bits n * l .. n * l + n - 1 of the row, and a row
ends with a whole word. n = 4: eight codes a word, the first in the lowest nibble.
"""

import numpy as np


def packed_width(n_codes: int, num_bits: int) -> int:
    """Words of a row."""
    return -(-n_codes * num_bits // 32)


def pack(codes: np.ndarray, num_bits: int) -> np.ndarray:
    """codes: int8 [n_rows, n], in -2**(num_bits - 1) .. 2**(num_bits - 1) - 1. Returns int32 [n_rows, packed_width]."""
    stored = (codes + np.int8(-(1 << num_bits - 1))).view(np.uint8) if num_bits == 8 else codes + (1 << num_bits - 1)
    n_rows, n = codes.shape
    width = packed_width(n, num_bits)
    per_byte = 8 // num_bits if 8 % num_bits == 0 else 0
    if per_byte:
        padded = np.zeros((n_rows, width * 4 * per_byte), np.uint8)
        padded[:, :n] = stored
        lanes = padded.reshape(n_rows, -1, per_byte)
        packed = lanes[..., 0].copy()
        for i in range(1, per_byte):
            packed |= lanes[..., i] << (i * num_bits)
    else:
        bits = np.unpackbits(stored.astype(np.uint8)[..., None], axis=2, count=num_bits, bitorder="little")
        packed = np.packbits(bits.reshape(n_rows, -1), axis=1, bitorder="little")
        packed = np.pad(packed, ((0, 0), (0, width * 4 - packed.shape[1])))
    return np.ascontiguousarray(packed).view("<i4")


def unpack(words: np.ndarray, num_bits: int, n: int) -> np.ndarray:
    """words: int32 [n_rows, packed_width]. Returns the codes, int8 [n_rows, n]."""
    bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, count=n * num_bits, bitorder="little")
    stored = np.packbits(bits.reshape(len(words), n, num_bits), axis=2, bitorder="little")[..., 0]
    return (stored - np.uint8(1 << num_bits - 1)).view(np.int8)
