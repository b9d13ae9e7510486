"""Where what a pass over the model observes goes: from a checkpoint's tensors to those of a GGUF."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Place:
    """Where the statistics of a stored tensor go: matrices `matrix` to `matrix + n_matrices` of a GGUF tensor.

    rows, columns: which of a matrix's rows (outputs of the product) and columns (its inputs), in order, whatever way
    the tensor is stored; int64 arrays, None for all of them as they are. Where one matrix of the model becomes several
    of the GGUF, its rows are dealt out to them in order, and all of them have the same columns.
    """

    tensor: str
    matrix: int
    n_matrices: int = 1
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None

    def of_columns(self, values: np.ndarray) -> np.ndarray:
        """Values [n, n_columns] of the stored matrices as [n_matrices, ...] of the GGUF's."""
        taken = values if self.columns is None else values[:, self.columns]
        return self.of_matrices(taken)

    def of_rows(self, values: np.ndarray) -> np.ndarray:
        """Values [n, n_rows] of the stored matrices as [n_matrices, ...] of the GGUF's."""
        taken = values if self.rows is None else values[:, self.rows]
        return taken.reshape(max(self.n_matrices, len(values)), -1)

    def stored_columns(self, values: np.ndarray) -> np.ndarray:
        """Values [..., n_columns] of the GGUF's columns in the order of the stored ones; zeros for others."""
        if self.columns is None:
            return values
        stored = np.zeros((*values.shape[:-1], max(values.shape[-1], int(self.columns.max()) + 1)), values.dtype)
        stored[..., self.columns] = values
        return stored

    def of_matrices(self, values: np.ndarray) -> np.ndarray:
        """Values [n, ...] of whole matrices for each of the GGUF's."""
        return values.repeat(self.n_matrices, axis=0) if len(values) < self.n_matrices else values


MatrixNames = Mapping[str, tuple[Place, ...]]
"""Checkpoint tensor -> where its statistics go: the matrices that a pass is to tell of."""
