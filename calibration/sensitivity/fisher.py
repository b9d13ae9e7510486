"""What an error in every weight costs: the Fisher matrix of the model's predictions, as row and column factors."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from bitwright.calibration.choices import Labels
from bitwright.calibration.control import PassControl, work_bytes
from bitwright.calibration.sensitivity.gradient_sums import KINDS, by_tensor
from bitwright.formats.errors import ConvertError

if TYPE_CHECKING:
    from bitwright.calibration.places import MatrixNames
    from bitwright.calibration.sensitivity.squared_gradients import SquaredGradients
    from bitwright.calibration.stream.micro_batches import Excerpt
    from bitwright.calibration.stream.observer import Sums
    from bitwright.calibration.stream.streamable import StreamableModel
    from bitwright.calibration.stream.weights import ParameterReader, WeightSource
    from bitwright.calibration.text.corpus import Corpus


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


def stream_fisher(
    streamable: "StreamableModel",
    names: "MatrixNames",
    corpus: "Corpus",
    control: PassControl,
    *,
    labels: Labels = "sampled",
    seed: int = 0,
) -> FisherFactors:
    """Run the model over the corpus, layer by layer forwards and backwards, and sum the squared gradients of its
    matrices.

    names: the matrices that are wanted. labels: what the loss is taken against; "sampled" ones, drawn by the seed, give
    the Fisher matrix of the KL divergence. The result is the same for any number of threads, and after any
    interruption. control: its work directory takes `gradient_work_bytes`. Raises Interrupted when the control, asked
    after every layer, says so, and ConvertError for a text whose samples have one token, another run's checkpoint, and
    gradients that are not finite.
    """
    from bitwright.calibration.stream.micro_batches import Excerpt

    squared, parameters = _stream_gradients(
        streamable, corpus, control, Excerpt.whole(len(corpus.tokens)), labels=labels, seed=seed
    )
    return _factors(streamable, names, corpus, squared.sums, parameters, labels)


def stream_gradient_groups(
    streamable: "StreamableModel", corpus: "Corpus", control: PassControl, excerpt: "Excerpt", *, seed: int = 0
) -> "dict[int, Sums]":
    """The same of an excerpt of the corpus alone, as far as it adds up: by group the sums, for `fisher_of_groups`."""
    squared, _ = _stream_gradients(streamable, corpus, control, excerpt, labels="sampled", seed=seed, apart=True)
    return dict(squared.grouped.groups)


def fisher_of_groups(
    streamable: "StreamableModel", names: "MatrixNames", corpus: "Corpus", groups: "Mapping[int, Sums]"
) -> FisherFactors:
    """What `stream_fisher` gives for a corpus all of whose groups were summed. The model is not run."""
    from bitwright.calibration.stream.model import LayerwiseModel
    from bitwright.calibration.stream.observer import add_sums

    total: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in KINDS}
    for group in sorted(groups):
        add_sums(total, groups[group])
    return _factors(streamable, names, corpus, total, LayerwiseModel(streamable).parameters, "sampled")


def _stream_gradients(
    streamable: "StreamableModel",
    corpus: "Corpus",
    control: PassControl,
    excerpt: "Excerpt",
    *,
    labels: Labels,
    seed: int,
    apart: bool = False,
) -> "tuple[SquaredGradients, ParameterReader]":
    """There and back over an excerpt of the corpus. Returns what was summed, and what finds the stored tensors."""
    if corpus.tokens.shape[1] < 2:
        raise ConvertError("samples of 1 token predict nothing", corpus.name, "give a longer --sequence-length")
    from bitwright.calibration.sensitivity.squared_gradients import SquaredGradients
    from bitwright.calibration.stream.backward import GradientStream
    from bitwright.calibration.stream.forward import LayerStream
    from bitwright.calibration.stream.observer import SquaredInputs

    forward = LayerStream(
        streamable,
        corpus.tokens[excerpt.first : excerpt.first + excerpt.n_samples],
        control.within("forward"),
        observer=SquaredInputs(),  # names the matrix whose input is not finite
        keep=True,
        excerpt=excerpt,
    )
    squared = SquaredGradients(
        cache(lambda parameter, n: len(forward.parameters.matrices(parameter, n)[0])), excerpt, apart
    )
    backward = GradientStream(forward, control.within("backward"), squared, labels=labels, seed=seed)
    if not backward.complete:
        forward.run("forward")
    backward.run()
    forward.discard_hidden_states()
    return squared, forward.parameters


def _factors(
    streamable: "StreamableModel",
    names: "MatrixNames",
    corpus: "Corpus",
    sums: "Sums",
    parameters: "ParameterReader",
    labels: Labels,
) -> FisherFactors:
    """sums: over the whole corpus."""
    n_samples, sequence_length = corpus.tokens.shape
    n_labels = n_samples * (sequence_length if labels == "sampled" else sequence_length - 1)
    gradients = by_tensor(sums, parameters, names)
    factors = {tensor: sums.factors(n_labels) for tensor, sums in gradients.items()}
    return FisherFactors(
        rows={tensor: rows for tensor, (rows, _) in factors.items()},
        columns={tensor: columns for tensor, (_, columns) in factors.items()},
        gradient_magnitude={tensor: sums.mean_square_gradient(n_labels) ** 0.5 for tensor, sums in gradients.items()},
        activation_variance={tensor: sums.input_variance for tensor, sums in gradients.items()},
        weight_magnitude=_weight_magnitudes(streamable.weights, names, gradients),
        model=streamable.name,
        revision=streamable.revision,
        **corpus.identity,
        labels=labels,
    )


def _weight_magnitudes(source: "WeightSource", names: "MatrixNames", tensors: Collection[str]) -> dict[str, float]:
    """The mean magnitude of the weights of each of these tensors."""
    from bitwright.calibration.stream.weights import blocks_of

    sums, counts = dict.fromkeys(tensors, 0.0), dict.fromkeys(tensors, 0)
    for name, places in names.items():
        of_source = {place.tensor for place in places} & sums.keys()
        for block in blocks_of(source, name) if of_source else ():
            for tensor in of_source:
                sums[tensor] += float(np.abs(block).sum(dtype=np.float64))
                counts[tensor] += block.size
    return {tensor: sums[tensor] / counts[tensor] for tensor in tensors}
