"""MXFP4 and NVFP4: the search finds the best stored scale there is, and NVFP4's second-level scale does its work."""

import numpy as np
import pytest

from bitwright.formats.blocks import fp4
from bitwright.formats.registry import FORMATS
from scripts.peers import ggml
from tests.formats.cases import E2M1
from tests.formats.draws import typical, weighted_nmse

# Scales of every code, from the formats' definitions: E8M0 as far as all values stay finite, and UE4M3.
E8M0 = 2.0 ** (np.arange(1, 253) - 127)
UE4M3 = np.array([(c & 7) / 8 * 2.0**-6 if c < 8 else (1 + (c & 7) / 8) * 2.0 ** ((c >> 3) - 7) for c in range(1, 127)])


def least_error(x, w, scales):
    """The least weighted squared error of one block over all scales, by trying each with each code, in float64."""
    errors = [(w * ((x[:, None] - scale * E2M1) ** 2).min(axis=1)).sum() for scale in scales]
    return min(errors)


def blocks_to_search(block_size, seed):
    """Blocks of several kinds, with the importance of their columns: one row each."""
    rng = np.random.default_rng(seed)
    for sigma in (1e-3, 0.02, 1.0):
        x = sigma * rng.standard_t(4, block_size)
        one_hot = np.zeros(block_size)
        one_hot[rng.integers(block_size)] = 1
        outlier = np.where(np.arange(block_size) == 3, 50 * sigma, x)
        unimportant_outlier = np.where(np.arange(block_size) == 3, 1e-3, rng.lognormal(0, 1, block_size))
        for importance in (np.ones(block_size), rng.lognormal(0, 2, block_size), one_hot):
            yield x.astype(np.float32), importance.astype(np.float32)
        yield outlier.astype(np.float32), unimportant_outlier.astype(np.float32)


@pytest.mark.parametrize(("name", "block_size", "scales"), [("MXFP4", 32, E8M0), ("NVFP4", 16, UE4M3)])
def test_best_finds_the_least_error_of_all_scales(name, block_size, scales):
    codec = FORMATS[name]
    for seed in range(10):
        for x, importance in blocks_to_search(block_size, seed):
            copies = codec.block_size // block_size
            decoded = codec.decode(codec.encode(np.tile(x, copies)[None], np.tile(importance, copies)))[0, :block_size]
            exact, weights = x.astype(np.float64), np.maximum(importance / importance.max(), 1e-8).astype(np.float64)
            error = (weights * (exact - decoded) ** 2).sum()
            assert error <= least_error(exact, weights, scales) * (1 + 1e-5)


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_values_of_the_format_come_back_exactly(name):
    codec = FORMATS[name]
    rng = np.random.default_rng(0)
    scales = rng.choice(UE4M3 if name == "NVFP4" else E8M0[60:190], (8, 4, 1))
    rows = (scales * rng.choice(E2M1, (8, 4, 16 if name == "NVFP4" else 32))).reshape(8, -1).astype(np.float32)
    np.testing.assert_array_equal(codec.decode(codec.encode(rows)), rows)


@pytest.mark.parametrize("effort", ["best", "fast"])
@pytest.mark.parametrize("sigma", [1e-4, 0.02, 5.0])
def test_tensor_scale_frees_the_block_scales_from_their_subnormals(effort, sigma):
    rows, importance = typical(seed=3)
    rows = (sigma / 0.02 * rows).astype(np.float32)
    scale = fp4.nvfp4_tensor_scale(float(np.abs(rows).max()))
    decoded = scale * fp4.decode_nvfp4(fp4.encode_nvfp4(rows, importance, effort, tensor_scale=scale))
    theirs = ggml.dequantize(ggml.quantize(rows, "NVFP4", importance), "NVFP4", rows.shape[1])
    # At a deviation of 5 ggml's scales are normal too, and the search alone brings the gain.
    bound = {1e-4: 0.05, 0.02: 0.61, 5.0: 0.75}[sigma]
    assert weighted_nmse(rows, decoded, importance) <= bound * weighted_nmse(rows, theirs, importance)


def test_tensor_scale_is_a_power_of_two_that_leaves_room_for_the_largest_weight():
    for absolute_maximum in (1e-40, 1e-9, 0.3, 768.0, 1536.0, 65504.0, 3e38):
        scale = fp4.nvfp4_tensor_scale(absolute_maximum)
        assert np.frexp(scale)[0] == 0.5
        assert np.float32(scale) == scale > 0
        assert absolute_maximum / scale <= 6 * 256
        if absolute_maximum > 1e-30:
            assert absolute_maximum / scale > 6 * 128
    assert fp4.nvfp4_tensor_scale(0.0) == 1.0


def test_weights_beyond_the_range_are_cut_off_there():
    rows = np.full((1, 64), 65504, np.float32)
    rows[0, ::2] *= -1
    np.testing.assert_array_equal(fp4.decode_nvfp4(fp4.encode_nvfp4(rows)), np.sign(rows) * 6 * 448)
    np.testing.assert_array_equal(
        fp4.decode_nvfp4(fp4.encode_nvfp4(rows, tensor_scale=fp4.nvfp4_tensor_scale(65504))) * 64, np.sign(rows) * 65536
    )


def test_sub_block_of_no_importance_is_encoded_like_one_of_equal_importance():
    rows, _ = typical(seed=4, n_rows=1, n_columns=64)
    importance = np.ones(64, np.float32)
    importance[16:32] = 0
    np.testing.assert_array_equal(fp4.encode_nvfp4(rows, importance), fp4.encode_nvfp4(rows))
