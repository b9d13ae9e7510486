"""How a matrix of the artifact is laid out beside the stored one: which rows and columns, in what order, turned over or
not, and what became of the values. Plain data; every layout has an inverse."""

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

import numpy as np

Values = Literal["same", "plus_one", "negative_exponential"]
"""same                  as they are
plus_one              every value + 1 (a norm that is stored as its deviation from one)
negative_exponential  -exp(value) (the decay of a state space, stored as its logarithm)"""


@dataclass(frozen=True)
class Selection:
    """Which of the stored rows (or columns) a tensor has, and in what order.

    sizes: of the axes that the stored ones are counted by, slowest first. order: these axes, slowest first, as the
    tensor counts them. spans: of every stored axis what is taken of it, (first, the one after the last).
    first: the stored one that the axes count from. then: what follows in the tensor, None where this is all.
    copies: how often each of those before it is taken, one copy after the other.
    """

    sizes: tuple[int, ...]
    order: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    first: int = 0
    then: "Selection | None" = None
    copies: int = 1

    def __len__(self) -> int:
        taken = prod(stop - start for start, stop in self.spans)
        return self.copies * taken + (0 if self.then is None else len(self.then))

    def indices(self) -> np.ndarray:
        """Of the stored ones, in the tensor's order: int64 [len(self)], not to be written to."""
        return _indices(self)


@lru_cache(maxsize=64)
def _indices(selection: Selection) -> np.ndarray:
    stored = selection.first + np.arange(prod(selection.sizes)).reshape(selection.sizes)
    taken = stored[tuple(slice(*span) for span in selection.spans)]
    indices = np.repeat(taken.transpose(selection.order).reshape(-1), selection.copies)
    if selection.then is not None:
        indices = np.concatenate([indices, selection.then.indices()])
    indices.flags.writeable = False
    return indices


@dataclass(frozen=True)
class Layout:
    """How a tensor is made of a stored one, in this order.

    rows, columns: what is taken of the stored rows, over all matrices, and columns; None for all as they are. The
    values of a vector are rows.
    transposed: then every matrix is turned over.
    values: what becomes of each value. factors: then the rows made of one source are multiplied: (how many, by what),
    one after the other; () for none.
    observed: whether the runtime multiplies the inputs with it that the model multiplies the stored tensor with; where
    it does not (a projection that was absorbed into another), no statistics of inputs belong to it.
    """

    rows: Selection | None = None
    columns: Selection | None = None
    transposed: bool = False
    values: Values = "same"
    factors: tuple[tuple[int, float], ...] = ()
    observed: bool = True

    def to_artifact(self, rows: np.ndarray, start: int) -> np.ndarray:
        """What becomes of the values of rows made of one source, float32 [n, n_columns], from its row `start` on."""
        if self.values == "plus_one":
            rows = rows + np.float32(1)
        elif self.values == "negative_exponential":
            rows = -np.exp(rows)
        return rows * self._multipliers(start, start + len(rows)) if self.factors else rows

    def to_stored(self, rows: np.ndarray) -> np.ndarray:
        """The inverse of `to_artifact`, of all rows made of one source."""
        rows = rows / self._multipliers(0, len(rows)) if self.factors else rows
        if self.values == "plus_one":
            return rows - np.float32(1)
        return np.log(-rows) if self.values == "negative_exponential" else rows

    def _multipliers(self, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start, 1]"""
        counts, factors = zip(*self.factors, strict=True)
        return np.repeat(np.array(factors, np.float32), counts)[start:stop, None]


AS_STORED = Layout()
