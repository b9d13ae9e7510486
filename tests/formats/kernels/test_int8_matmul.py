"""INT8 products are exact, and the layer around them is that of compressed-tensors."""

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from bitwright.formats.kernels.int8_matmul import (
    EXACT_COLUMNS,
    MOST_COLUMNS,
    int8_linear,
    int8_matmul,
    quantize,
    quantize_per_token,
)


@pytest.mark.parametrize(
    "m, k, n",
    [
        (1, 1, 1),
        (3, 7, 5),
        (17, 1023, 33),
        (2, 1024, 2049),
        (5, 1025, 3),
        (4, 14336, 6),
        (0, 8, 3),
        (3, 8, 0),
        (2, 0, 2),
    ],
)
@pytest.mark.parametrize("extreme", [False, True])
def test_products_are_exact(m, k, n, extreme):
    rng = np.random.default_rng(k)
    draw = (lambda shape: rng.choice([-128, 127], shape)) if extreme else (lambda shape: rng.integers(-128, 128, shape))
    x, weight = draw((m, k)).astype(np.int8), draw((n, k)).astype(np.int8)
    product = int8_matmul(x, weight)
    assert product.dtype == np.int32
    np.testing.assert_array_equal(product, x.astype(np.int64) @ weight.T.astype(np.int64))


@pytest.mark.parametrize("k", [EXACT_COLUMNS, MOST_COLUMNS])
@pytest.mark.parametrize("values", [(-128, -128), (-128, 127), (127, 127)])
def test_the_largest_sums_fit(k, values):
    x, weight = (np.full((2, k), value, np.int8) for value in values)
    assert (int8_matmul(x, weight) == values[0] * values[1] * k).all()
    x[1, ::2] = 1
    np.testing.assert_array_equal(int8_matmul(x, weight), x.astype(np.int64) @ weight.T.astype(np.int64))


def test_strided_operands():
    x = np.arange(-60, 60, dtype=np.int8).reshape(6, 20)
    np.testing.assert_array_equal(
        int8_matmul(x[::2, ::3], x[:, 1::3]), x[::2, ::3].astype(int) @ x[:, 1::3].T.astype(int)
    )


def test_what_could_not_be_exact_is_refused():
    with pytest.raises(ValueError, match="may leave int32"):
        int8_matmul(np.zeros((1, MOST_COLUMNS + 1), np.int8), np.zeros((1, MOST_COLUMNS + 1), np.int8))
    with pytest.raises(ValueError, match="are needed"):
        int8_matmul(np.zeros((1, 4), np.uint8), np.zeros((1, 4), np.int8))
    with pytest.raises(ValueError, match="are needed"):
        int8_matmul(np.zeros((1, 4), np.int8), np.zeros((1, 5), np.int8))
    with pytest.raises(ValueError, match="not a finite number"):
        quantize_per_token(np.array([[1, np.nan]], np.float32))


def activations(n_tokens=9, n_columns=130):
    rng = np.random.default_rng(2)
    x = rng.standard_t(3, (n_tokens, n_columns)).astype(np.float32)
    x[0] = 0
    x[1] = np.abs(x[1]) + 1
    x[2] = -np.abs(x[2]) - 1
    x[3, 5] = 1e4
    return x


@pytest.mark.parametrize("symmetric", [True, False])
def test_tokens_are_quantized_as_compressed_tensors_does(symmetric):
    x = activations()
    arguments = QuantizationArgs(num_bits=8, type="int", strategy="token", symmetric=symmetric, dynamic=True)
    scale, zero_point = compute_dynamic_scales_and_zp(torch.from_numpy(x)[None], arguments, torch.nn.Identity())
    theirs = fake_quantize(torch.from_numpy(x)[None], scale, zero_point, arguments)[0].numpy()
    ours = quantize_per_token(x, symmetric)
    # One step off where a quotient lies on the edge between two codes.
    assert (np.abs(ours.dequantize() - theirs) <= ours.scales * 1.01).all()
    assert (np.abs(ours.dequantize() - theirs) <= ours.scales * 0.01).mean() > 0.999
    assert (ours.dequantize()[0] == 0).all()
    assert (np.abs(ours.dequantize() - x) <= ours.scales * 0.75).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_linear_layer_is_the_product_of_what_the_codes_stand_for(symmetric, static):
    rng = np.random.default_rng(3)
    x = activations()[3:]
    weight = rng.integers(-128, 128, (11, x.shape[1])).astype(np.int8)
    scales, bias = rng.uniform(0.01, 0.02, (11, 1)).astype(np.float32), rng.standard_normal(11).astype(np.float32)
    if static:
        quantized = quantize(x, np.float32(0.05), None if symmetric else np.array([7], np.int32))
        assert quantized.codes.max() == 127
    else:
        quantized = quantize_per_token(x, symmetric)
    exact = quantized.dequantize().astype(np.float64) @ (weight * scales.astype(np.float64)).T + bias
    ours = int8_linear(quantized, weight, scales, bias)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())
