"""What an error in every weight costs: the Fisher matrix of the model's predictions, as row and column factors."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibration.control import Progress, ShouldStop, never, silent
from calibration.gradient_sums import by_tensor
from calibration.importance import work_bytes
from calibration.labels import Labels
from formats.errors import ConvertError

if TYPE_CHECKING:
    from calibration.choices import Dtype
    from calibration.corpus import Corpus
    from calibration.weights import WeightSource


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


def gradient_work_bytes(samples: int, sequence_length: int, hidden_size: int, n_layers: int) -> int:
    """Disk space in bytes, at most, of a pass there and back over that many samples: the input of every layer, the last
    hidden states, and two files of gradients, all float32."""
    return work_bytes(samples, sequence_length, hidden_size) // 2 * (n_layers + 3)


def compute_fisher(
    source: "WeightSource",
    config_dir: Path,
    names: Mapping[str, tuple[str, int]],
    corpus: "Corpus",
    *,
    labels: Labels = "sampled",
    seed: int = 0,
    work_dir: Path,
    model: str | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: "Dtype" = "auto",
    threads: int | None = None,
    progress: Progress = silent,
    should_stop: ShouldStop = never,
) -> FisherFactors:
    """Run the model over the corpus, layer by layer forwards and backwards, and sum the squared gradients of its
    matrices.

    names: checkpoint tensor name -> (GGUF tensor name, index of the matrix in it), of the matrices that are wanted.
    labels: what the loss is taken against; "sampled" ones, drawn by the seed, give the Fisher matrix of the KL
    divergence. The result is the same for any number of threads, and after any interruption.
    work_dir: checkpoints, `gradient_work_bytes` large; a second call continues there, or returns at once when all is
    done. Raises Interrupted when should_stop, polled after every layer, says so, and ConvertError for a text whose
    samples have one token, another run's checkpoint, and gradients that are not finite.
    """
    if corpus.tokens.shape[1] < 2:
        raise ConvertError("samples of 1 token predict nothing", corpus.name, "give a longer --sequence-length")
    from calibration.gradients import GradientStream
    from calibration.observer import SquaredInputs
    from calibration.squared_gradients import SquaredGradients
    from calibration.stream import LayerStream

    forward = LayerStream(
        source,
        config_dir,
        corpus.tokens,
        work_dir / "forward",
        observer=SquaredInputs(),  # names the matrix whose input is not finite
        identity=f"{model}@{revision}",
        device=device,
        dtype=dtype,
        threads=threads,
        keep=True,
    )
    squared = SquaredGradients(cache(lambda parameter, n: len(forward.parameters.matrices(parameter, n)[0])))
    backward = GradientStream(forward, work_dir / "backward", squared, labels=labels, seed=seed)
    if not backward.complete:
        forward.run(progress, should_stop, stage="forward")
    backward.run(progress, should_stop, stage="gradients")
    forward.discard_hidden_states()
    n_samples, sequence_length = corpus.tokens.shape
    n_labels = n_samples * (sequence_length if labels == "sampled" else sequence_length - 1)
    found = by_tensor(squared.sums, forward.parameters, names)
    factors = {tensor: sums.factors(n_labels) for tensor, sums in found.items()}
    return FisherFactors(
        rows={tensor: rows for tensor, (rows, _) in factors.items()},
        columns={tensor: columns for tensor, (_, columns) in factors.items()},
        gradient_magnitude={tensor: sums.mean_square_gradient(n_labels) ** 0.5 for tensor, sums in found.items()},
        activation_variance={tensor: sums.input_variance for tensor, sums in found.items()},
        weight_magnitude=_weight_magnitudes(source, names, found),
        model=model,
        revision=revision,
        corpus=corpus.name,
        corpus_sha256=corpus.sha256,
        samples=n_samples,
        sequence_length=sequence_length,
        labels=labels,
    )


def _weight_magnitudes(
    source: "WeightSource", names: Mapping[str, tuple[str, int]], found: Collection[str]
) -> dict[str, float]:
    """The mean magnitude of the weights of every tensor."""
    from calibration.weights import blocks_of

    sums, counts = dict.fromkeys(found, 0.0), dict.fromkeys(found, 0)
    for name, (tensor, _) in names.items():
        for block in blocks_of(source, name) if tensor in sums else ():
            sums[tensor] += float(np.abs(block).sum(dtype=np.float64))
            counts[tensor] += block.size
    return {tensor: sums[tensor] / counts[tensor] for tensor in found}
