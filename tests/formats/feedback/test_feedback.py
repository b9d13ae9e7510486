"""Error feedback, held against textbook GPTQ, gguf's decoder and what its own docstrings promise."""

from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest

from bitwright.formats.errors import ConvertError
from bitwright.formats.feedback import points, scalar
from bitwright.formats.feedback.choose import feed_back, output_error
from bitwright.formats.feedback.moment_factor import factorize, unit_of
from bitwright.formats.feedback.rows import ScalarRows, search_of
from bitwright.formats.kernels.products import STRIPE, add_products, cholesky
from bitwright.formats.parts import ScalarBlocks
from bitwright.formats.pins import Pin, encode_pinned
from bitwright.formats.registry import FORMATS
from bitwright.formats.schemes.registry import SCHEMES
from scripts.peers import ggml
from tests.formats.draws import draw

N = 512
BLOCK_FORMATS = [block_format for block_format in FORMATS.values() if block_format.blocks is not None]
every_format = pytest.mark.parametrize("block_format", BLOCK_FORMATS, ids=lambda f: f.name)
# One of each kind of kernel and table: one scale, scales and minima, a table of scales, free, even and no signs.
KINDS = ("Q4_0", "Q2_K", "Q3_K", "NVFP4", "TQ1_0", "IQ2_S", "IQ3_XXS", "IQ1_S", "IQ1_M")
every_kind = pytest.mark.parametrize("block_format", [FORMATS[name] for name in KINDS], ids=lambda f: f.name)


