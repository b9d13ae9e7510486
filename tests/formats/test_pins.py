"""Pinned weights in every format of the registry: met, or said not to be, at the cost of their block alone."""

from dataclasses import replace

import numpy as np
import pytest

from bitwright.formats.blocks import fp4
from bitwright.formats.pins import Pin, encode_pinned
from bitwright.formats.registry import FORMATS
from tests.formats.draws import draw, typical

N_ROWS, SIGMA = 8, np.float32(0.02)

every_format = pytest.mark.parametrize("block_format", FORMATS.values(), ids=lambda f: f.name)

# Formats whose scale is a float16: one weight can always be brought within a percent.
FREE_SCALE = [f for f in FORMATS.values() if f.name not in ("F32", "F16", "BF16", "MXFP4", "NVFP4")]


def outliers(seed):
    """Rows with one weight of 10 sigma each, a log-normal importance, and the columns of these weights."""
    rng = np.random.default_rng(seed)
    rows, importance = typical(seed, N_ROWS, 512)
    columns = rng.integers(0, 512, N_ROWS)
    rows[range(N_ROWS), columns] = 10 * SIGMA * rng.choice([-1, 1], N_ROWS) * rng.uniform(0.9, 1.1, N_ROWS)
    return rows, importance, columns


def blocks(block_format, data):
    return data.reshape(len(data), -1, block_format.type_size)


