"""Sums of squared gradients: from the parameters of the model to the factors of every tensor."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bitwright.calibration.statistics.importance import PRIOR_ROWS

if TYPE_CHECKING:
    from bitwright.calibration.places import MatrixNames
    from bitwright.calibration.stream.observer import Sums
    from bitwright.calibration.stream.weights import ParameterReader

# What is summed over all samples for a parameter: name -> float64 values. A matrix may be made of several blocks of as
# many rows, which are tensors of their own in the checkpoint, as the gate and the up projection of an expert.
#   rows            [n_matrices, n_rows]    squared gradients, summed over the columns
#   columns         [n_blocks, n_columns]   the same, summed over the rows of each block; n_blocks: of all matrices
#   count           [n_matrices, 1]         inputs seen; of an embedding [1, n_rows], how often each row was looked up
#   inputs          [n_columns]             inputs, over all matrices; an embedding has none
#   squared_inputs  [n_columns]
KINDS = ("rows", "columns", "count", "inputs", "squared_inputs")


@dataclass
class GradientSums:
    """The sums of a tensor's matrices, in order. rows: [n_matrices, n_rows], columns: [n_matrices, n_columns], squared
    gradients; counts: [n_matrices, 1], inputs seen; input_variance: the mean over columns, 0 for an embedding."""

    rows: np.ndarray
    columns: np.ndarray
    counts: np.ndarray
    input_variance: float

    def factors(self, n_labels: int) -> tuple[np.ndarray, np.ndarray]:
        """Row and column factors whose products have the same sums, per label."""
        rows, columns = self.rows / n_labels, self.columns / n_labels
        if (self.counts != self.counts[0]).any():
            # Experts: what all tokens have shown is a prior for each, as for ImportanceMatrix.columns, and one that no
            # token reached is taken to be reached once.
            rows, columns = (
                (sums + PRIOR_ROWS * sums.sum(0) / self.counts.sum())
                * (np.maximum(self.counts, 1) / (self.counts + PRIOR_ROWS))
                for sums in (rows, columns)
            )
        totals = rows.sum(1, keepdims=True)
        scale = np.sqrt(totals, out=np.ones_like(totals), where=totals > 0)
        # Rounding has left the columns with another sum than the rows: the rows' is kept.
        column_totals = np.where(totals > 0, columns.sum(1, keepdims=True), 1)
        return rows / scale, columns / column_totals * scale

    def mean_square_gradient(self, n_labels: int) -> float:
        """Over all weights, per label."""
        return float(self.rows.sum() / n_labels / (self.rows.size * self.columns.shape[1]))

    def __add__(self, other: "GradientSums") -> "GradientSums":
        """The sums of a tensor that is used twice, such as an embedding that is the head too."""
        return GradientSums(
            self.rows + other.rows,
            self.columns + other.columns,
            self.counts + other.counts,
            max(self.input_variance, other.input_variance),
        )


def by_tensor(sums: "Sums", parameters: "ParameterReader", names: "MatrixNames") -> dict[str, GradientSums]:
    """The sums of the GGUF tensors in names."""
    by_matrix: dict[str, dict[int, GradientSums]] = {}
    for parameter, rows in sums["rows"].items():
        blocks = _blocks(sums, parameter)
        n_blocks = len(blocks.rows) // len(rows)
        for place, span, block in parameters.places(parameter, len(rows), names):
            # A stored tensor has one block of one matrix, or all of every matrix.
            of = slice(span.start * n_blocks + block, span.stop * n_blocks, n_blocks)
            part = GradientSums(
                place.of_rows(blocks.rows[of]),
                place.of_columns(blocks.columns[of]),
                place.of_matrices(blocks.counts[of]),
                blocks.input_variance,
            )
            matrices = by_matrix.setdefault(place.tensor, {})
            matrices[place.matrix] = matrices[place.matrix] + part if place.matrix in matrices else part
    return {tensor: _stacked([matrices[i] for i in sorted(matrices)]) for tensor, matrices in sorted(by_matrix.items())}


def _blocks(sums: "Sums", parameter: str) -> GradientSums:
    """The sums of a parameter, every block of a matrix as a matrix of its own."""
    rows, columns, counts = (sums[kind][parameter] for kind in ("rows", "columns", "count"))
    if parameter in sums["inputs"]:
        mean, mean_square = (sums[kind][parameter] / counts.sum() for kind in ("inputs", "squared_inputs"))
        variance = float((mean_square - mean**2).mean())
    else:
        rows, counts, variance = _with_unseen_tokens(rows, counts), counts.sum(1, keepdims=True), 0.0
    n_blocks = len(columns) // len(rows)
    return GradientSums(rows.reshape(len(columns), -1), columns, counts.repeat(n_blocks, axis=0), variance)


def _stacked(matrices: list[GradientSums]) -> GradientSums:
    return GradientSums(
        np.concatenate([sums.rows for sums in matrices]),
        np.concatenate([sums.columns for sums in matrices]),
        np.concatenate([sums.counts for sums in matrices]),
        float(np.mean([sums.input_variance for sums in matrices])),
    )


def _with_unseen_tokens(rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The row sums of an embedding, of which the tokens that the text lacks get their share.

    As Good and Turing have it, tokens not seen are together as frequent as those seen once; all of them are taken to
    be equally frequent. rows, counts: [1, vocabulary]; the sum stays.
    """
    unseen = counts == 0
    share = (counts == 1).sum() / counts.sum()
    if not unseen.any() or share == 1:
        return rows
    shared: np.ndarray = np.where(unseen, share * rows.sum() / unseen.sum(), (1 - share) * rows)
    return shared
