"""What an error in every weight costs: the Fisher matrix of the model's predictions, as row and column factors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from formats.errors import ConvertError

Labels = Literal["sampled", "text"]


@dataclass(frozen=True, eq=False)
class FisherFactors:
    """The diagonal of the Fisher matrix of every matrix of the model, as a product of row and column factors.

    rows: GGUF tensor -> float64 [n_matrices, n_rows], in the order of the checkpoint's tensor; columns: GGUF tensor ->
    float64 [n_matrices, n_columns]. Scaled so that 1/2 * sum_ij rows[i] * columns[j] * E_ij**2 is the expected increase
    of the mean KL divergence, in nats per token, by an error E of that matrix.
    gradient_magnitude, activation_variance, weight_magnitude: GGUF tensor -> what layer scores are blended from.
    model, revision: the source model; corpus, corpus_sha256: name of the text and hash of its bytes; samples of
    sequence_length tokens were seen; labels: "sampled" from the model's predictions, or those of the "text".

    Raises ConvertError for factors that are negative or not finite, and for shapes that do not agree.
    """

    rows: Mapping[str, np.ndarray]
    columns: Mapping[str, np.ndarray]
    gradient_magnitude: Mapping[str, float]
    activation_variance: Mapping[str, float]
    weight_magnitude: Mapping[str, float]
    model: str | None
    revision: str | None
    corpus: str
    corpus_sha256: str
    samples: int
    sequence_length: int
    labels: Labels
    where: str = field(default="Fisher factors", repr=False)

    def __post_init__(self) -> None:
        if self.rows.keys() != self.columns.keys():
            raise self._refused(min(self.rows.keys() ^ self.columns.keys()), "has rows or columns only")
        for name, rows in self.rows.items():
            columns = self.columns[name]
            if rows.ndim != 2 or columns.ndim != 2 or len(rows) != len(columns):
                raise self._refused(name, "has factors of shapes that do not agree")
            if not (np.isfinite(rows).all() and np.isfinite(columns).all()):
                raise self._refused(name, "has factors that are not finite")
            if (rows < 0).any() or (columns < 0).any():
                raise self._refused(name, "has negative factors")

    def _refused(self, name: str, problem: str) -> ConvertError:
        return ConvertError(f"the tensor {name!r} {problem}", self.where, "compute the sensitivity again")