@every_format
@pytest.mark.parametrize("seed", range(4))
def test_outcomes_are_true_and_only_blocks_of_pins_change(block_format, seed):
    _, rows, importance = draw(seed)
    if importance is None and block_format.needs_importance:
        importance = np.ones(rows.shape[1], np.float32)
    rng = np.random.default_rng(seed)
    # Several in one block, several blocks of one row, and a row without any.
    places = [(0, 5), (0, 6), (0, 400), (2, int(rng.integers(512))), (3, int(rng.integers(512)))]
    pins = [Pin(row, column, 10 ** rng.uniform(-3, -1)) for row, column in places]
    data, outcomes = encode_pinned(block_format, rows, importance, "best", pins)

    decoded = block_format.decode(data)
    for pin, outcome in zip(pins, outcomes, strict=True):
        value, came_out = float(rows[pin.row, pin.column]), float(decoded[pin.row, pin.column])
        assert (outcome.pin, outcome.value, outcome.decoded) == (pin, value, came_out)
        assert outcome.within == (abs(came_out - value) <= pin.tolerance * abs(value))

    unpinned = block_format.encode(rows, importance)
    changed = np.argwhere((blocks(block_format, data) != blocks(block_format, unpinned)).any(axis=2))
    allowed = {(pin.row, pin.column // block_format.block_size) for pin in pins}
    assert {(int(row), int(block)) for row, block in changed} <= allowed


@every_format
def test_pinned_blocks_miss_no_more_than_unpinned_ones(block_format):
    rows, importance, columns = outliers(1)
    unpinned = block_format.decode(block_format.encode(rows, importance))
    pins = [Pin(row, int(column), 1e-3) for row, column in enumerate(columns)]
    _, outcomes = encode_pinned(block_format, rows, importance, "best", pins)
    for outcome in outcomes:
        before = abs(float(unpinned[outcome.pin.row, outcome.pin.column]) - outcome.value)
        assert outcome.within or abs(outcome.decoded - outcome.value) <= before


@pytest.mark.parametrize("block_format", FREE_SCALE, ids=lambda f: f.name)
@pytest.mark.parametrize("effort", ["best", "fast"])
def test_float16_scales_bring_an_outlier_within_a_percent(block_format, effort):
    rows, importance, columns = outliers(2)
    pins = [Pin(row, int(column), 0.01) for row, column in enumerate(columns)]
    _, outcomes = encode_pinned(block_format, rows, importance, effort, pins)
    assert [outcome for outcome in outcomes if not outcome.within] == []


@pytest.mark.parametrize(("name", "steps"), [("MXFP4", fp4.MXFP4_STEPS), ("NVFP4", fp4.NVFP4_STEPS)])
def test_four_bit_floats_come_as_near_as_their_grid_has_points(name, steps):
    rows, importance, columns = outliers(3)
    pins = [Pin(row, int(column), 1e-6) for row, column in enumerate(columns)]
    _, outcomes = encode_pinned(FORMATS[name], rows, importance, "best", pins)
    with np.errstate(over="ignore"):
        grid = np.unique(steps[:, None] * fp4.LEVELS).astype(np.float64)
    for outcome in outcomes:
        assert not outcome.within
        assert abs(outcome.decoded - outcome.value) == np.abs(grid - abs(outcome.value)).min()


@every_format
def test_column_of_no_importance_can_be_pinned(block_format):
    rows, importance, columns = outliers(4)
    importance[columns] = 0
    everywhere = np.zeros_like(importance)
    pins = [Pin(row, int(column), 0.15) for row, column in enumerate(columns)]
    for weights in (importance, everywhere):
        _, outcomes = encode_pinned(block_format, rows, weights, "best", pins)
        assert [outcome for outcome in outcomes if not outcome.within] == []


@every_format
def test_pins_that_are_met_anyway_change_nothing(block_format):
    rows, importance, columns = outliers(5)
    unpinned = block_format.encode(rows, importance)
    errors = np.abs(block_format.decode(unpinned).astype(np.float64) / rows - 1)[range(N_ROWS), columns]
    pins = [Pin(row, int(columns[row]), 1.001 * errors[row] + 1e-9) for row in range(N_ROWS)]
    data, outcomes = encode_pinned(block_format, rows, importance, "best", pins)
    np.testing.assert_array_equal(data, unpinned)
    assert all(outcome.within for outcome in outcomes)


@every_format
@pytest.mark.parametrize("effort", ["best", "fast"])
def test_no_pins_change_nothing(block_format, effort):
    rows, importance, _ = outliers(6)
    data, outcomes = encode_pinned(block_format, rows, importance, effort, [])
    np.testing.assert_array_equal(data, block_format.encode(rows, importance, effort))
    assert outcomes == []


@every_format
def test_same_pins_in_any_order_give_the_same_bytes(block_format):
    rows, importance, columns = outliers(7)
    pins = [Pin(row, int(column), 0.01) for row, column in enumerate(columns)]
    pins += [Pin(row, (int(column) + 1) % 512, 0.02) for row, column in enumerate(columns)]
    data, outcomes = encode_pinned(block_format, rows, importance, "best", pins)
    again, reversed_outcomes = encode_pinned(block_format, rows, importance, "best", pins[::-1])
    np.testing.assert_array_equal(data, again)
    assert outcomes == reversed_outcomes[::-1]


def test_smallest_raise_that_suffices_is_taken():
    block_format, place = FORMATS["Q4_0"], (0, 3)
    rows, _ = typical(8, 1, block_format.block_size)
    rows[place] = 10 * SIGMA
    trials = []

    def recorded(*arguments):
        trials.append((arguments[1], block_format.encode(*arguments)))
        return trials[-1][1].copy()

    ones = np.ones(block_format.block_size, np.float32)
    data, (outcome,) = encode_pinned(replace(block_format, encode=recorded), rows, ones, "best", [Pin(*place, 1e-3)])
    errors = [abs(block_format.decode(encoded)[place] / rows[place] - 1) for _, encoded in trials]
    assert outcome.within
    assert len(trials) > 1
    assert [error <= 1e-3 for error in errors] == [False] * (len(trials) - 1) + [True]
    np.testing.assert_array_equal(data, trials[-1][1])
    raises = [importance[place[1]] for importance, _ in trials]
    assert raises == sorted(set(raises))


def test_importance_at_the_end_of_float32_does_not_overflow():
    rows, _, columns = outliers(9)
    importance = np.full(512, np.finfo(np.float32).max)
    pins = [Pin(row, int(column), 1e-3) for row, column in enumerate(columns)]
    _, outcomes = encode_pinned(FORMATS["Q4_K"], rows, importance, "best", pins)
    assert all(outcome.within for outcome in outcomes)


@pytest.mark.parametrize(
    "pin", [Pin(N_ROWS, 0, 0.1), Pin(0, 512, 0.1), Pin(-1, 0, 0.1), Pin(0, 0, 0.0), Pin(0, 0, np.nan)]
)
def test_pin_that_cannot_be_is_refused(pin):
    rows, importance, _ = outliers(10)
    with pytest.raises(ValueError, match="Pin"):
        encode_pinned(FORMATS["Q4_0"], rows, importance, "best", [pin])
