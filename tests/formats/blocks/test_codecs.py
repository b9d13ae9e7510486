"""Every block format of the registry, held against gguf's decoder, ggml's decoder and ggml's encoder."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.formats.errors import ConvertError
from bitwright.formats.registry import FORMATS
from scripts.peers import ggml
from tests.formats.cases import CASES
from tests.formats.draws import draw, typical, weighted_nmse

N_DRAWS = 200
# Squared rounding of a float16 scale: below it, which of two encoders comes nearer is chance.
F16_ROUNDING = 2.0**-22

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_format = pytest.mark.parametrize("block_format", [FORMATS[case.name] for case in CASES], ids=lambda f: f.name)
every_effort = pytest.mark.parametrize("effort", ["best", "fast"])


def encoded_nmse(block_format, rows, importance, effort) -> float:
    return weighted_nmse(rows, block_format.decode(block_format.encode(rows, importance, effort)), importance)


def ggml_nmse(block_format, rows, importance) -> float:
    data = ggml.quantize(rows, block_format.name, importance)
    return weighted_nmse(rows, ggml.dequantize(data, block_format.name, rows.shape[1]), importance)


def drawn(block_format, seed):
    """As draw, with ones for no importance where the format asks for one."""
    what, rows, importance = draw(seed)
    if importance is None and block_format.needs_importance:
        importance = np.ones(rows.shape[1], np.float32)
    return what, rows, importance


def test_every_block_format_has_a_case():
    block_formats = [name for name, block_format in FORMATS.items() if block_format.block_size > 1]
    assert sorted(block_formats) == sorted(case.name for case in CASES)


@every_format
def test_row_bytes_are_ggmls(block_format):
    n_columns = 2 * block_format.block_size
    assert block_format.row_bytes(n_columns) == ggml.row_bytes(block_format.name, n_columns)


@every_case
def test_golden_block_decodes_to_what_the_layout_says(case):
    data = np.frombuffer(case.block, np.uint8)[None]
    np.testing.assert_array_equal(FORMATS[case.name].decode(data)[0], case.weights.astype(np.float32))


@every_format
def test_decode_equals_both_independent_decoders_bit_for_bit(block_format):
    rng = np.random.default_rng(1)
    n_columns = 3 * block_format.block_size
    data = rng.integers(0, 256, (200, block_format.row_bytes(n_columns)), np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):  # random float16 scales are NaN and infinite at times
        ours = block_format.decode(data)
        references = [ggml.dequantize(data, block_format.name, n_columns)]
        if block_format.ggml_type in gguf.quants._type_traits:
            references.append(gguf.quants.dequantize(data, block_format.ggml_type))
    assert ours.dtype == np.float32
    for reference in references:
        number = ~np.isnan(reference)
        np.testing.assert_array_equal(np.isnan(ours), ~number)  # which NaN it is has no meaning
        np.testing.assert_array_equal(ours[number].view(np.uint32), reference[number].view(np.uint32))


@every_case
@every_effort
def test_error_on_typical_weights_stays_below_ggmls(case, effort):
    block_format = FORMATS[case.name]
    rows, importance = typical(seed=3)
    ratio = encoded_nmse(block_format, rows, importance, effort) / ggml_nmse(block_format, rows, importance)
    assert ratio <= getattr(case, effort)


@every_format
def test_error_is_never_much_above_ggmls(block_format):
    worse = []
    for seed in range(N_DRAWS):
        what, rows, importance = drawn(block_format, seed)
        ours, theirs = encoded_nmse(block_format, rows, importance, "best"), ggml_nmse(block_format, rows, importance)
        if ours > max(1.02 * theirs, F16_ROUNDING):
            worse.append(f"{what}: {ours:.3g} against {theirs:.3g}")
    assert not worse


@every_format
@every_effort
@settings(max_examples=20, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=6),
    weights=st.none() | st.lists(st.floats(0, width=32, allow_infinity=False), min_size=1, max_size=4),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 1000),
)
def test_any_finite_rows_decode_to_finite_rows(block_format, effort, values, weights, shape, seed):
    rng = np.random.default_rng(seed)
    n_rows, n_columns = shape[0], shape[1] * block_format.block_size
    rows = rng.choice(np.array(values, np.float32), (n_rows, n_columns))
    importance = None if weights is None else rng.choice(np.array(weights, np.float32), n_columns)
    decoded = block_format.decode(block_format.encode(rows, importance, effort))
    assert decoded.shape == rows.shape
    assert np.isfinite(decoded).all()


@every_format
@every_effort
def test_zeros_stay_zeros(block_format, effort):
    rows = np.zeros((2, 2 * block_format.block_size), np.float32)
    for importance in (None, np.zeros(rows.shape[1], np.float32)):
        np.testing.assert_array_equal(block_format.decode(block_format.encode(rows, importance, effort)), rows)


@every_format
def test_importance_of_zero_everywhere_is_no_importance(block_format):
    rows, _ = typical(seed=5, n_rows=2)
    zeros, ones = np.zeros(rows.shape[1], np.float32), np.ones(rows.shape[1], np.float32)
    np.testing.assert_array_equal(block_format.encode(rows, zeros), block_format.encode(rows, ones))


@every_format
@pytest.mark.parametrize("magnitude", [1e-45, 1e-30, 1e-7, 65504.0, 3e38])
def test_weights_at_the_ends_of_float32_decode_to_finite_rows(block_format, magnitude):
    rows = np.float32(magnitude) * np.tile(np.array([1, -1, 0.5, 0], np.float32), (2, block_format.block_size // 4))
    decoded = block_format.decode(block_format.encode(rows))
    assert np.isfinite(decoded).all()
    assert float(np.abs(decoded).max()) <= 2 * float(np.abs(rows).max())


@every_format
@every_effort
def test_bytes_do_not_depend_on_how_rows_are_cut(block_format, effort):
    rows, importance = typical(seed=7, n_rows=7)
    whole = block_format.encode(rows, importance, effort)
    pieces = [block_format.encode(rows[first:last], importance, effort) for first, last in ((0, 1), (1, 3), (3, 7))]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


@every_format
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weight_that_is_not_finite_is_refused_with_its_place(block_format, bad):
    rows = np.ones((3, 2 * block_format.block_size), np.float32)
    rows[1, 5] = bad
    with pytest.raises(ConvertError) as error:
        block_format.encode(rows)
    assert error.value.where == "row 1, column 5"


@every_format
@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_importance_that_is_no_importance_is_refused_with_its_place(block_format, bad):
    rows = np.ones((1, block_format.block_size), np.float32)
    importance = np.ones(block_format.block_size, np.float32)
    importance[9] = bad
    with pytest.raises(ConvertError) as error:
        block_format.encode(rows, importance)
    assert error.value.where == "column 9"
