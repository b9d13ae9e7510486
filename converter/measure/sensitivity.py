"""What every format costs every tensor: rows really encoded, their errors weighted with the Fisher factors.

The rows of a tensor, over all its matrices, are sampled in proportion to what it would cost to lose them:
rows[i] * sum_j columns[j] * w_ij**2. What an encoder leaves of that share differs little between rows, so that few rows
tell the sum over all (sampling with probability proportional to size; Hansen and Hurwitz 1943).
"""

import hashlib
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from bitwright.calibration.control import Interrupted, say
from bitwright.calibration.sensitivity.fisher import FisherFactors
from bitwright.calibration.sensitivity.table import SensitivityTable
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.converter.artifact.run import Run
from bitwright.converter.job.identity import tool_identity
from bitwright.converter.model.stored_rows import CHUNK_WEIGHTS, read_rows, row_spans
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.block_format import BlockFormat
from bitwright.formats.choices import Effort
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.journal import append_line, read_lines
from bitwright.formats.registry import FORMATS, get_format
from bitwright.profiles.planning.assign import scale_of
from bitwright.profiles.vocabulary import ModelMap, Role, TensorSpec

# Made for models that were trained in them: measured when they are asked for.
_TRAINED_FORMATS = ("Q2_0", "TQ2_0", "TQ1_0", "Q1_0")
CANDIDATE_FORMATS = tuple(name for name in FORMATS if name not in ("F32", "F16", "BF16", *_TRAINED_FORMATS))
"""What a table holds unless said otherwise."""

SAMPLED_ROWS = 128
"""Rows of a tensor that are encoded, where it has more."""

# In the work directory: JSON lines, one for each finished tensor.
_JOURNAL = "sensitivity.jsonl"


@dataclass(frozen=True)
class Trials:
    """What is encoded to tell the losses. formats: those of the table. sampled_rows: of a tensor at most, all in memory
    at once; a tensor of no more rows is encoded whole."""

    formats: Sequence[str] = CANDIDATE_FORMATS
    effort: Effort = "fast"
    sampled_rows: int = SAMPLED_ROWS


def build_sensitivity(
    run: Run, factors: FisherFactors, importance: ImportanceMatrix | None, trials: Trials
) -> SensitivityTable:
    """The losses of every tensor that may be quantized and measured, in every one of the formats that fits its rows.

    importance: what the encoders will be given. A journal in the work directory has the finished tensors: a call with
    the same arguments continues there, and ends with the same table, as it does for any number of threads.
    Raises Interrupted when the run is to stop, which is asked after every tensor, and ConvertError for weights that are
    not finite or a tensor without factors.
    """
    tensors = measurable_tensors(run.model_map)
    journal = run.work_dir / _JOURNAL
    finished: dict[str, dict[str, Any]] = {
        entry.pop("tensor"): entry for entry in read_lines(journal, partial(say, run.progress))
    }
    with ThreadPoolExecutor(run.job.n_threads) as pool:
        for n_done, tensor in enumerate(tensors, start=1):
            if tensor.name not in finished:
                measured = _Tensor(run.checkpoint, tensor, factors, importance, trials, pool)
                finished[tensor.name] = measured.losses()
                append_line(journal, {"tensor": tensor.name, **finished[tensor.name]})
            run.progress("sensitivity", n_done, len(tensors), "tensors")
            if run.should_stop() and n_done < len(tensors):
                raise Interrupted(f"stopped after {n_done} of {len(tensors)} tensors")
    return SensitivityTable(
        losses={tensor.name: finished[tensor.name]["losses"] for tensor in tensors},
        factors=factors,
        sampled_rows={tensor.name: finished[tensor.name]["sampled_rows"] for tensor in tensors},
        architecture=run.model_map.architecture,
        weights_sha256=weights_sha256(run.checkpoint, run.model_map),
        effort=trials.effort,
        tool=tool_identity(),
    )


