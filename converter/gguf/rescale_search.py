"""By which factor a neuron is rescaled so that its super weight lands on the grid and its neighbours suffer least.

The down projection's column is divided by the factor and the up projection's row multiplied by it, so that all factors
compute the same function; what differs is the rounding of the blocks that the column runs through. Factors are tried by
really encoding these blocks, of the rows that hold super weights and of a sample of the others.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from bitwright.converter.gguf.encode import encoding_errors
from bitwright.converter.model.stored_rows import read_rows
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.choices import Effort
from bitwright.formats.registry import get_format
from bitwright.profiles.planning.plan import PlannedTensor

STEPS_PER_OCTAVE = 8
_SAMPLED_ROWS = 128
# How far factors reach below 1, and beyond what makes the super weight as large as its neighbours are.
_REACH = 4.0


def choose_factors(
    checkpoint: Checkpoint,
    planned: PlannedTensor,
    places: Sequence[tuple[int, int, int]],
    importance: np.ndarray | None,
    tolerance: float,
    effort: Effort,
) -> list[tuple[int, int, float]]:
    """(matrix, neuron, factor) of every neuron that is better rescaled; empty where none is.

    places: (matrix, row, column) of the super weights of a down projection. importance: float32 [n_matrices,
    n_columns], mean squared inputs. Of two factors the one is better that brings more of its super weights within the
    tolerance, and of equals the one with the smaller weighted error.
    """
    rows_of: dict[tuple[int, int], list[int]] = defaultdict(list)
    for matrix, row, column in places:
        rows_of[matrix, column].append(row)
    factors = []
    for (matrix, column), rows in sorted(rows_of.items()):
        columns_importance = None if importance is None else importance[matrix]
        blocks = _Blocks(checkpoint, planned, matrix, column, sorted(rows), columns_importance)
        factor = blocks.best_factor(tolerance, effort)
        if factor != 1:
            factors.append((matrix, column, factor))
    return factors


class _Blocks:
    """The blocks that a column runs through: weights float32 [n_rows, block_size], of which the first n_special hold
    super weights at `place`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        planned: PlannedTensor,
        matrix: int,
        column: int,
        rows: list[int],
        importance: np.ndarray | None,
    ):
        tensor, self.planned = planned.tensor, planned
        size = get_format(planned.format).block_size
        span = slice(column // size * size, column // size * size + size)
        n_rows = tensor.n_rows // tensor.n_matrices
        others = np.setdiff1d(np.arange(0, n_rows, max(1, n_rows // _SAMPLED_ROWS)), rows)
        first = matrix * n_rows
        weights = [
            read_rows(checkpoint, tensor, first + row, first + row + 1)[0, span] for row in (*rows, *others.tolist())
        ]
        self.weights, self.place, self.n_special = np.array(weights), column % size, len(rows)
        # A sampled row stands for those that were left out.
        self.row_weights = np.ones(len(weights))
        self.row_weights[len(rows) :] = (n_rows - len(rows)) / max(1, len(others))
        self.importance = np.ones(size, np.float32) if importance is None else importance[span]

    def best_factor(self, tolerance: float, effort: Effort) -> float:
        costs = {factor: self._cost(factor, tolerance, effort) for factor in self._factors()}
        return min(costs, key=lambda factor: (costs[factor], factor != 1, factor))

    def _factors(self) -> list[float]:
        special = np.abs(self.weights[: self.n_special, self.place]).max()
        around = float(np.sqrt(np.square(np.delete(self.weights[: self.n_special], self.place, axis=1)).mean()))
        most = _REACH * max(1.0, special / around if around else 1.0)
        low, high = (round(STEPS_PER_OCTAVE * float(np.log2(end))) for end in (1 / _REACH, most))
        return [2.0 ** (step / STEPS_PER_OCTAVE) for step in range(low, high + 1)]

    def _cost(self, factor: float, tolerance: float, effort: Effort) -> tuple[int, float]:
        """Super weights beyond the tolerance, and the weighted squared error of the column's blocks as the network
        sees it."""
        scaled, importance = self.weights.copy(), self.importance.astype(np.float64)
        scaled[:, self.place] /= np.float32(factor)
        importance[self.place] *= factor**2
        errors = encoding_errors(self.planned, scaled, importance, effort)
        special = np.abs(errors[: self.n_special, self.place]) > tolerance * np.abs(
            scaled[: self.n_special, self.place]
        )
        return int(special.sum()), float((self.row_weights[:, None] * np.square(errors) * importance).sum())