def inputs(n_samples: int, n: int = N, seed: int = 0) -> np.ndarray:
    """Correlated inputs of uneven size, float32 [n_samples, n]."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((n // 2, n)) / np.sqrt(n // 2) + 0.05
    hidden = np.random.default_rng(seed + 1 + n_samples).standard_normal((n_samples, n // 2))
    noise = np.random.default_rng(seed + 2 + n_samples).standard_normal((n_samples, n))
    return ((hidden @ mixing + 0.1 * noise) * rng.lognormal(0, 0.7, n)).astype(np.float32)


def second_moments(x: np.ndarray) -> np.ndarray:
    return x.T.astype(np.float64) @ x.astype(np.float64) / len(x)


def weights(n_rows: int, n: int = N, seed: int = 5) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(5, (n_rows, n)) * 0.02).astype(np.float32)


def decode(block_format, data: np.ndarray, n_columns: int) -> np.ndarray:
    """By a decoder that is not ours."""
    if block_format.ggml_type in gguf.quants._type_traits:
        return gguf.quants.dequantize(data, block_format.ggml_type)
    return ggml.dequantize(data, block_format.name, n_columns)


@pytest.fixture(scope="module")
def factors():
    moments = second_moments(inputs(2048))
    return {unit: factorize(moments, unit) for unit in (1, 8)}


def error_of(block_format, rows, data, matrix) -> np.ndarray:
    """e H e of each row, float64."""
    errors = rows.astype(np.float64) - decode(block_format, data, rows.shape[1])
    return ((errors @ matrix.astype(np.float64)) * errors).sum(axis=1)


@every_format
def test_blocks_close_to_the_bytes_they_were_opened_from(block_format):
    data = block_format.encode(weights(4), np.linspace(0.1, 1, N, dtype=np.float32))
    parts = block_format.blocks.open(data)
    np.testing.assert_array_equal(block_format.blocks.pack(parts).reshape(data.shape), data)


@pytest.mark.parametrize(
    "block_format", [f for f in BLOCK_FORMATS if isinstance(f.blocks, ScalarBlocks)], ids=lambda f: f.name
)
def test_scalar_parts_say_what_the_block_decodes_to(block_format):
    data = block_format.encode(weights(4), np.linspace(0.1, 1, N, dtype=np.float32))
    blocks, parts = block_format.blocks, block_format.blocks.open(data)
    scale, minimum = blocks.scale_table[parts.scales[:, 0]], blocks.minimum_table[parts.scales[:, 1]]
    size = block_format.block_size // blocks.n_sub
    values = np.repeat(parts.units[:, :1] * scale, size, axis=1) * parts.levels
    values -= np.repeat(parts.units[:, 1:] * minimum, size, axis=1)
    assert np.isin(parts.levels, blocks.levels).all()
    np.testing.assert_allclose(values.reshape(4, N), decode(block_format, data, N), rtol=1e-6, atol=1e-9)


@every_format
def test_output_error_falls_on_inputs_that_were_not_seen(block_format, factors):
    rows, factor = weights(6), factors[unit_of(block_format)]
    unseen = second_moments(inputs(1024, seed=0)[:512])
    plain = block_format.encode(rows, np.ascontiguousarray(factor.matrix.diagonal()))
    data = feed_back(block_format, rows, block_format.encode(rows, factor.importance), factor, effort="fast")
    ratio = error_of(block_format, rows, data, unseen).sum() / error_of(block_format, rows, plain, unseen).sum()
    assert ratio < 0.6, ratio


@every_kind
def test_no_row_gets_worse_whatever_the_weights(block_format, factors):
    factor = factors[unit_of(block_format)]
    matrix = factor.matrix[:256, :256]
    factor = factorize(matrix, factor.unit)
    for seed in range(24):
        _, rows, _ = draw(seed)
        rows = np.ascontiguousarray(rows[:2, :256])
        if rows.shape[1] < 256:
            continue
        data = block_format.encode(rows, factor.importance)
        better = feed_back(block_format, rows, data, factor, effort="fast")
        magnitude = np.square(np.abs(rows).max(axis=1), dtype=np.float64)
        before, after = (error_of(block_format, rows, d, factor.matrix) for d in (data, better))
        assert np.isfinite(decode(block_format, better, 256)).all()
        assert (after <= before * 1.001 + 1e-9 * magnitude).all(), (seed, before, after)


def gptq(rows, values_of, moments, order):
    """Textbook GPTQ (Frantar et al. 2022) in float64: the inverse's Cholesky factor, columns in that order.

    values_of(column, targets): the rows' nearest values in the grid of that column.
    """
    upper = np.linalg.cholesky(np.linalg.inv(moments[np.ix_(order, order)])).T
    remaining, result = rows[:, order].astype(np.float64), np.empty(rows.shape)
    for i, column in enumerate(order):
        result[:, column] = values_of(column, remaining[:, i])
        error = (remaining[:, i] - result[:, column]) / upper[i, i]
        remaining[:, i:] -= error[:, None] * upper[i, i:]
    return result


def test_rounding_in_turn_is_gptq(factors):
    block_format, rows, factor = FORMATS["Q4_0"], weights(32), factors[1]
    data = block_format.encode(rows, factor.importance)
    parts = block_format.blocks.open(data)
    steps = np.repeat(parts.units[:, 0].reshape(32, -1), 32, axis=1).astype(np.float64)

    def values_of(column, targets):
        return steps[:, column] * np.clip(np.rint(targets / steps[:, column]), -8, 7)

    expected = gptq(rows, values_of, factor.matrix.astype(np.float64), factor.order[::-1])
    search = search_of(block_format.blocks, "quick", "best")
    work = ScalarRows(block_format.blocks, rows, data, np.zeros((32, N // 32), bool), factor, search)
    left = work.round()
    values = work.values() * work.ups[:, None]
    lost = np.ascontiguousarray((rows / work.ups[:, None] - work.values())[:, factor.order])
    np.testing.assert_allclose(left, (lost @ factor.lower).T, atol=1e-5)
    # A target half way between two levels may be rounded to either, and all that follow in that row with it.
    same = np.isclose(values, expected, rtol=1e-4).mean(axis=1)
    assert (same == 1).mean() > 0.7
    errors = [(((rows - v) @ factor.matrix) * (rows - v)).sum() for v in (values, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


def test_descent_ends_where_no_single_level_is_better(factors):
    block_format, rows, factor = FORMATS["Q4_0"], weights(4), factors[1]
    data = feed_back(block_format, rows, block_format.encode(rows, factor.importance), factor)
    parts, matrix = block_format.blocks.open(data), factor.matrix.astype(np.float64)
    steps = np.repeat(parts.units[:, 0].reshape(4, -1), 32, axis=1).astype(np.float64)
    levels = parts.levels.reshape(4, N)
    error = rows - steps * levels
    gradient, left = error @ matrix, ((error @ matrix) * error).sum(axis=1, keepdims=True)
    for move in (-1, 1):
        cost = steps * (steps * matrix.diagonal() - 2 * move * gradient)
        cost[(levels + move < -8) | (levels + move > 7)] = 0
        # The rounds are limited, so a move may be left over; none is worth much.
        assert (cost > -2e-3 * left).all()


@every_kind
def test_what_the_kernels_keep_track_of_is_what_the_bytes_say(block_format, factors, monkeypatch):
    """The error that decides between results comes from gradients kept up to date over thousands of changes."""
    rows, factor = weights(5), factors[unit_of(block_format)]
    reported = []

    def spy(function):
        def call(tile, *arguments):
            function(tile, *arguments)
            reported.append(tile.errors.copy())

        return call

    for kernels in (scalar, points):
        monkeypatch.setattr(kernels, "refine", spy(kernels.refine))
    data = feed_back(block_format, rows, block_format.encode(rows, factor.importance), factor)
    ups = np.ldexp(1.0, np.frexp(np.abs(rows).max(axis=1))[1])
    np.testing.assert_allclose(reported[0] * ups**2, error_of(block_format, rows, data, factor.matrix), rtol=2e-3)


@every_kind
def test_a_rows_bytes_depend_on_that_row_alone(block_format, factors):
    rows, factor = weights(70), factors[unit_of(block_format)]
    data = block_format.encode(rows, factor.importance)
    whole = feed_back(block_format, rows, data, factor, effort="fast")
    parts = [(0, 1), (1, 6), (6, 69), (69, 70)]
    cut = [feed_back(block_format, rows[a:b], data[a:b], factor, effort="fast") for a, b in parts]
    np.testing.assert_array_equal(np.concatenate(cut), whole)


@every_kind
def test_frozen_blocks_keep_their_bytes_and_the_others_make_up_for_them(block_format, factors):
    rows, factor = weights(4), factors[unit_of(block_format)]
    data = block_format.encode(rows, factor.importance)
    frozen = np.zeros((4, N // block_format.block_size), bool)
    frozen[1:3, 0] = True
    result = feed_back(block_format, rows, data, factor, "best", "fast", frozen)
    before, after = (d.reshape(*frozen.shape, -1) for d in (data, result))
    np.testing.assert_array_equal(after[frozen], before[frozen])
    assert (
        error_of(block_format, rows, result, factor.matrix) < error_of(block_format, rows, data, factor.matrix)
    ).all()


def test_pins_hold_beside_feedback(factors):
    block_format, rows, factor = FORMATS["Q3_K"], weights(3), factors[1]
    rows[1, 300] = 0.5
    pins = [Pin(1, 300, 0.01), Pin(2, 5, 0.02)]
    data, _ = encode_pinned(block_format, rows, factor.importance, "best", pins)
    frozen = np.zeros((3, N // 256), bool)
    for pin in pins:
        frozen[pin.row, pin.column // 256] = True
    decoded = decode(block_format, feed_back(block_format, rows, data, factor, "best", "fast", frozen), N)
    for pin in pins:
        assert abs(decoded[pin.row, pin.column] / rows[pin.row, pin.column] - 1) <= pin.tolerance


@pytest.mark.parametrize("name", ["Q2_K", "IQ2_XXS"])
def test_singular_moments_are_damped(name):
    """Fewer samples than columns, and columns whose input is always zero."""
    block_format, rows = FORMATS[name], weights(8)
    x = inputs(100)
    x[:, 64:96] = 0
    factor = factorize(second_moments(x), unit_of(block_format))
    plain = block_format.encode(rows, np.ascontiguousarray(factor.matrix.diagonal()))
    data = feed_back(block_format, rows, block_format.encode(rows, factor.importance), factor, effort="fast")
    decoded = decode(block_format, data, N)
    unseen = second_moments(inputs(1024) * (x.any(axis=0)))
    assert error_of(block_format, rows, data, unseen).sum() < error_of(block_format, rows, plain, unseen).sum()
    # What was never seen is still encoded, not thrown away.
    assert np.square(decoded[:, 64:96] - rows[:, 64:96]).sum() < np.square(rows[:, 64:96]).sum()


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.takes_feedback])
def test_schemes_of_directories_lose_less_in_the_same_bytes(name, factors):
    scheme, factor = SCHEMES[name], factors[1]
    rows = weights(70)
    rows[3], rows[4, :128] = 0, 0
    unseen = second_moments(inputs(1024))
    plain = scheme.encode(rows, np.ascontiguousarray(factor.matrix.diagonal()))
    start = scheme.encode(rows, factor.importance)
    codec = scheme.codec
    data = codec.to_blocks(start, rows.shape)
    opened = codec.block_rows(N).blocks.open(data)
    assert_tensors_equal(
        codec.from_blocks(codec.block_rows(N).blocks.pack(opened).reshape(len(rows), -1), start), start
    )
    fed = scheme.feed_back(start, rows, factor)
    assert_tensors_equal(scheme.feed_back(start, rows, factor, n_threads=3), fed)
    assert {suffix: (array.dtype, array.shape) for suffix, array in fed.items()} == {
        suffix: (array.dtype, array.shape) for suffix, array in plain.items()
    }
    lost = [
        np.einsum("ij,jk,ik->i", errors, unseen, errors)
        for errors in (rows - scheme.decode(tensors, rows.shape).astype(np.float64) for tensors in (plain, start, fed))
    ]
    assert lost[2].sum() < 0.5 * lost[0].sum()
    assert (lost[2] <= 1.2 * lost[1]).all()
    if scheme.weights.type == "int":
        np.testing.assert_array_equal(fed["weight_scale"], start["weight_scale"])


def assert_tensors_equal(found, expected) -> None:
    assert found.keys() == expected.keys()
    for suffix, array in found.items():
        np.testing.assert_array_equal(array, expected[suffix])


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        (np.full((256, 256), np.nan), "not finite"),
        (np.zeros((256, 256)), "not finite and positive"),
        (np.ones((256, 256)) - 3 * np.eye(256), "not finite and positive"),
        (1.5 * np.eye(256) - 0.5, "not those of any inputs"),
    ],
)
def test_moments_that_cannot_be_are_refused(moments, message):
    with pytest.raises(ConvertError, match=message):
        factorize(moments, 1)


def test_moments_of_another_size_are_refused(factors):
    rows = weights(2, 256)
    with pytest.raises(ValueError, match="256 columns"):
        feed_back(FORMATS["Q4_0"], rows, FORMATS["Q4_0"].encode(rows), factors[1])
    with pytest.raises(ValueError, match="square"):
        factorize(np.ones((256, 512)), 1)
    rows = weights(2)
    with pytest.raises(ValueError, match="IQ2_S"):
        feed_back(FORMATS["IQ2_S"], rows, FORMATS["IQ2_S"].encode(rows, factors[1].importance), factors[1])


def test_products_and_factor_are_numpys_and_the_same_on_threads():
    n = 2 * STRIPE + 40
    moments = second_moments(inputs(900, n)) + np.eye(n) * 0.01
    alone, threaded = moments.copy(), moments.copy()
    assert cholesky(alone)
    with ThreadPoolExecutor(4) as pool:
        assert cholesky(threaded, pool.map)
    np.testing.assert_array_equal(alone, threaded)
    np.testing.assert_allclose(np.tril(alone), np.linalg.cholesky(moments), rtol=1e-9, atol=1e-12)
    assert not cholesky(-moments)

    left, right = weights(7, n), moments.astype(np.float32)
    out = np.zeros_like(left)
    add_products(left, right, 128, n, 300, out)
    np.testing.assert_allclose(out[:, :300], left[:, 128:] @ right[128:, :300], rtol=1e-4, atol=1e-4)
    assert not out[:, 300:].any()
    errors = output_error(left, right)
    np.testing.assert_allclose(errors, ((left @ moments) * left).sum(axis=1), rtol=1e-4)
