"""Bit fields: every value comes back, from the place that the docstring says."""

import numpy as np
import pytest

from bitwright.formats.packing import pack_bits, pack_half, unpack_bits, unpack_half


@pytest.mark.parametrize("n_bits", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 4, 32])
def test_codes_come_back(n_bits, stride):
    codes = np.random.default_rng(0).integers(0, 1 << n_bits, (3, 256), dtype=np.uint8)
    packed = pack_bits(codes, n_bits, stride)
    assert packed.shape == (3, 256 * n_bits // 8)
    np.testing.assert_array_equal(unpack_bits(packed, n_bits, stride), codes)


def test_where_codes_lie():
    codes = np.array([[1, 2, 3, 4, 5, 6, 7, 8]], np.uint8)
    assert pack_bits(codes, 4).tobytes() == b"\x21\x43\x65\x87"
    assert pack_bits(codes, 4, 2).tobytes() == b"\x31\x42\x75\x86"
    assert pack_bits(codes, 4, 4).tobytes() == b"\x51\x62\x73\x84"
    bits = np.array([[1, 0, 0, 0, 0, 0, 0, 1]], np.uint8)
    assert pack_bits(bits, 1).tobytes() == b"\x81"


def test_halves_come_back():
    values = np.array([[1, -2.5], [0, 65504]], np.float32)
    assert pack_half(values).tobytes() == b"\x00\x3c\x00\xc1\x00\x00\xff\x7b"
    np.testing.assert_array_equal(unpack_half(pack_half(values)), values)
