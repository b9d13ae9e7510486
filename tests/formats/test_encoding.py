"""What encoders do before their kernels run: checks, and the importance of each block."""

import numpy as np
import pytest

from bitwright.formats.encoding import SMALLEST_WEIGHT, to_blocks
from bitwright.formats.errors import ConvertError

ROWS = np.arange(12, dtype=np.float32).reshape(2, 6)


def test_blocks_are_a_read_only_view_of_the_rows():
    blocks, weights = to_blocks(ROWS, None, 3)
    assert np.shares_memory(blocks, ROWS)
    assert ROWS.flags.writeable
    assert not blocks.flags.writeable
    np.testing.assert_array_equal(blocks, [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]])
    np.testing.assert_array_equal(weights, np.ones((2, 3)))


def test_each_block_is_weighted_relative_to_its_most_important_column():
    _, weights = to_blocks(ROWS, np.array([1, 2, 4, 0, 0, 3e30], np.float32), 3)
    np.testing.assert_array_equal(weights, np.float32([[0.25, 0.5, 1], [SMALLEST_WEIGHT, SMALLEST_WEIGHT, 1]]))


@pytest.mark.parametrize("nothing", [0.0, 1e-45])
def test_block_without_importance_weighs_its_columns_alike(nothing):
    _, weights = to_blocks(ROWS, np.array([nothing] * 3 + [1, 2, 4], np.float32), 3)
    np.testing.assert_array_equal(weights, [[1, 1, 1], [0.25, 0.5, 1]])


@pytest.mark.parametrize(
    "rows", [ROWS.astype(np.float64), ROWS[0], ROWS[:, ::2], np.zeros((2, 5), np.float32), np.zeros((2, 0), np.float32)]
)
def test_rows_of_the_wrong_kind_are_a_programming_error(rows):
    with pytest.raises(ValueError, match=r"rows must be|no positive multiple"):
        to_blocks(rows, None, 3)


@pytest.mark.parametrize("importance", [np.ones(5, np.float32), np.ones(6), np.ones((1, 6), np.float32)])
def test_importance_of_the_wrong_kind_is_a_programming_error(importance):
    with pytest.raises(ValueError, match="importance must be"):
        to_blocks(ROWS, importance, 3)


def test_first_weight_that_is_not_finite_is_named():
    rows = ROWS.copy()
    rows[1, 4] = np.nan
    with pytest.raises(ConvertError, match="weight nan") as error:
        to_blocks(rows, None, 3)
    assert error.value.where == "row 1, column 4"


def test_negative_importance_is_named():
    with pytest.raises(ConvertError, match="importance -2") as error:
        to_blocks(ROWS, np.array([1, 1, -2, 1, 1, 1], np.float32), 3)
    assert error.value.where == "column 2"


def test_no_rows_make_no_blocks():
    assert to_blocks(np.zeros((0, 6), np.float32), None, 3)[0].shape == (0, 3)
