"""The stage `encode`: the rows of a plan's tensors as blocks, in order, a few row chunks in memory at a time.

Row chunks are read and encoded on threads. A chunk's size depends on its row length only, and a row's bytes on that row
only, so the bytes are the same for any number of threads.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from calibration.importance import ImportanceMatrix
from converter.checkpoint import Checkpoint
from converter.model_map import read_rows
from converter.rescaling import rescale_importance
from formats.errors import ConvertError
from formats.pins import encode_pinned
from formats.registry import get_format
from profiles.plan import Plan, PlannedTensor

CHUNK_WEIGHTS = 1 << 20
"""Weights a thread holds at a time: 4 MiB of float32, some times that with an encoder's own arrays."""


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
    def where(self) -> str:
        tensor = self.planned.tensor
        return f"tensor {tensor.name} ({', '.join(tensor.sources)}), from row {self.start} on"


def _chunks(planned: PlannedTensor) -> Iterator[_Chunk]:
    tensor = planned.tensor
    rows_per_matrix = tensor.n_rows // tensor.n_matrices
    step = max(1, CHUNK_WEIGHTS // tensor.n_columns)
    for matrix_start in range(0, tensor.n_rows, rows_per_matrix):
        for start in range(matrix_start, matrix_start + rows_per_matrix, step):
            yield _Chunk(planned, start, min(start + step, matrix_start + rows_per_matrix))


class Encoder:
    """Encodes the tensors of a plan on its threads, which live as long as the `with` block."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, importance: ImportanceMatrix | None, threads: int):
        self.checkpoint, self.plan, self.threads = checkpoint, plan, threads
        self.importance = {
            planned.tensor.name: rescale_importance(planned.tensor.rescaled, importance.columns(planned.tensor.name))
            for planned in plan.tensors
            if importance is not None and planned.tensor.name in importance.sums
        }
        self._by_name = {planned.tensor.name: planned for planned in plan.tensors}
        self._tensor_scales: dict[str, list[float]] = {}

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(self.threads)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def encode(self, planned: PlannedTensor) -> Iterator[np.ndarray]:
        """The tensor's data in order, uint8, a chunk of rows at a time; at most two chunks a thread are in flight.

        Raises ConvertError for weights that cannot be encoded, naming tensor, row and column.
        """
        if planned.tensor.transform == "scale":
            weight = self._by_name[planned.tensor.name.removesuffix(".scale") + ".weight"]
            yield np.array(self._scales(weight), "<f4").view(np.uint8)
            return
        # Scales are found before the pool is full of chunks that wait for them.
        scales = self._scales(planned) if self._has_scales(planned) else None
        waiting: deque[Future[np.ndarray]] = deque()
        for chunk in _chunks(planned):
            waiting.append(self._pool.submit(self._encode_chunk, chunk, scales))
            if len(waiting) >= 2 * self.threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def decoded(self, name: str) -> np.ndarray:
        """What the whole tensor of this name will decode to: float32 [n_rows, n_columns]."""
        planned = self._by_name[name]
        block_format = get_format(planned.format)
        rows = np.concatenate([block_format.decode(data) for data in self.encode(planned)])
        if self._has_scales(planned):
            matrices = rows.reshape(planned.tensor.n_matrices, -1)
            matrices *= np.array(self._scales(planned), np.float32)[:, None]
        return rows

    def _encode_chunk(self, chunk: _Chunk, scales: list[float] | None) -> np.ndarray:
        of_tensor = self.importance.get(chunk.planned.tensor.name)
        importance = None if of_tensor is None else of_tensor[chunk.matrix]
        rows = read_rows(self.checkpoint, chunk.planned.tensor, chunk.start, chunk.stop)
        block_format, scale = get_format(chunk.planned.format), None if scales is None else scales[chunk.matrix]
        pins = [replace(pin, row=pin.row - chunk.start) for pin in chunk.planned.pins if pin.row in chunk.rows]
        try:
            if pins:
                # Pins know of no second-level scale; rows divided by it are encoded as with it.
                return encode_pinned(block_format, rows / np.float32(scale or 1), importance, self.plan.effort, pins)[0]
            options = {} if scale is None else {"tensor_scale": scale}
            return block_format.encode(rows, importance, self.plan.effort, **options)
        except ConvertError as error:
            raise ConvertError(error.what, f"{chunk.where}: {error.where}", error.remedy) from None

    def _has_scales(self, planned: PlannedTensor) -> bool:
        return planned.tensor.name.removesuffix(".weight") + ".scale" in self._by_name

    def _scales(self, planned: PlannedTensor) -> list[float]:
        """The second-level scale of every matrix, from the largest magnitude of its weights."""
        name = planned.tensor.name
        if name not in self._tensor_scales:
            largest = [0.0] * planned.tensor.n_matrices
            chunks = list(_chunks(planned))
            for chunk, magnitude in zip(chunks, self._pool.map(self._largest_magnitude, chunks), strict=True):
                largest[chunk.matrix] = max(largest[chunk.matrix], magnitude)
            tensor_scale = get_format(planned.format).tensor_scale
            assert tensor_scale is not None
            self._tensor_scales[name] = [tensor_scale(magnitude) for magnitude in largest]
        return self._tensor_scales[name]

    def _largest_magnitude(self, chunk: _Chunk) -> float:
        """0 for a chunk with a weight that is no number: its encoder will say which."""
        magnitude = float(np.abs(read_rows(self.checkpoint, chunk.planned.tensor, chunk.start, chunk.stop)).max())
        return magnitude if np.isfinite(magnitude) else 0.0
