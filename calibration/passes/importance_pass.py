"""The pass that sums the squared inputs of every matrix, and where asked their second moments."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bitwright.calibration.control import PassControl
from bitwright.calibration.passes.moment_observer import InputMoments
from bitwright.calibration.places import MatrixNames
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.calibration.statistics.second_moments import (
    SecondMoments,
    moments_path,
    write_index,
    write_moments,
)
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


class Fed(NamedTuple):
    """What a matrix of a GGUF tensor is fed: what that matrix of a parameter is; columns: of these inputs the ones that
    the tensor is about, None for all."""

    parameter: str
    matrix: int
    columns: np.ndarray | None


FedMatrices = Mapping[str, Mapping[int, Fed]]
"""GGUF tensor -> matrix -> what it is fed."""


class PartialMoments(NamedTuple):
    """What the moments of a part of a text are of. shared: as of InputMoments."""

    shared: dict[str, str]
    fed: FedMatrices


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
    squared, moments = _observer(streamable, corpus, excerpt, moments_dir)
    parameters = stream_past(squared, streamable, corpus.tokens, control, excerpt=excerpt)
    if moments is not None:
        index_moments(moments.directory, moments.shared, fed_matrices(moments.counts, names, parameters))
    sums, counts = _by_tensor(squared.grouped.total, parameters, names)
    return ImportanceMatrix(sums, counts, streamable.name, streamable.revision, **corpus.identity)


def stream_importance_groups(
    streamable: StreamableModel,
    names: MatrixNames,
    corpus: Corpus,
    control: PassControl,
    excerpt: Excerpt,
    moments_dir: Path | None = None,
) -> tuple[dict[int, TensorSums], PartialMoments | None]:
    """The same of an excerpt of the corpus alone: by group the sums and the counts of every tensor, for
    `importance_of_groups`; and what the moments are of, which are partial."""
    squared, moments = _observer(streamable, corpus, excerpt, moments_dir, apart=True)
    tokens = corpus.tokens[excerpt.first : excerpt.first + excerpt.n_samples]
    parameters = stream_past(squared, streamable, tokens, control, excerpt=excerpt)
    groups = squared.grouped.groups
    partial = None
    if moments is not None:
        counted = {name: of for sums in groups.values() for name, of in sums["counts"].items()}
        partial = PartialMoments(moments.shared, fed_matrices(counted, names, parameters))
    return {group: _by_tensor(sums, parameters, names) for group, sums in groups.items()}, partial


def _observer(
    streamable: StreamableModel, corpus: Corpus, excerpt: Excerpt, moments_dir: Path | None, apart: bool = False
) -> tuple[SquaredInputs, InputMoments | None]:
    """Of squares, and of moments, too, where these are wanted: one for both."""
    if moments_dir is None:
        return SquaredInputs(excerpt, apart), None
    width = load_config(streamable.config_dir).get_text_config().hidden_size
    moments = InputMoments(moments_dir, width, corpus.tokens.size, excerpt=excerpt, apart=apart)
    return moments, moments


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


def fed_matrices(counts: Mapping[str, np.ndarray], names: MatrixNames, parameters: ParameterReader) -> FedMatrices:
    """counts: of the parameters that products were seen with, a number for each of their matrices."""
    fed: dict[str, dict[int, Fed]] = {}
    for parameter, of_matrices in counts.items():
        for place, span, _ in parameters.places(parameter, len(of_matrices), names):
            stored = [Fed(parameter, i, place.columns) for i in range(len(of_matrices))[span]]
            matrices = stored if len(stored) > 1 else stored * place.n_matrices
            fed.setdefault(place.tensor, {}).update(enumerate(matrices, place.matrix))
    return fed


def index_moments(directory: Path, shared: Mapping[str, str], fed: FedMatrices) -> None:
    """Say whose the moments in the directory are: all are there now. shared: as of InputMoments."""
    known = set(shared.values())
    groups: dict[str, list[str | None]] = {}
    for tensor, of_matrices in sorted(fed.items()):
        for _, (parameter, matrix, columns) in sorted(of_matrices.items()):
            # An expert that no token reached has its share in what all of a layer's experts are fed.
            name = shared.get(f"{parameter}#{matrix}", parameter if parameter in known else None)
            groups.setdefault(tensor, []).append(_chosen(directory, name, tensor, columns))
    write_index(directory, groups)


def _chosen(directory: Path, group: str | None, tensor: str, columns: np.ndarray | None) -> str | None:
    """The name of the moments of these columns of the inputs, which are written where they are not all."""
    if group is None or columns is None:
        return group
    of_tensor = f"{group}@{tensor}"
    if not moments_path(directory, of_tensor).exists():
        matrix, held_out = SecondMoments(directory, {}).load(group)
        write_moments(directory, of_tensor, matrix[np.ix_(columns, columns)], held_out[:, columns])
    return of_tensor
