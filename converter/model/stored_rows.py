"""The rows of a tensor as the artifact stores them, read by its layout of the checkpoint's, and the way back."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bitwright.converter.model.rescaled import rescale_rows
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.schemes import row_chunks
from bitwright.profiles.layout import Layout, Selection
from bitwright.profiles.vocabulary import TensorSpec

CHUNK_WEIGHTS = 1 << 20
"""Weights a thread holds at a time: 4 MiB of float32, some times that with an encoder's own arrays."""

# Rows that lie so far apart are read one by one; nearer ones in one piece, of which the others are dropped.
_SPARSE = 8
# Of this thread, the transposed matrix that it read last: checkpoint, key (tensor, source, matrix), matrix.
_latest = threading.local()


def read_rows(checkpoint: Checkpoint, spec: TensorSpec, start: int, stop: int) -> np.ndarray:
    """Rows start to stop of the tensor as the artifact stores it, counted over all its matrices: float32
    [stop - start, n_columns], C-contiguous. A vector is one row. The cost is that of the rows asked for; of a
    transposed matrix that of the whole of it, once for rows that are asked for in turn."""
    return rescale_rows(spec, _read_unscaled(checkpoint, spec, start, stop), start)


def row_spans(spec: TensorSpec, n_weights: int) -> Iterator[tuple[int, int, int]]:
    """(matrix, first row, end row) of spans that stay within one matrix and within so many weights, in order."""
    rows_per_matrix = spec.n_rows // spec.n_matrices
    for matrix in range(spec.n_matrices):
        first = matrix * rows_per_matrix
        for start, stop in row_chunks.row_spans(rows_per_matrix, spec.n_columns, n_weights):
            yield matrix, first + start, first + stop


