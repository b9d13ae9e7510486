"""Factors folded into tensors: what divides the outputs of one multiplies the columns of others."""

import numpy as np

from bitwright.converter.smoothing.groups import Link
from bitwright.converter.smoothing.view import Folding, SmoothedCheckpoint
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.blocks.plain import BF16


class Folder:
    """Folds factors into a checkpoint, link by link. foldings: what becomes of its tensors so far, by name. factors:
    GGUF tensor -> matrix -> float32 [n_columns], what its inputs are divided by.

    norms: the dtype that norms will be stored in, None for that of the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, norms: str | None = None):
        self.checkpoint, self.norms = checkpoint, norms
        self.foldings: dict[str, Folding] = {}
        self.factors: dict[str, dict[int, np.ndarray]] = {}

    def view(self) -> SmoothedCheckpoint:
        """The checkpoint as it reads with all that has been folded so far."""
        return SmoothedCheckpoint.of(self.checkpoint, self.foldings)

    def fold(self, link: Link, factors: np.ndarray) -> np.ndarray:
        """Folds them into producer and consumers, and returns those that the stored dtype made of them.

        factors: float32 [n_channels], what the producer's channels are divided by.
        """
        tensor = self.checkpoint.tensors[link.producer]
        if len(tensor.shape) == 1:
            dtype = self.norms or tensor.dtype
            values, factors = fold_norm(self.checkpoint.read(link.producer), factors, link.plus_one, dtype)
            self.foldings[link.producer] = Folding(values=values)
        else:
            rows = np.ones(tensor.n_rows, np.float32)
            rows[slice(*link.rows)] = 1 / factors
            before = self.foldings.get(link.producer, Folding())
            self.foldings[link.producer] = Folding(rows=rows, columns=before.columns)
        if link.bias is not None:
            bias = self.checkpoint.read(link.bias)
            bias[slice(*link.rows)] /= factors
            self.foldings[link.bias] = Folding(values=bias)
        spread = link.spread(factors)
        for consumer in link.consumers:
            before = self.foldings.get(consumer.tensor, Folding())
            self.foldings[consumer.tensor] = Folding(rows=before.rows, columns=spread)
            name, matrix = consumer.statistics
            self.factors.setdefault(name, {})[matrix] = spread
        return factors

    def all_factors(self, n_matrices: dict[str, int]) -> dict[str, np.ndarray]:
        """GGUF tensor -> float32 [n_matrices, n_columns], what its inputs are divided by; n_matrices: by tensor."""
        factors = {}
        for name, matrices in self.factors.items():
            some = next(iter(matrices.values()))
            factors[name] = np.ones((n_matrices[name], len(some)), np.float32)
            for matrix, divided in matrices.items():
                factors[name][matrix] = divided
        return factors


def fold_norm(values: np.ndarray, factors: np.ndarray, plus_one: bool, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """A norm's weights divided by the factors and rounded to the dtype that they are stored in, and the factors that
    this makes of them, which the consumers are multiplied with: so that rounding the norm loses nothing.

    values, factors: float32 [n]; plus_one: the norm multiplies with 1 + values.
    """
    offset = 1.0 if plus_one else 0.0
    whole = values.astype(np.float64) + offset
    stored = _rounded(whole / factors - offset, dtype)
    divided = stored.astype(np.float64) + offset
    # A norm of zero has no input to smooth; one that would round to zero cannot be smoothed so far.
    keep = (whole == 0) | (divided == 0) | ~np.isfinite(divided)
    stored, divided = np.where(keep, values, stored), np.where(keep, whole, divided)
    effective = np.divide(whole, divided, out=np.ones_like(whole), where=whole != 0)
    return stored.astype(np.float32), effective.astype(np.float32)


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    rows = values.astype(np.float32)
    if dtype == "BF16":
        return BF16.decode(BF16.encode(rows))
    return rows.astype(np.float16).astype(np.float32) if dtype == "F16" else rows
