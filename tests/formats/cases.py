"""One row a block format: a block to check by hand, and how its encoder must stand beside ggml's.

Adding a format to the tests is adding its row here; every test of test_codecs.py runs on every row.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Case:
    """name: the format's. best, fast: weighted squared error on typical weights, at most this share of ggml's.
    block, weights: a golden block and what it decodes to; numbers that can be followed with pencil and paper."""

    name: str
    best: float
    fast: float
    block: bytes
    weights: np.ndarray


def repeat(values, count: int) -> np.ndarray:
    """Each value `count` times, as float32."""
    return np.repeat(np.array(values, np.float32), count)


HALF, ONE, TWO, MINUS_TWO = (np.float16(value).tobytes() for value in (0.5, 1, 2, -2))
INDEX = np.arange(16)
# The bytes whose four two-bit fields are 0, 1, 2, 3, lowest first.
FIELDS_0123 = 0b11_10_01_00
IQ4_LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
# Of 32 weights: minus in the first two (signs 3), and in the first and the last of the next eight (signs 1).
SIGNS_3_1 = np.where(np.isin(np.arange(32), [0, 1, 8, 15]), -1, 1)
# IQ1's points 1, 256, 0, 0.
IQ1_POINTS = np.concatenate([[1], [-1] * 7, [-1, 0, 1, 0, 1, -1, 0, -1], [-1] * 16])
# The values of the codes 0 .. 15.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])

CASES = (
    Case(
        "Q8_0",
        best=0.76,
        fast=0.80,
        block=HALF + bytes(range(32)),  # d = 0.5, codes 0 .. 31
        weights=0.5 * np.arange(32),
    ),
    Case(
        "Q4_0",
        best=0.97,
        fast=1.0,
        # Codes 0 .. 15 in the low nibbles are weights 0 .. 15, codes 15 .. 0 in the high ones weights 16 .. 31.
        block=ONE + bytes(low | (15 - low) << 4 for low in range(16)),
        weights=np.concatenate([INDEX - 8, 7 - INDEX]),
    ),
    Case(
        "Q5_0",
        best=0.97,
        fast=1.0,
        # The fifth bit is set for weights 16 .. 31; the lower four bits count 0 .. 15 in both halves.
        block=ONE + b"\x00\x00\xff\xff" + bytes(0x11 * low for low in range(16)),
        weights=np.concatenate([INDEX - 16, INDEX]),
    ),
    Case(
        "Q4_1",
        best=0.97,
        fast=1.0,
        # d = 1, m = -2; the codes are those of Q4_0.
        block=ONE + MINUS_TWO + bytes(low | (15 - low) << 4 for low in range(16)),
        weights=np.concatenate([INDEX - 2, 13 - INDEX]),
    ),
    Case(
        "Q5_1",
        best=0.97,
        fast=1.0,
        # d = 1, m = -2; the codes are those of Q5_0.
        block=ONE + MINUS_TWO + b"\x00\x00\xff\xff" + bytes(0x11 * low for low in range(16)),
        weights=np.concatenate([INDEX - 2, INDEX + 14]),
    ),
    Case(
        "Q6_K",
        best=0.97,
        fast=1.0,
        # Lower bits 1 and 2 in the halves of 64, upper bits 0 to 3 in the quarters of 32: codes 1, 17, 34, 50, less 32.
        block=bytes([0x21] * 128 + [FIELDS_0123] * 64) + np.arange(-8, 8, dtype=np.int8).tobytes() + TWO,
        weights=2 * repeat(np.arange(-8, 8), 16) * np.tile(repeat([-31, -15, 2, 18], 32), 2),
    ),
    Case(
        "Q5_K",
        best=0.96,
        fast=1.0,
        # As Q4_K below, and the fifth bit is set in sub-block 7: its code is 2 + 16.
        block=ONE + HALF + bytes([1, 2, 3, 4, 0, 2, 4, 0x80 | 6, 0x85, 0xA6, 0xC7, 0xE8] + [0x80] * 32 + [0x21] * 128),
        weights=repeat([1 * 1, 2 * 2 - 1, 3 * 1 - 2, 4 * 2 - 3, 5 * 1 - 4, 6 * 2 - 5, 7 * 1 - 6, 8 * 18 - 23], 32),
    ),
    Case(
        "Q4_K",
        best=0.96,
        fast=1.0,
        # d = 1, dmin = 0.5; scales 1 .. 8, minima 0, 2, .. 12 and 46 = 0b10_1110, its upper bits above minimum 3.
        # Codes: 1 in the even sub-blocks (low nibbles), 2 in the odd ones.
        block=ONE + HALF + bytes([1, 2, 3, 4, 0, 2, 4, 0x80 | 6, 0x85, 0xA6, 0xC7, 0xE8] + [0x21] * 128),
        weights=repeat([1 * 1, 2 * 2 - 1, 3 * 1 - 2, 4 * 2 - 3, 5 * 1 - 4, 6 * 2 - 5, 7 * 1 - 6, 8 * 2 - 23], 32),
    ),
    Case(
        "Q3_K",
        best=0.97,
        fast=1.0,
        # Scales -8 .. 7 are stored as 24 .. 39: lower bits 8 .. 15 and 0 .. 7, upper bits 1 and 2.
        # The third bit is set in the first half: codes 0 .. 3 there, -4 .. -1 in the second half.
        block=bytes([0x0F] * 32 + [FIELDS_0123] * 64 + [8 + j | j << 4 for j in range(8)] + [0b10_10_01_01] * 4) + TWO,
        weights=2 * repeat(np.arange(-8, 8), 16) * repeat([0, 1, 2, 3, -4, -3, -2, -1], 32),
    ),
    Case(
        "Q2_K",
        best=0.92,
        fast=1.0,
        # Scales 0 .. 15, minima 15 .. 0; d = 1, dmin = 0.5; codes 0 .. 3, each for 32 weights, twice.
        block=bytes([s | (15 - s) << 4 for s in range(16)] + [FIELDS_0123] * 64) + ONE + HALF,
        weights=repeat(INDEX, 16) * np.tile(repeat([0, 1, 2, 3], 32), 2) - 0.5 * repeat(15 - INDEX, 16),
    ),
    Case(
        "IQ4_NL",
        best=0.94,
        fast=0.95,
        # Codes 0 .. 15 in the low nibbles, 15 .. 0 in the high ones; d = 0.5.
        block=HALF + bytes(low | (15 - low) << 4 for low in range(16)),
        weights=0.5 * np.concatenate([IQ4_LEVELS, IQ4_LEVELS[::-1]]),
    ),
    Case(
        "IQ4_XS",
        best=0.93,
        fast=0.94,
        # Stored scales 0, 17, 34, 51, 4, 21, 38, 55: low nibbles 0 .. 7, upper two bits 0, 1, 2, 3 twice; 32 is zero.
        # Every sub-block holds codes 8 (level 1) in the low nibbles and 0 (level -127) in the high ones.
        block=TWO + bytes([FIELDS_0123] * 2) + bytes([0x10, 0x32, 0x54, 0x76]) + bytes([0x08] * 128),
        weights=2 * repeat(np.array([0, 17, 34, 51, 4, 21, 38, 55]) - 32, 32) * np.tile(repeat([1, -127], 16), 8),
    ),
    Case(
        "MXFP4",
        best=0.97,
        fast=1.0,
        # The scale is 2**(128 - 127); codes 0 .. 15 are weights 0 .. 15, codes 15 .. 0 weights 16 .. 31.
        block=bytes([128]) + bytes(low | (15 - low) << 4 for low in range(16)),
        weights=2 * np.concatenate([E2M1, E2M1[::-1]]),
    ),
    Case(
        "NVFP4",
        # Without a second-level scale, as in ggml; tests/formats/blocks/test_fp4.py tests it with one.
        best=0.70,
        fast=0.85,
        # The scales 1, 1.125, 2**-9 and 448; in each sub-block the codes 0 .. 15.
        block=bytes([0x38, 0x39, 0x01, 0x7E]) + 4 * bytes(low | (8 + low) << 4 for low in range(8)),
        weights=repeat([1, 1.125, 2**-9, 448], 16) * np.tile(E2M1, 4),
    ),
    Case(
        "Q2_0",
        best=0.30,
        fast=0.50,
        block=MINUS_TWO + bytes([FIELDS_0123] * 16),  # d = -2, codes -1, 0, 1, 2 over and over
        weights=-2 * np.tile([-1, 0, 1, 2], 16),
    ),
    Case(
        "TQ2_0",
        # What the optimum leaves on these weights, heavier in the tails than a gaussian; see test_ternary.py.
        best=0.37,
        fast=0.50,
        # Codes -1, 0, 1, 0, each for 32 weights, twice; d = 2.
        block=bytes([0b01_10_01_00] * 64) + TWO,
        weights=2 * np.tile(repeat([-1, 0, 1, 0], 32), 2),
    ),
    Case(
        "TQ1_0",
        best=0.37,
        fast=0.50,
        # Digits 2 1 0 1 2 are the number 194, byte ceil(194 * 256 / 243) = 205; 2 1 0 1 0 are 192, byte 203. d = 0.5.
        block=bytes([205] * 48 + [203] * 4) + HALF,
        weights=0.5
        * np.concatenate([repeat([1, 0, -1, 0, 1], 32), repeat([1, 0, -1, 0, 1], 16), repeat([1, 0, -1, 0], 4)]),
    ),
    Case(
        "Q1_0",
        best=1.0,
        fast=1.0,
        block=HALF + bytes([0x0F] * 16),  # d = 0.5; of each eight weights the first four positive
        weights=0.5 * np.tile(repeat([1, -1], 4), 16),
    ),
    Case(
        "IQ3_S",
        best=0.83,
        fast=0.86,
        # Points 1 = (3, 1, 1, 1) and 256 = (7, 5, 9, 5), the ninth bits 0, 1, 0, 1 ..; of eight signs the first is
        # minus; scales 0 .. 7, d = 1.
        block=ONE + bytes([1, 0] * 32 + [0xAA] * 8 + [0x01] * 32 + [0x10, 0x32, 0x54, 0x76]),
        weights=repeat(2 * np.arange(8) + 1, 32) * np.tile([-3, 1, 1, 1, 7, 5, 9, 5], 32),
    ),
    Case(
        "IQ3_XXS",
        best=0.87,
        fast=0.91,
        # Points 1 = (20, 4, 4, 4) and 0 = (4, 4, 4, 4). Signs 3 and 1 of 7 bits, the rest 0: two minus signs in the
        # first eight weights; one in the second, so that the eighth is minus as well. Scales 0 .. 7.
        block=ONE + bytes([1, 0] * 32) + b"".join((0x83 | i << 28).to_bytes(4, "little") for i in range(8)),
        weights=0.5 * repeat(INDEX[:8] + 0.5, 32) * np.tile(np.tile([20, 4, 4, 4, 4, 4, 4, 4], 4) * SIGNS_3_1, 8),
    ),
    Case(
        "IQ2_S",
        best=0.83,
        fast=0.87,
        # Points 1 = (43, 8, ..) and 256 = (25, 25, 25, 25, 25, 8, 25, 8), the upper two bits 0, 1, 0, 1; of 16 signs
        # the first is minus; scales 0 .. 15.
        block=ONE + bytes([1, 0] * 16 + [0x01, 0x00] * 16 + [0x44] * 8) + bytes(range(0x10, 0x100, 0x22)),
        weights=0.25 * repeat(INDEX + 0.5, 16) * np.tile([-43] + [8] * 7 + [25, 25, 25, 25, 25, 8, 25, 8], 16),
    ),
    Case(
        "IQ2_XS",
        best=0.80,
        fast=0.82,
        # Points 1 = (43, 8, ..) and 0 = (8, ..); above the 9 bits of the point the signs, 3 and 1; scales 0 .. 15.
        block=ONE + b"\x01\x06\x00\x02" * 16 + bytes(range(0x10, 0x100, 0x22)),
        weights=0.25 * repeat(INDEX + 0.5, 16) * np.tile(([43] + [8] * 15) * SIGNS_3_1[:16], 16),
    ),
    Case(
        "IQ2_XXS",
        best=0.81,
        fast=0.82,
        # As IQ3_XXS, four points for 32 weights: 1 = (43, 8, ..) and three times 0 = (8, ..).
        block=ONE + b"".join(b"\x01\x00\x00\x00" + (0x83 | i << 28).to_bytes(4, "little") for i in range(8)),
        weights=0.25 * repeat(INDEX[:8] + 0.5, 32) * np.tile(([43] + [8] * 31) * SIGNS_3_1, 8),
    ),
    Case(
        "IQ1_M",
        best=0.84,
        fast=0.90,
        # Points 1, 256, 0, 0 as IQ1_S, the shift of every second negative. Scales 0 .. 7, twice; above them, four bits
        # at a time, the float16 2 = 0x4000.
        block=bytes([1, 0, 0, 0] * 8 + [0x90, 0x80] * 8) + b"\x88\x06\xac\x0f\x88\x06\xac\x4f",
        weights=2
        * np.tile(repeat(2 * INDEX[:8] + 1, 16), 2)
        * (np.tile(IQ1_POINTS, 8) + np.tile(repeat([1, -1], 8), 16) / 8),
    ),
    Case(
        "IQ1_S",
        best=0.82,
        fast=0.84,
        # Points 1, 256, 0, 0: the second one's upper bits are 1. Scales 0 .. 7 in bits 12 .. 14; of the odd ones the
        # shift is negative.
        block=TWO + bytes([1, 0, 0, 0] * 8) + b"".join(bytes([1 << 3, s << 4 | s % 2 << 7]) for s in range(8)),
        weights=2 * repeat(2 * INDEX[:8] + 1, 32) * (np.tile(IQ1_POINTS, 8) + np.tile(repeat([1, -1], 32), 4) / 8),
    ),
)