def restore(spec: TensorSpec, rows: np.ndarray, into: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """The inverse of `read_rows` over a whole tensor: rows float32 [n_rows, n_columns] of the artifact to the
    checkpoint's tensors, by name and in their own shapes.

    into: sources that other tensors have begun to fill; of a source that none of them has a part of, what no tensor has
    taken is NaN. What is rescaled stays so: tensors that make up for each other compute the same function."""
    restored = {} if into is None else into
    if spec.origin == "constant":
        return restored
    for part, source in zip(np.split(rows.reshape(spec.n_rows, -1), len(spec.sources)), spec.sources, strict=True):
        shape = source_shape(spec)
        if source not in restored:
            restored[source] = np.full(shape, np.nan, np.float32)
        restore_part(spec, part, restored[source])
    return restored


def restore_part(spec: TensorSpec, rows: np.ndarray, stored: np.ndarray) -> None:
    """Put the tensor's rows that come from one source, float32 [n, n_columns], to their places in it: `stored`, of the
    source's own shape, C-contiguous."""
    layout, flat = spec.layout, _Flat.of(source_shape(spec))
    values = layout.to_stored(rows)
    if layout.transposed:
        values = values.reshape(-1, _count(layout.columns, flat.n_columns), spec.n_columns).swapaxes(1, 2)
    values = values.reshape(_count(layout.rows, flat.n_rows), _count(layout.columns, flat.n_columns))
    stored.reshape(flat.n_rows, flat.n_columns)[_taken(spec)] = values


def part_of_source(spec: TensorSpec) -> np.ndarray:
    """Which values of a source the tensor is made of: bool, of the source's shape."""
    flat = _Flat.of(source_shape(spec))
    part = np.zeros((flat.n_rows, flat.n_columns), bool)
    part[_taken(spec)] = True
    return part.reshape(source_shape(spec))


def _taken(spec: TensorSpec) -> tuple[slice | np.ndarray, ...]:
    """Where the values of the tensor are in a source that is one matrix, to index it with."""
    rows, columns = spec.layout.rows, spec.layout.columns
    if columns is None:
        return (slice(None) if rows is None else rows.indices(),)
    return (slice(None) if rows is None else rows.indices()[:, None], columns.indices())


def source_shape(spec: TensorSpec) -> tuple[int, ...]:
    """The shape of each of the tensor's sources, as it is stored."""
    return spec.stored_shape or (spec.shape if len(spec.sources) == 1 else spec.shape[1:])


@dataclass(frozen=True)
class _Flat:
    """A stored tensor as one matrix: the rows of all its matrices; of a vector every value is a row."""

    n_rows: int
    n_columns: int

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> "_Flat":
        if len(shape) < 2:
            return cls(shape[0] if shape else 1, 1)
        return cls(int(np.prod(shape[:-1])), shape[-1])


def _count(selection: Selection | None, n: int) -> int:
    return n if selection is None else len(selection)


def _read_unscaled(checkpoint: Checkpoint, spec: TensorSpec, start: int, stop: int) -> np.ndarray:
    if spec.origin == "constant":
        return np.array([spec.constant], np.float32)[start:stop]
    rows_per_source = spec.n_rows // len(spec.sources)
    parts = []
    for i in range(start // rows_per_source, -(-stop // rows_per_source)):
        first = i * rows_per_source
        part = max(start - first, 0), min(stop - first, rows_per_source)
        rows = _read_part(checkpoint, spec, spec.sources[i], *part)
        parts.append(spec.layout.to_artifact(rows, part[0]))
    if not parts:
        return np.empty((0, spec.n_columns), np.float32)
    return np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts)


def _read_part(checkpoint: Checkpoint, spec: TensorSpec, source: str, start: int, stop: int) -> np.ndarray:
    """Rows start to stop of what comes from one source."""
    layout = spec.layout
    if layout.transposed:
        return _read_transposed(checkpoint, spec, source, start, stop)
    if len(source_shape(spec)) < 2:
        values = checkpoint.read(source)
        values = values if layout.rows is None else values[layout.rows.indices()]
        return values.reshape(-1, spec.n_columns)[start:stop]
    if layout.rows is None:
        rows = checkpoint.read(source, start, stop)
    else:
        rows = _read_some(checkpoint, source, layout.rows.indices()[start:stop])
    return rows if layout.columns is None else rows[:, layout.columns.indices()]


def _read_transposed(checkpoint: Checkpoint, spec: TensorSpec, source: str, start: int, stop: int) -> np.ndarray:
    """The rows of the artifact are columns of the stored matrices, whose rows are all read."""
    layout, flat = spec.layout, _Flat.of(source_shape(spec))
    rows_per_matrix = _count(layout.columns, flat.n_columns)
    parts = []
    for matrix in range(start // rows_per_matrix, -(-stop // rows_per_matrix)):
        first = matrix * rows_per_matrix
        span = slice(max(start - first, 0), min(stop - first, rows_per_matrix))
        if layout.rows is None and checkpoint.tensors[source].inputs_first:
            parts.append(_read_columns(checkpoint, layout, source, matrix, span))
        else:
            parts.append(_whole_matrix(checkpoint, spec, source, matrix)[span])
    return np.concatenate([*parts, np.empty((0, spec.n_columns), np.float32)])


def _read_columns(checkpoint: Checkpoint, layout: Layout, source: str, matrix: int, span: slice) -> np.ndarray:
    """Columns of a stored matrix that is read by columns, each as a row."""
    if layout.columns is None:
        return checkpoint.read_columns(source, span.start, span.stop, matrix)
    indices = layout.columns.indices()[span]
    first, stop = int(indices.min()), int(indices.max()) + 1
    some: np.ndarray = checkpoint.read_columns(source, first, stop, matrix)[indices - first]
    return some


def _whole_matrix(checkpoint: Checkpoint, spec: TensorSpec, source: str, matrix: int) -> np.ndarray:
    """One transposed matrix, float32 [rows of the artifact, n_columns]; the thread's last one is kept."""
    key = (spec.name, source, matrix)
    if getattr(_latest, "key", None) == key and _latest.checkpoint is checkpoint:
        kept: np.ndarray = _latest.matrix
        return kept
    layout, first = spec.layout, matrix * spec.n_columns
    if layout.rows is None:
        stored = checkpoint.read(source, first, first + spec.n_columns)
    else:
        stored = _read_some(checkpoint, source, layout.rows.indices()[first : first + spec.n_columns])
    taken = stored if layout.columns is None else stored[:, layout.columns.indices()]
    turned: np.ndarray = np.ascontiguousarray(taken.T)
    _latest.checkpoint, _latest.key, _latest.matrix = checkpoint, key, turned
    return turned


def _read_some(checkpoint: Checkpoint, source: str, indices: np.ndarray) -> np.ndarray:
    """The stored rows of these indices, in their order: float32 [len(indices), n_columns]."""
    if not len(indices):
        return checkpoint.read(source, 0, 0)
    first, stop = int(indices.min()), int(indices.max()) + 1
    if stop - first <= _SPARSE * len(indices):
        near: np.ndarray = checkpoint.read(source, first, stop)[indices - first]
        return near
    return checkpoint.read_rows(source, indices)
