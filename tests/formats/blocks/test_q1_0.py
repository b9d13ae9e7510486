"""Q1_0: the scale is the weighted mean magnitude, as no scale is better."""

import numpy as np

from bitwright.formats.blocks.q1_0 import Q1_0


def test_scale_is_the_weighted_mean_magnitude():
    rows = np.where(np.arange(128) % 2, -3.0, 1.0).astype(np.float32)[None]
    importance = np.where(np.arange(128) % 2, 1.0, 3.0).astype(np.float32)
    # (64 * 3 * 1 + 64 * 1 * 3) / (64 * 3 + 64 * 1) = 1.5
    np.testing.assert_array_equal(Q1_0.decode(Q1_0.encode(rows, importance)), np.sign(rows) * 1.5)


def test_weights_of_one_magnitude_come_back_exactly():
    rows = np.where(np.random.default_rng(0).random((3, 256)) < 0.5, -0.375, 0.375).astype(np.float32)
    np.testing.assert_array_equal(Q1_0.decode(Q1_0.encode(rows)), rows)


def test_scale_ends_at_the_largest_float16():
    rows = np.full((1, 128), -3e38, np.float32)
    np.testing.assert_array_equal(Q1_0.decode(Q1_0.encode(rows)), np.full((1, 128), -65504, np.float32))
