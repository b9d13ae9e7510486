"""Rescaled rows and columns: what a plan stores multiplied, so that another tensor makes up for it."""

from collections.abc import Sequence

import numpy as np

from bitwright.calibration.statistics.second_moments import Moments
from bitwright.profiles.vocabulary import Rescaled, TensorSpec


def rescale_rows(spec: TensorSpec, rows: np.ndarray, start: int) -> np.ndarray:
    """The rows of a tensor from row `start` on, over all its matrices, multiplied as the spec says: float32 [n_rows,
    n_columns]. Products are rounded once, from float64."""
    if not spec.rescaled or not len(rows):
        return rows
    rows_per_matrix = spec.n_rows // spec.n_matrices
    rows = rows.copy()
    for part in spec.rescaled:
        first = part.matrix * rows_per_matrix - start
        if part.axis == "row":
            span = slice(max(first + part.index, 0), max(first + part.index + 1, 0))
            rows[span] = rows[span].astype(np.float64) * part.factor
        else:
            span = slice(max(first, 0), max(first + rows_per_matrix, 0))
            rows[span, part.index] = rows[span, part.index].astype(np.float64) * part.factor
    return rows


def rescale_importance(rescaled: Sequence[Rescaled], columns: np.ndarray) -> np.ndarray:
    """Mean squared inputs, float32 [n_matrices, n_columns], of a tensor with rescaled columns: what its column is
    divided by, its input is multiplied by."""
    columns = columns.astype(np.float64)
    for part in rescaled:
        if part.axis == "column":
            columns[part.matrix, part.index] /= part.factor**2
    return columns.astype(np.float32)


def input_factors(spec: TensorSpec, matrix: int) -> np.ndarray | None:
    """By what the inputs of one matrix are multiplied, float64 [n_columns]; None where no column is rescaled."""
    rescaled = [part for part in spec.rescaled if part.axis == "column" and part.matrix == matrix]
    if not rescaled:
        return None
    factors = np.ones(spec.n_columns)
    for part in rescaled:
        factors[part.index] /= part.factor
    return factors


def rescale_moments(factors: np.ndarray, moments: Moments) -> Moments:
    """Of inputs that are multiplied by these factors, float64 [n_columns]."""
    matrix = moments.matrix * factors * factors[:, None]
    return Moments(matrix.astype(np.float32), (moments.held_out * factors).astype(np.float32))
