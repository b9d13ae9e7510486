"""What is known of the inputs of one parameter's matrices: what adds up in any order, and ranges, which do not."""

from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from bitwright.calibration.statistics.histogram import N_BINS, N_MAGNITUDES


@dataclass(eq=False)
class InputSums:
    """Fields of MatrixInputs that are exact, to which more is added in place. The extremes of a matrix that no row has
    reached are infinite."""

    minima: np.ndarray
    maxima: np.ndarray
    counts: np.ndarray
    values: np.ndarray
    peaks: np.ndarray

    @classmethod
    def empty(cls, n_matrices: int, n_columns: int) -> Self:
        return cls(
            minima=np.full((n_matrices, n_columns), np.inf, np.float32),
            maxima=np.full((n_matrices, n_columns), -np.inf, np.float32),
            counts=np.zeros(n_matrices, np.int64),
            values=np.zeros((n_matrices, N_BINS), np.int64),
            peaks=np.zeros((n_matrices, N_MAGNITUDES + 1), np.int64),
        )

    def add(self, other: "InputSums", matrices: slice = slice(None)) -> None:
        """Other rows of these matrices."""
        for key in EXACT:
            combine(key, getattr(self, key)[matrices], getattr(other, key))

    def ends(self) -> np.ndarray:
        """The smallest and the largest input of every matrix, float32 [n_matrices, 2]; infinite where it had none."""
        return np.stack([self.minima.min(axis=1), self.maxima.max(axis=1)], axis=1)


EXACT = tuple(field.name for field in fields(InputSums))


def combine(key: str, into: np.ndarray, values: np.ndarray) -> None:
    """Add values of a field of InputSums, in place."""
    if key == "minima":
        np.minimum(into, values, out=into)
    elif key == "maxima":
        np.maximum(into, values, out=into)
    else:
        into += values


def smoothed(ends: np.ndarray, decay: float, before: np.ndarray | None = None) -> np.ndarray:
    """The ranges of matrices after the next micro-batches, float64 [n_matrices, 2]; not a number where none has reached
    the matrix. ends: float32 [n_batches, n_matrices, 2], of each in order as of InputSums. decay: of what was before, a
    step. before: the ranges so far."""
    ranges = np.full(ends.shape[1:], np.nan) if before is None else before.copy()
    for of_batch in ends:
        seen = of_batch[:, 0] <= of_batch[:, 1]
        kept = np.where(np.isnan(ranges[seen]), 0.0, decay)
        ranges[seen] = kept * np.nan_to_num(ranges[seen]) + (1 - kept) * of_batch[seen].astype(np.float64)
    return ranges
