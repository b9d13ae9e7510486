"""A checkpoint as it reads when it is smoothed: by its tensors' own names, for encoders and for the layer stream."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from hashlib import sha256

import numpy as np

from bitwright.converter.source.checkpoint import Checkpoint


@dataclass(frozen=True, eq=False)
class Folding:
    """What becomes of one tensor. values: of a vector, those in the place of the stored ones, float32 like them. rows,
    columns: of a matrix, factors float32 [n_rows] and [n_columns], None for none."""

    values: np.ndarray | None = None
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None

    def apply(self, stored: np.ndarray, rows: slice | np.ndarray) -> np.ndarray:
        """These rows of the tensor, float32, from what is stored of them. A vector is whole."""
        if self.values is not None:
            return self.values.copy()
        if self.rows is not None:
            stored = stored * self.rows[rows, None]
        return stored if self.columns is None else stored * self.columns

    def transposed(self, first_row: int, n_rows: int, start: int, stop: int) -> "Folding":
        """What becomes of these columns of some rows of a matrix, each column as a row."""
        rows = None if self.rows is None else self.rows[first_row : first_row + n_rows]
        return Folding(rows=None if self.columns is None else self.columns[start:stop], columns=rows)

    def identity(self) -> str:
        """A hash of what becomes of the tensor."""
        digest = sha256()
        for f in fields(self):
            values = getattr(self, f.name)
            if values is not None:
                digest.update(f.name.encode() + np.ascontiguousarray(values, "<f4").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class SmoothedCheckpoint(Checkpoint):
    """foldings: checkpoint tensor -> what becomes of it; all others read as they are stored.

    `tensors` says what lies in the files, so bytes that are copied from there are the source's: read through `read`.
    Norms hold values of their stored dtype, and the matrices make up for what rounding them has changed. A matrix, a
    router or a bias that is stored in 16 bits again is rounded once more.
    """

    foldings: Mapping[str, Folding] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint, foldings: Mapping[str, Folding]) -> "SmoothedCheckpoint":
        return cls(**{f.name: getattr(checkpoint, f.name) for f in fields(Checkpoint)}, foldings=foldings)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        stored = super().read(name, start, stop)
        folding = self.foldings.get(name)
        return stored if folding is None else folding.apply(stored, slice(start, stop))

    def read_columns(self, name: str, start: int, stop: int, matrix: int = 0) -> np.ndarray:
        stored, folding = super().read_columns(name, start, stop, matrix), self.foldings.get(name)
        if folding is None:
            return stored
        n_rows = stored.shape[1]
        return folding.transposed(matrix * n_rows, n_rows, start, stop).apply(stored, slice(None))

    def read_rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        stored, folding = super().read_rows(name, rows), self.foldings.get(name)
        return stored if folding is None else folding.apply(stored, rows)


def identity_of_foldings(foldings: Mapping[str, Folding]) -> str:
    """A hash of what they make of a model, "" where that is nothing."""
    digest = sha256()
    for name, folding in sorted(foldings.items()):
        digest.update(f"{name} {folding.identity()} ".encode())
    return digest.hexdigest() if foldings else ""


def foldings_of(checkpoint: Checkpoint) -> Mapping[str, Folding]:
    """What becomes of a checkpoint's tensors; nothing of one that reads as it is stored."""
    return checkpoint.foldings if isinstance(checkpoint, SmoothedCheckpoint) else {}
