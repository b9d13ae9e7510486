"""The pass that sums the squared inputs of every matrix, and where asked their second moments."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bitwright.calibration.control import PassControl
from bitwright.calibration.passes.moment_observer import InputMoments
from bitwright.calibration.places import MatrixNames, Place
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.calibration.statistics.second_moments import SecondMoments, write_index, write_moments
from bitwright.calibration.stream.build import load_config
from bitwright.calibration.stream.forward import stream_past
from bitwright.calibration.stream.micro_batches import Excerpt
from bitwright.calibration.stream.observer import SquaredInputs, Sums, add_sums
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.stream.weights import ParameterReader
from bitwright.calibration.text.corpus import Corpus


class TensorSums(NamedTuple):
    """GGUF tensor -> sums of squared inputs, float64 [n_matrices, n_columns], and counts, int64 [n_matrices]."""

    sums: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]


def stream_importance(
    streamable: StreamableModel,
    names: MatrixNames,
    corpus: Corpus,
    control: PassControl,
    moments_dir: Path | None = None,
) -> ImportanceMatrix:
    """Run the model over the corpus layer by layer and sum the squared inputs of its matrices.

    Matrices that no product uses (norms, an embedding that is only looked up) are absent from the result; an embedding
    that is the output head too gets the head's inputs. The result is the same for any number of threads, and after any
    interruption. control: its work directory takes control.work_bytes. moments_dir: where the second moments of the
    inputs go too, see statistics/second_moments.py.
    Raises Interrupted when the control, asked after every layer, says so.
    """
    excerpt = Excerpt.whole(len(corpus.tokens))
    squared, moments = SquaredInputs(excerpt), None
    if moments_dir is not None:
        width = load_config(streamable.config_dir).get_text_config().hidden_size
        squared = moments = InputMoments(moments_dir, width, corpus.tokens.size, excerpt=excerpt)
    parameters = stream_past(squared, streamable, corpus.tokens, control, excerpt=excerpt)
    if moments is not None:
        write_index(moments.directory, moment_groups(moments, names, parameters))
    sums, counts = _by_tensor(squared.grouped.total, parameters, names)
    return ImportanceMatrix(sums, counts, streamable.name, streamable.revision, **corpus.identity)


def stream_importance_groups(
    streamable: StreamableModel, names: MatrixNames, corpus: Corpus, control: PassControl, excerpt: Excerpt
) -> dict[int, TensorSums]:
    """The same of an excerpt of the corpus alone: by group the sums and the counts of every tensor, for
    `importance_of_groups`."""
    squared = SquaredInputs(excerpt, apart=True)
    tokens = corpus.tokens[excerpt.first : excerpt.first + excerpt.n_samples]
    parameters = stream_past(squared, streamable, tokens, control, excerpt=excerpt)
    return {group: _by_tensor(sums, parameters, names) for group, sums in squared.grouped.groups.items()}


def importance_of_groups(groups: Mapping[int, TensorSums], **identity: Any) -> ImportanceMatrix:
    """What `stream_importance` gives for a corpus all of whose groups were summed. identity: of model and corpus, as
    ImportanceMatrix has it."""
    total: dict[str, dict[str, np.ndarray]] = {"sums": {}, "counts": {}}
    for group in sorted(groups):
        add_sums(total, groups[group]._asdict())
    sums, counts = (dict(sorted(of.items())) for of in total.values())
    return ImportanceMatrix(sums, counts, **identity)


def _by_tensor(of_parameters: Sums, parameters: ParameterReader, names: MatrixNames) -> TensorSums:
    sums: dict[str, dict[int, np.ndarray]] = {}
    counts: dict[str, dict[int, np.ndarray]] = {}
    for parameter, of_parameter in of_parameters["sums"].items():
        of_matrices = of_parameters["counts"][parameter]
        for place, span, _ in parameters.places(parameter, len(of_parameter), names):
            sums.setdefault(place.tensor, {})[place.matrix] = place.of_columns(of_parameter[span])
            counts.setdefault(place.tensor, {})[place.matrix] = place.of_matrices(of_matrices[span])
    return TensorSums(_in_order(sums), _in_order(counts))


def _in_order(parts: dict[str, dict[int, np.ndarray]]) -> dict[str, np.ndarray]:
    """Every tensor's matrices one after the other, from the first index to the last."""
    return {tensor: np.concatenate([of[i] for i in sorted(of)]) for tensor, of in sorted(parts.items())}


def moment_groups(
    moments: InputMoments, names: MatrixNames, parameters: ParameterReader
) -> dict[str, list[str | None]]:
    """GGUF tensor -> for each of its matrices the name of its moments, which the observer has written; None without."""
    groups: dict[str, dict[int, str | None]] = {}
    written = set(moments.shared.values())
    for parameter, counts in moments.counts.items():
        # An expert that no token reached has its share in what all of a layer's experts are fed.
        common = parameter if parameter in written else None
        shared = [moments.shared.get(f"{parameter}#{i}", common) for i in range(len(counts))]
        for place, span, _ in parameters.places(parameter, len(counts), names):
            stored = [_chosen(moments.directory, group, place) for group in shared[span]]
            matrices = stored if len(stored) > 1 else stored * place.n_matrices
            groups.setdefault(place.tensor, {}).update(enumerate(matrices, place.matrix))
    return {tensor: [of[i] for i in sorted(of)] for tensor, of in sorted(groups.items())}


def _chosen(directory: Path, group: str | None, place: Place) -> str | None:
    """The name of the moments of those inputs that the place is about, which are written where they are not all."""
    if group is None or place.columns is None:
        return group
    of_place = f"{group}@{place.tensor}"
    if not (directory / f"{of_place}.npz").exists():
        matrix, held_out = SecondMoments(directory, {}).load(group)
        columns = place.columns
        write_moments(directory, of_place, matrix[np.ix_(columns, columns)], held_out[:, columns])
    return of_place