def measurable_tensors(model_map: ModelMap) -> list[TensorSpec]:
    """The tensors that may be quantized and that the model computes with as the runtime does: of others no gradient is
    known, and their roles have floors. Rows that no block divides stay in 16 bits, which costs nothing."""
    matrices = (tensor for tensor in model_map.tensors if tensor.quantizable and tensor.role is not Role.MTP)
    fitting = (t for t in matrices if any(get_format(name).fits(t.n_columns) for name in CANDIDATE_FORMATS))
    return [tensor for tensor in fitting if tensor.layout.observed]


def weights_sha256(checkpoint: Checkpoint, model_map: ModelMap) -> str:
    """Of the first row of every matrix tensor, float32 as the artifact orders it: tells a model from any other at the
    cost of a read a tensor, and is the same for its files in another dtype that holds the same values."""
    digest = hashlib.sha256()
    for tensor in model_map.tensors:
        if tensor.quantizable and tensor.role is not Role.MTP:
            digest.update(tensor.name.encode() + read_rows(checkpoint, tensor, 0, 1).tobytes())
    return digest.hexdigest()


def check_sensitivity(table: SensitivityTable, checkpoint: Checkpoint, model_map: ModelMap) -> None:
    """Refuse a table of another model: by architecture and shapes, and by the weights where these are on this machine.

    Raises ConvertError naming what contradicts.
    """
    if table.architecture != model_map.architecture:
        raise _another_model(table, f"it is of a {table.architecture}, the model is a {model_map.architecture}")
    tensors = {tensor.name: tensor for tensor in measurable_tensors(model_map)}
    for name in sorted(table.losses.keys() | tensors.keys()):
        wanted = (t.n_matrices, t.n_rows // t.n_matrices, t.n_columns) if (t := tensors.get(name)) else None
        has = None
        if name in table.losses:
            has = (*table.factors.rows[name].shape, table.factors.columns[name].shape[1])
        if has != wanted:
            raise _another_model(table, f"of {name} it has {has or 'nothing'}, the model has {wanted or 'nothing'}")
    if checkpoint.fetch_weights is None and table.weights_sha256 != weights_sha256(checkpoint, model_map):
        raise _another_model(table, "the weights are others")


def _another_model(table: SensitivityTable, difference: str) -> ConvertError:
    return ConvertError(
        f"the sensitivity table is of another model ({table.factors.model}): {difference}",
        table.where,
        "compute one of this model: bitwright imatrix --sensitivity MODEL",
    )


def decode_encoded(
    block_format: BlockFormat,
    rows: np.ndarray,
    importance: np.ndarray | None,
    effort: Effort,
    largest_magnitude: float | None,
) -> np.ndarray:
    """What the rows become: float32 like rows. largest_magnitude: of the whole matrix, for a format whose second-level
    scale goes with it; None for no such scale."""
    if block_format.tensor_scale is None or largest_magnitude is None:
        return block_format.decode(block_format.encode(rows, importance, effort))
    scale = block_format.tensor_scale(largest_magnitude)
    encoded = block_format.encode(rows, importance, effort, tensor_scale=scale)  # type: ignore[call-arg]
    return block_format.decode(encoded) * np.float32(scale)


def sample_by_size(sizes: np.ndarray, n_wanted: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices, int64 in order, and how much of the whole each stands for, float64: for values that are about
    proportional to the sizes, sum(values[indices] * shares) estimates sum(values).

    One point is drawn in each of n_wanted equal parts of the summed sizes, and the index it falls on is taken; one that
    several fall on counts as often. All indices, with shares of 1, where there are no more than n_wanted of any size.
    """
    some = np.flatnonzero(sizes)
    if len(some) <= n_wanted:
        return some, np.ones(len(some))
    ends = np.cumsum(sizes[some])
    points = (np.arange(n_wanted) + np.random.default_rng(seed).random(n_wanted)) * (ends[-1] / n_wanted)
    places = np.searchsorted(ends, np.minimum(points, np.nextafter(ends[-1], 0)), side="right")
    chosen, counts = np.unique(places, return_counts=True)
    return some[chosen], counts * (ends[-1] / n_wanted) / sizes[some[chosen]]


@dataclass(frozen=True)
class _Sample:
    """Rows of one matrix of a tensor, and what an error in them costs.

    rows: float32 [n, n_columns]; costs: float64 [n], of each row's squared error, weighted with the column factors;
    largest_magnitude: of the whole matrix.
    """

    matrix: int
    rows: np.ndarray
    costs: np.ndarray
    largest_magnitude: float


class _Tensor:
    """Measures one tensor."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: TensorSpec,
        factors: FisherFactors,
        importance: ImportanceMatrix | None,
        trials: Trials,
        pool: ThreadPoolExecutor,
    ):
        if spec.name not in factors.rows:
            raise ConvertError(
                "the Fisher factors lack this tensor", f"{factors.where}, tensor {spec.name}", "compute them again"
            )
        self.checkpoint, self.spec, self.trials, self.pool = checkpoint, spec, trials, pool
        self.row_factors = factors.rows[spec.name].reshape(-1)
        self.column_factors = factors.columns[spec.name]
        self.importance: np.ndarray | None = None
        if importance is not None and spec.name in importance.names:
            self.importance = importance.columns(spec.name)

    def losses(self) -> dict[str, Any]:
        """{"sampled_rows": how many, "losses": format -> loss}"""
        samples = self._samples()
        fitting = [name for name in self.trials.formats if get_format(name).fits(self.spec.n_columns)]
        parts = self.pool.map(lambda one: self._loss(*one), product(fitting, samples))
        losses = {name: 0.5 * sum(next(parts) for _ in samples) for name in fitting}
        return {"sampled_rows": sum(len(sample.costs) for sample in samples), "losses": losses}

    def _loss(self, format_name: str, sample: _Sample) -> float:
        importance = None if self.importance is None else self.importance[sample.matrix]
        has_scale = scale_of(self.spec, format_name) is not None  # a second-level one, of this tensor
        magnitude = sample.largest_magnitude if has_scale else None
        decoded = decode_encoded(get_format(format_name), sample.rows, importance, self.trials.effort, magnitude)
        squared_errors = np.square(decoded - sample.rows, dtype=np.float64) @ self.column_factors[sample.matrix]
        return float(squared_errors @ sample.costs)

    def _samples(self) -> list[_Sample]:
        spans = list(row_spans(self.spec, CHUNK_WEIGHTS))
        sizes, magnitudes = np.zeros(self.spec.n_rows), np.zeros(self.spec.n_matrices)
        for (matrix, start, stop), (size, magnitude) in zip(spans, self.pool.map(self._sizes, spans), strict=True):
            sizes[start:stop] = size
            magnitudes[matrix] = max(magnitudes[matrix], magnitude)
        seed = zlib.crc32(self.spec.name.encode())
        indices, shares = sample_by_size(sizes, self.trials.sampled_rows, seed)
        costs = shares * self.row_factors[indices]
        matrices = indices * self.spec.n_matrices // self.spec.n_rows
        step = max(1, CHUNK_WEIGHTS // self.spec.n_columns)
        samples = []
        for matrix in np.unique(matrices):
            of_matrix = np.flatnonzero(matrices == matrix)
            for chosen in np.split(of_matrix, range(step, len(of_matrix), step)):
                rows = np.concatenate([read_rows(self.checkpoint, self.spec, i, i + 1) for i in indices[chosen]])
                samples.append(_Sample(int(matrix), rows, costs[chosen], float(magnitudes[matrix])))
        return samples

    def _sizes(self, span: tuple[int, int, int]) -> tuple[np.ndarray, float]:
        """What it would cost to lose each of these rows, and the largest magnitude of their weights."""
        matrix, start, stop = span
        rows = read_rows(self.checkpoint, self.spec, start, stop)
        magnitude = float(np.abs(rows).max())
        lost = np.square(rows, dtype=np.float64) @ self.column_factors[matrix]
        return lost * self.row_factors[start:stop], magnitude
