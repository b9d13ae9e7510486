"""TQ1_0, TQ2_0 and Q2_0: no scale and no codes are better than those found, and ternary weights come back exactly."""

import numpy as np
import pytest

from bitwright.formats.blocks import ternary
from bitwright.formats.registry import FORMATS
from tests.formats.draws import typical

CODES = {"TQ1_0": (-1, 0, 1), "TQ2_0": (-1, 0, 1), "Q2_0": (-1, 0, 1, 2)}
TERNARY = ("TQ1_0", "TQ2_0")
POSITIVE_F16 = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)

every_format = pytest.mark.parametrize("name", CODES)
every_effort = pytest.mark.parametrize("effort", ["best", "fast"])


def least_error(x, w, codes):
    """The least weighted squared error of one block over every float16 scale it could have, in float64."""
    first, last = np.searchsorted(POSITIVE_F16, [np.abs(x).max() / 50, 2 * np.abs(x).max()])
    scales = POSITIVE_F16[first : last + 1]
    if min(codes) != -max(codes):
        scales = np.concatenate([scales, -scales])
    least = np.full((len(scales), len(x)), np.inf)
    for code in codes:
        np.minimum(least, (x - scales[:, None] * code) ** 2, out=least)
    return (least @ w).min()


def decode_once(codec, x, importance, effort="best"):
    return codec.decode(codec.encode(x[None], importance, effort))[0]


@every_format
@pytest.mark.parametrize("sigma", [1e-7, 1e-5, 0.02, 100.0])
def test_best_finds_the_least_error_of_all_float16_scales(name, sigma):
    codec = FORMATS[name]
    rng = np.random.default_rng(2)
    for importance in (np.ones(codec.block_size), rng.lognormal(0, 2, codec.block_size)):
        x = (sigma * rng.standard_t(5, codec.block_size)).astype(np.float32)
        decoded = decode_once(codec, x, importance.astype(np.float32))
        weights = importance / importance.max()
        error = (weights * (x.astype(np.float64) - decoded) ** 2).sum()
        assert error <= least_error(x.astype(np.float64), weights, CODES[name]) * (1 + 1e-5)


@every_format
def test_outlier_without_importance_does_not_stretch_the_scale(name):
    codec = FORMATS[name]
    rng = np.random.default_rng(3)
    x = rng.standard_normal(codec.block_size).astype(np.float32)
    x[7] = 50
    importance = np.ones(codec.block_size, np.float32)
    importance[7] = 1e-6
    others = np.arange(codec.block_size) != 7
    decoded = decode_once(codec, x, importance)
    assert ((x - decoded)[others] ** 2).sum() < 0.3 * (x[others] ** 2).sum()


@pytest.mark.parametrize("name", TERNARY)
@every_effort
def test_ternary_weights_come_back_exactly(name, effort):
    rng = np.random.default_rng(4)
    # A scale of each block, from bfloat16 as checkpoints have them, and an importance that hides some of the columns.
    scales = rng.uniform(1e-3, 3, (4, 2, 1)).astype(np.float32)
    scales = (scales.view(np.uint32) & 0xFFFF0000).view(np.float32)
    rows = (rng.integers(-1, 2, (4, 2, 256)) * scales).astype(np.float32).reshape(4, 512)
    hidden = rng.lognormal(0, 3, 512).astype(np.float32) * (rng.random(512) < 0.9)
    assert ternary.lossless_rows(rows).all()
    codec = FORMATS[name]
    for importance in (None, hidden):
        np.testing.assert_array_equal(codec.decode(codec.encode(rows, importance, effort)), rows)


def test_rows_that_are_not_ternary_are_told_apart():
    rows = np.zeros((5, 512), np.float32)
    rows[1, ::3] = -0.75
    rows[2, 0], rows[2, 300] = 1, 2  # a scale of each block
    rows[3, 0], rows[3, 1] = 1, -0.5  # two magnitudes in a block
    rows[4, 5] = 0.1  # no float16 number
    np.testing.assert_array_equal(ternary.lossless_rows(rows), [True, True, True, False, False])


@every_effort
def test_weights_that_q2_0_holds_come_back_exactly(effort):
    rng = np.random.default_rng(5)
    scales = rng.choice([-0.5, 0.125, 3], (6, 4, 1))
    rows = (scales * rng.integers(-1, 3, (6, 4, 64))).astype(np.float32).reshape(6, -1)
    codec = FORMATS["Q2_0"]
    np.testing.assert_array_equal(codec.decode(codec.encode(rows, None, effort)), rows)


def test_fast_stays_near_best():
    rows, importance = typical(seed=6)
    weights = importance.astype(np.float64)
    for name in CODES:
        codec = FORMATS[name]
        best, fast = (
            (weights * (rows - codec.decode(codec.encode(rows, importance, effort)).astype(np.float64)) ** 2).sum()
            for effort in ("best", "fast")
        )
        assert best <= fast <= 1.02 * best
