"""Which input columns of every weight matrix carry signal: sums of squared inputs over calibration text."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace

import numpy as np

from bitwright.calibration.statistics.super_weights import SuperWeightReport
from bitwright.formats.errors import ConvertError

# Mean squares of that many rows are as uncertain as experts of a layer differ from each other: with a relative variance
# of 2 / rows (Gaussian inputs) to 10 / rows (heavy tails) on one side, and of 0.1 to 0.3 between experts on the other.
PRIOR_ROWS = 32


@dataclass(frozen=True, eq=False)
class ImportanceMatrix:
    """Sums of squared inputs per column of each matrix, as llama.cpp's importance matrix has them.

    sums: GGUF tensor name ("blk.0.attn_q.weight") -> float64 [n_matrices, n_columns], the sum of squared inputs.
    counts: GGUF tensor name -> int64 [n_matrices], the rows (tokens) that each matrix was multiplied with.
    model, revision: the source model; corpus, corpus_sha256: name of the text and hash of its bytes; samples of
    sequence_length tokens were seen. None: the file does not say.
    super_weights: what was found of them in the same model; None where nobody looked.
    costs: GGUF tensor name -> float [n_matrices, n_columns], what an error in a column costs, where that was measured:
    the columns of FisherFactors, which know of the gradient beside the input. No file of importance keeps them.

    Raises ConvertError for sums that are negative or not finite, and for shapes that do not agree.
    """

    sums: Mapping[str, np.ndarray]
    counts: Mapping[str, np.ndarray]
    model: str | None = None
    revision: str | None = None
    corpus: str | None = None
    corpus_sha256: str | None = None
    samples: int | None = None
    sequence_length: int | None = None
    super_weights: SuperWeightReport | None = None
    costs: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    where: str = field(default="importance matrix", repr=False)

    def __post_init__(self) -> None:
        for name, sums in self.sums.items():
            counts = self.counts.get(name)
            if counts is None or sums.ndim != 2 or counts.shape != sums.shape[:1]:
                raise self._refused(name, "has sums and counts of shapes that do not agree")
            if not (np.isfinite(sums).all() and np.isfinite(counts).all()):
                raise self._refused(name, "has values that are not finite")
            if (sums < 0).any() or (counts < 0).any():
                raise self._refused(name, "has negative values")
            if sums[counts == 0].any():
                raise self._refused(name, "has sums over no rows")

    @property
    def names(self) -> Set[str]:
        """The tensors whose columns are known."""
        return self.sums.keys() | self.costs.keys()

    def with_costs(self, costs: Mapping[str, np.ndarray]) -> "ImportanceMatrix":
        return replace(self, costs=costs)

    def divided(self, factors: Mapping[str, np.ndarray]) -> "ImportanceMatrix":
        """The importance of the same model smoothed. factors: tensor -> [n_matrices, n_columns], what its inputs are
        divided by; absent for 1."""
        divided = [
            {name: values / np.square(factors[name]) if name in factors else values for name, values in kind.items()}
            for kind in (self.sums, self.costs)
        ]
        return replace(self, sums=divided[0], costs=divided[1])

    def columns(self, name: str) -> np.ndarray:
        """The importance of every column: float32 [n_matrices, n_columns]; KeyError for an unknown tensor.

        It is what an error there costs where that was measured, of each matrix in units of the mean column, and the
        mean squared input elsewhere.

        Experts of a layer choose among the same inputs, so what all of them together have seen is a prior for each:
        it counts as PRIOR_ROWS rows beside an expert's own. An expert that no token reached has the prior alone, one
        that thousands reached hardly notices it. Where all experts count alike nothing was routed, or the file does
        not tell (.dat): then each has its own mean. Sums that are all zero give uniform importance, 1 for all columns.
        """
        if name in self.costs:
            costs = self.costs[name]
            means = costs.mean(axis=1, keepdims=True)
            relative: np.ndarray = np.divide(costs, means, out=np.ones(costs.shape), where=means > 0)
            return relative.astype(np.float32)
        sums, counts = self.sums[name].astype(np.float64), self.counts[name].astype(np.float64)
        if not sums.any():
            return np.ones(sums.shape, np.float32)
        if (counts == counts[0]).all():
            return np.asarray(sums / counts[0], np.float32)
        prior = sums.sum(axis=0) / counts.sum()
        return np.asarray((sums + PRIOR_ROWS * prior) / (counts[:, None] + PRIOR_ROWS), np.float32)

    def notes(self) -> list[str]:
        """What a user should know of the statistics: experts and tensors that the calibration left without."""
        unseen = {name: int((counts == 0).sum()) for name, counts in self.counts.items()}
        experts = {name: n for name, n in unseen.items() if n and self.sums[name].any()}
        silent = [name for name, sums in self.sums.items() if not sums.any()]
        notes = []
        if experts:
            worst = max(experts, key=lambda name: experts[name])
            notes.append(
                f"no token reached some experts of {len(experts)} tensors, at most {experts[worst]} of"
                f" {len(self.counts[worst])} ({worst}): they get the importance of all others together"
            )
        if silent:
            notes.append(f"{len(silent)} tensors had no input but zeros: uniform importance ({', '.join(silent[:3])})")
        return notes

    def shaped_as(self, shapes: Mapping[str, tuple[int, int]]) -> "ImportanceMatrix":
        """The same statistics, with the matrices told apart that a .dat file runs together.

        shapes: GGUF tensor name -> (n_matrices, n_columns). An entry of one matrix with as many values as the stacked
        tensor has is cut up, each matrix with the entry's count; all others stay as they are.
        """
        sums, counts = dict(self.sums), dict(self.counts)
        for name, (n_matrices, n_columns) in shapes.items():
            if name in sums and sums[name].shape == (1, n_matrices * n_columns):
                sums[name] = sums[name].reshape(n_matrices, n_columns)
                counts[name] = counts[name].repeat(n_matrices)
        return replace(self, sums=sums, counts=counts)

    def _refused(self, name: str, problem: str) -> ConvertError:
        return ConvertError(f"the tensor {name!r} {problem}", self.where, "compute the importance matrix again")
