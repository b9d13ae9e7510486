"""Second moments of a layer's inputs, made ready for rounding under them; see formats/feedback/choose.py."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bitwright.formats.errors import ConvertError
from bitwright.formats.kernels.products import Run, cholesky
from bitwright.formats.parts import Blocked, ScalarBlocks

DAMPING = 0.02
"""Share of the off-diagonal second moments that is taken away."""

ORDER = "descending second moments"
"""In which columns are rounded."""

# A column's second moment is at least this share of the mean: inputs that were never seen do not weigh nothing.
_LEAST_MOMENT = 1e-6


@dataclass(frozen=True, eq=False)
class Factor:
    """Second moments of a layer's inputs, made ready for the rounding.

    matrix: float32 [n, n], damped, with a mean diagonal of 1. order: int64 [n], the column at each position; groups of
    `unit` columns stay together. lower: float32 [n, n], L of the positions. pivots: float32 [n], D.
    """

    matrix: np.ndarray
    order: np.ndarray
    lower: np.ndarray
    pivots: np.ndarray
    unit: int

    @property
    def importance(self) -> np.ndarray:
        """What the encoder that goes first should weigh its columns by, float32 [n]: the root of the second moment,
        half way between no feedback, the second moment itself, and one that evens all columns out."""
        importance: np.ndarray = np.sqrt(self.matrix.diagonal())
        return importance

    @cached_property
    def column_forms(self) -> tuple[np.ndarray, np.ndarray]:
        """H of the columns of every unit, and its inverse: float32 [n / unit, unit, unit]."""
        forms = self._corners(self.matrix.astype(np.float64))
        return forms.astype(np.float32), np.linalg.inv(forms).astype(np.float32)

    @cached_property
    def position_forms(self) -> np.ndarray:
        """What errors of the positions of a unit cost, the units behind being rounded and those before free to make up
        for them: L D L' of these positions alone, float32 [n / unit, unit, unit]."""
        lower = self._corners(self.lower).astype(np.float64)
        pivots = self.pivots.reshape(-1, 1, self.unit)
        forms: np.ndarray = lower * pivots @ lower.transpose(0, 2, 1)
        return forms.astype(np.float32)

    def _corners(self, matrix: np.ndarray) -> np.ndarray:
        starts = np.arange(0, len(matrix), self.unit)
        return np.stack([matrix[i : i + self.unit, i : i + self.unit] for i in starts])


def unit_of(block_format: Blocked) -> int:
    """Columns that the format chooses together: 1, or 8 where a codebook does."""
    return 1 if isinstance(block_format.blocks, ScalarBlocks) else 8


def factorize(moments: np.ndarray, unit: int, damping: float = DAMPING, run: Run = map) -> Factor:
    """moments: float32 or float64 [n, n], symmetric, sums or means of x x'; unit: as unit_of; run: as for cholesky.

    Raises ConvertError for moments that are not finite, or all zero; ValueError for another shape.
    """
    n = len(moments)
    if moments.shape != (n, n) or n % unit:
        raise ValueError(f"second moments must be a square matrix of a multiple of {unit} columns, not {moments.shape}")
    diagonal = moments.diagonal().astype(np.float64)
    mean = diagonal.mean()
    if not (np.isfinite(moments).all() and mean > 0 and diagonal.min() >= 0):
        raise ConvertError(
            "the second moments of the inputs are not finite and positive",
            "error feedback",
            "calibrate again, or add --no-error-feedback",
        )
    scaled = moments * ((1 - damping) / mean)
    np.fill_diagonal(scaled, np.maximum(diagonal / mean, _LEAST_MOMENT))
    matrix = scaled.astype(np.float32)
    order = np.argsort(matrix.diagonal().reshape(-1, unit).sum(axis=1), kind="stable")
    order = (order[:, None] * unit + np.arange(unit)).ravel()
    factor = matrix[np.ix_(order, order)].astype(np.float64)
    if not cholesky(factor, run):
        raise ConvertError(
            "the second moments of the inputs are not those of any inputs",
            "error feedback",
            "calibrate again, or add --no-error-feedback",
        )
    roots = factor.diagonal().copy()
    lower = np.tril(factor)
    lower /= roots
    return Factor(matrix, order, lower.astype(np.float32), (roots * roots).astype(np.float32), unit)
