"""The stage `encode`: the rows of a plan's tensors as blocks, in order, a few row chunks in memory at a time.

Row chunks are read and encoded on threads. A chunk's size depends on its row length only, and a row's bytes on that row
only, so the bytes are the same for any number of threads.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Self

import numpy as np

from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.converter.artifact.feedback import Candidates, Feedback, Inputs, Outcome, wants_feedback
from bitwright.converter.gguf.source_codes import stored_rows, stored_scales
from bitwright.converter.model.rescaled import rescale_importance
from bitwright.converter.model.stored_rows import CHUNK_WEIGHTS, read_rows, row_spans
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.choices import Effort
from bitwright.formats.errors import ConvertError
from bitwright.formats.feedback.moment_factor import unit_of
from bitwright.formats.pins import Pin, encode_pinned
from bitwright.formats.registry import get_format
from bitwright.profiles.planning.assign import scale_of
from bitwright.profiles.planning.plan import Plan, PlannedTensor


@dataclass(frozen=True)
class _Chunk:
    """Consecutive rows of one matrix of one tensor, counted over all matrices."""

    planned: PlannedTensor
    start: int
    stop: int

    @property
    def matrix(self) -> int:
        return self.start * self.planned.tensor.n_matrices // self.planned.tensor.n_rows

    @property
    def rows(self) -> range:
        return range(self.start, self.stop)

    @property
    def pins(self) -> list[Pin]:
        """Those of its rows, counted from its first."""
        return [replace(pin, row=pin.row - self.start) for pin in self.planned.pins if pin.row in self.rows]

    @property
    def where(self) -> str:
        tensor = self.planned.tensor
        return f"tensor {tensor.name} ({', '.join(tensor.sources)}), from row {self.start} on"


def _chunks(planned: PlannedTensor) -> Iterator[_Chunk]:
    for _, start, stop in row_spans(planned.tensor, CHUNK_WEIGHTS):
        yield _Chunk(planned, start, stop)


def encoding_errors(
    planned: PlannedTensor, rows: np.ndarray, importance: np.ndarray, effort: Effort = "fast"
) -> np.ndarray:
    """What the planned format leaves of some rows of a tensor, or of some of their blocks: float64 like rows, decoded
    minus encoded. rows: float32 [n_rows, n_columns]; importance: [n_columns]. A second-level scale is that of these
    rows."""
    block_format, scale = get_format(planned.format), 1.0
    if block_format.tensor_scale is not None and scale_of(planned.tensor, planned.format) is not None:
        scale = block_format.tensor_scale(float(np.abs(rows).max()))
    encoded = block_format.encode(rows / np.float32(scale), importance.astype(np.float32), effort)
    errors: np.ndarray = block_format.decode(encoded).astype(np.float64) * scale - rows
    return errors


class Encoder:
    """Encodes the tensors of a plan on its threads, which live as long as the `with` block.

    feedback: what the tensors that take it are encoded with; outcomes: what it did for each of their matrices.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        importance: ImportanceMatrix | None,
        threads: int,
        feedback: Feedback | None = None,
    ):
        self.checkpoint, self.plan, self.threads, self.feedback = checkpoint, plan, threads, feedback
        self.outcomes: dict[str, list[Outcome]] = defaultdict(list)
        self.importance = {
            planned.tensor.name: rescale_importance(planned.tensor.rescaled, importance.columns(planned.tensor.name))
            for planned in plan.tensors
            if importance is not None and planned.tensor.name in importance.names
        }
        self._by_name = {planned.tensor.name: planned for planned in plan.tensors}
        self._tensor_scales: dict[str, list[float]] = {}

    @property
    def rows(self) -> tuple[PlannedTensor, ...]:
        return self.plan.tensors

    def planned(self, name: str) -> PlannedTensor | None:
        """The row of the tensor of this name."""
        return self._by_name.get(name)

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(self.threads)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def encode(self, planned: PlannedTensor) -> Iterator[np.ndarray]:
        """The tensor's data in order, uint8, a chunk of rows at a time; at most two chunks a thread are in flight, and
        with feedback one matrix.

        Raises ConvertError for weights that cannot be encoded, naming tensor, row and column.
        """
        if planned.tensor.origin == "scale":
            weight = self._by_name[planned.tensor.name.removesuffix(".scale") + ".weight"]
            yield np.array(self.scales(weight), "<f4").view(np.uint8)
            return
        scales = self.scales(planned)  # before the pool is full of chunks that wait for them
        self.outcomes.pop(planned.tensor.name, None)
        if self.feedback is None or not wants_feedback(planned):
            yield from self._encode_chunks(_chunks(planned), scales)
            return
        for matrix, chunks in groupby(_chunks(planned), lambda chunk: chunk.matrix):
            yield from self._feed_back(planned, matrix, list(chunks), scales, self.feedback)

    def remarks(self, name: str) -> dict[str, object]:
        """What the journal of a written artifact keeps of a tensor: what feedback did for its matrices."""
        return {"feedback": [asdict(outcome) for outcome in self.outcomes[name]]} if name in self.outcomes else {}

    def was_copied(self, name: str) -> bool:
        """As PlanEncoder.was_copied."""
        return False

    def _encode_chunks(self, chunks: Iterable[_Chunk], scales: list[float]) -> Iterator[np.ndarray]:
        waiting: deque[Future[np.ndarray]] = deque()
        for chunk in chunks:
            waiting.append(self._pool.submit(self._encode_chunk, chunk, scales))
            if len(waiting) >= 2 * self.threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def decoded(self, name: str) -> np.ndarray:
        """What the whole tensor of this name will decode to: float32 [n_rows, n_columns]."""
        return self.decode(name, self.encode(self._by_name[name]))

    def decode(self, name: str, encoded: Iterable[np.ndarray]) -> np.ndarray:
        """The same of what it has been encoded to: uint8, consecutive whole rows each."""
        planned = self._by_name[name]
        block_format, n_columns = get_format(planned.format), planned.tensor.n_columns
        row_bytes = block_format.row_bytes(n_columns)
        rows = np.concatenate([block_format.decode(data.reshape(-1, row_bytes)) for data in encoded])
        if scales := self.scales(planned):
            matrices = rows.reshape(planned.tensor.n_matrices, -1)
            matrices *= np.array(scales, np.float32)[:, None]
        return rows

    def _feed_back(
        self, planned: PlannedTensor, matrix: int, chunks: list[_Chunk], scales: list[float], feedback: Feedback
    ) -> Iterator[np.ndarray]:
        """The chunks of a matrix with feedback, or without where that is better."""
        unit, factors = unit_of(get_format(planned.format)), feedback.factors(planned.tensor, matrix)
        inputs = feedback.inputs(planned.tensor.name, matrix, unit, self._pool.map, factors)
        if isinstance(inputs, Outcome):
            self.outcomes[planned.tensor.name].append(inputs)
            yield from self._encode_chunks(chunks, scales)
            return
        both = [self._pool.submit(self._encode_both, chunk, scales, inputs, feedback) for chunk in chunks]
        outcome, data = feedback.choose(planned, matrix, [future.result() for future in both])
        self.outcomes[planned.tensor.name].append(outcome)
        yield from data

    def _encode_both(self, chunk: _Chunk, scales: list[float], inputs: Inputs, feedback: Feedback) -> Candidates:
        plain = self._encode_chunk(chunk, scales)
        start = self._encode_chunk(chunk, scales, inputs.factor.importance)
        rows = read_rows(self.checkpoint, chunk.planned.tensor, chunk.start, chunk.stop)
        if scales:
            rows = rows / np.float32(scales[chunk.matrix])
        return feedback.candidates(get_format(chunk.planned.format), rows, plain, start, inputs, chunk.pins)

    def _encode_chunk(self, chunk: _Chunk, scales: list[float], importance: np.ndarray | None = None) -> np.ndarray:
        """importance: instead of the tensor's own, float32 [n_columns]."""
        if importance is None and chunk.planned.tensor.name in self.importance:
            importance = self.importance[chunk.planned.tensor.name][chunk.matrix]
        if (stored := stored_rows(self.checkpoint, chunk.planned, chunk.rows, scales)) is not None:
            return stored
        rows = read_rows(self.checkpoint, chunk.planned.tensor, chunk.start, chunk.stop)
        block_format, scale = get_format(chunk.planned.format), scales[chunk.matrix] if scales else None
        try:
            if pins := chunk.pins:
                # Pins know of no second-level scale; rows divided by it are encoded as with it.
                return encode_pinned(block_format, rows / np.float32(scale or 1), importance, self.plan.effort, pins)[0]
            options = {} if scale is None else {"tensor_scale": scale}
            return block_format.encode(rows, importance, self.plan.effort, **options)
        except ConvertError as error:
            raise ConvertError(error.what, f"{chunk.where}: {error.where}", error.remedy) from None

    def scales(self, planned: PlannedTensor) -> list[float]:
        """The second-level scale of every matrix, the source's where it has one, or else from the largest magnitude of
        its weights; empty for a tensor that has none."""
        name, tensor_scale = planned.tensor.name, get_format(planned.format).tensor_scale
        scale = self._by_name.get(f"{name.removesuffix('.weight')}.scale")
        if tensor_scale is None or scale is None or scale.tensor.sources:  # with a source, it is the model's own
            return []
        if name not in self._tensor_scales and (stored := stored_scales(self.checkpoint, planned)) is not None:
            self._tensor_scales[name] = stored
        if name not in self._tensor_scales:
            largest = [0.0] * planned.tensor.n_matrices
            chunks = list(_chunks(planned))
            for chunk, magnitude in zip(chunks, self._pool.map(self._largest_magnitude, chunks), strict=True):
                largest[chunk.matrix] = max(largest[chunk.matrix], magnitude)
            self._tensor_scales[name] = [tensor_scale(magnitude) for magnitude in largest]
        return self._tensor_scales[name]

    def _largest_magnitude(self, chunk: _Chunk) -> float:
        return float(np.abs(read_rows(self.checkpoint, chunk.planned.tensor, chunk.start, chunk.stop)).max())
