"""Which input columns of every weight matrix carry signal: sums of squared inputs over calibration text."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibration.control import Progress, ShouldStop, never, silent
from calibration.second_moments import write_index
from calibration.super_weights import SuperWeightReport
from formats.errors import ConvertError

if TYPE_CHECKING:
    from calibration.choices import Dtype
    from calibration.corpus import Corpus
    from calibration.weights import WeightSource


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
        """Of the same model smoothed. factors: tensor -> [n_matrices, n_columns], what its inputs are divided by;
        absent for 1."""
        return replace(self, sums={n: s / np.square(factors[n]) if n in factors else s for n, s in self.sums.items()})

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
            return np.divide(costs, means, out=np.ones(costs.shape), where=means > 0).astype(np.float32)
        sums, counts = self.sums[name].astype(np.float64), self.counts[name].astype(np.float64)
        if not sums.any():
            return np.ones(sums.shape, np.float32)
        if (counts == counts[0]).all():
            return (sums / counts[0]).astype(np.float32)
        prior = sums.sum(axis=0) / counts.sum()
        return ((sums + PRIOR_ROWS * prior) / (counts[:, None] + PRIOR_ROWS)).astype(np.float32)

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


def work_bytes(samples: int, sequence_length: int, hidden_size: int) -> int:
    """Disk space in bytes, at most, of the hidden states of a pass over that many samples: two files of float32."""
    return 2 * samples * sequence_length * hidden_size * 4


def compute_importance(
    source: "WeightSource",
    config_dir: Path,
    names: Mapping[str, tuple[str, int]],
    corpus: "Corpus",
    *,
    work_dir: Path,
    model: str | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: "Dtype" = "auto",
    threads: int | None = None,
    moments_dir: Path | None = None,
    progress: Progress = silent,
    should_stop: ShouldStop = never,
) -> ImportanceMatrix:
    """Run the model over the corpus layer by layer and sum the squared inputs of its matrices.

    names: checkpoint tensor name -> (GGUF tensor name, index of the matrix in it). Matrices that no product uses
    (norms, an embedding that is only looked up) are absent from the result; an embedding that is the output head too
    gets the head's inputs. The result is the same for any number of threads, and after any interruption.
    work_dir: checkpoints, `work_bytes` large; a second call continues there, or returns at once when all is done.
    moments_dir: where the second moments of the inputs go too, see calibration/second_moments.py.
    Raises Interrupted when should_stop, polled after every layer, says so.
    """
    from calibration.model import load_config
    from calibration.moment_observer import InputMoments
    from calibration.observer import SquaredInputs
    from calibration.stream import LayerStream

    squared = SquaredInputs()
    if moments_dir is not None:
        squared = InputMoments(moments_dir, load_config(config_dir).hidden_size)
    stream = LayerStream(
        source,
        config_dir,
        corpus.tokens,
        work_dir,
        observer=squared,
        identity=f"{model}@{revision}",
        device=device,
        dtype=dtype,
        threads=threads,
    )
    stream.run(progress, should_stop)
    stream.discard_hidden_states()
    found: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    for parameter, sums in squared.sums.items():
        stored = stream.parameters.matrices(parameter, len(sums))
        step = len(sums) // len(stored)  # a checkpoint tensor holds one matrix, or all of a layer's experts
        for i, stored_names in enumerate(stored):
            rows = slice(i * step, (i + 1) * step)
            for tensor, matrix in (names[name] for name in stored_names if name in names):
                found.setdefault(tensor, {})[matrix] = (sums[rows], squared.counts[parameter][rows])
    in_order = {tensor: [matrices[i] for i in sorted(matrices)] for tensor, matrices in sorted(found.items())}
    if isinstance(squared, InputMoments) and moments_dir is not None:
        write_index(moments_dir, squared.shared, squared.counts, names, stream.parameters)
    return ImportanceMatrix(
        sums={tensor: np.concatenate([sums for sums, _ in matrices]) for tensor, matrices in in_order.items()},
        counts={tensor: np.concatenate([counts for _, counts in matrices]) for tensor, matrices in in_order.items()},
        model=model,
        revision=revision,
        corpus=corpus.name,
        corpus_sha256=corpus.sha256,
        samples=len(corpus.tokens),
        sequence_length=corpus.tokens.shape[1],
    )
