"""The stages `encode` and `write`: blocks of a plan, streamed into files whose every byte has its place already.

Row chunks are read and encoded on threads; this thread writes the results in order and hashes them. A chunk's size
depends on its row length only, and a row's bytes on that row only, so the file is the same for any number of threads.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibration.control import Interrupted, Progress, ShouldStop
from calibration.importance import ImportanceMatrix
from converter.checkpoint import Checkpoint
from converter.job import sync_directory
from converter.model_map import read_rows
from formats.errors import ConvertError
from formats.gguf_file import GgufLayout, padded
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


def _chunks(planned: PlannedTensor) -> Iterator[_Chunk]:
    tensor = planned.tensor
    rows_per_matrix = tensor.n_rows // tensor.n_matrices
    step = max(1, CHUNK_WEIGHTS // tensor.n_columns)
    for matrix_start in range(0, tensor.n_rows, rows_per_matrix):
        for start in range(matrix_start, matrix_start + rows_per_matrix, step):
            yield _Chunk(planned, start, min(start + step, matrix_start + rows_per_matrix))


def partial_path(output: Path) -> Path:
    """Where a file grows until it is whole: beside its final place, so that a rename completes it."""
    return output.with_name(f".{output.name}.partial")


class Encoder:
    """Encodes a plan into the partial files of its layouts, a checkpoint after every tensor.

    journal: JSON lines, one {"tensor", "sha256"} for each tensor whose data is safely on the disk.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        importance: ImportanceMatrix | None,
        layouts: list[GgufLayout],
        directory: Path,
        journal: Path,
    ):
        self.checkpoint, self.plan, self.layouts = checkpoint, plan, layouts
        self.directory, self.journal = directory, journal
        self.importance = {
            planned.tensor.name: importance.columns(planned.tensor.name)
            for planned in plan.tensors
            if importance is not None and planned.tensor.name in importance.sums
        }

    def run(self, threads: int, progress: Progress, should_stop: ShouldStop) -> None:
        """Encode whatever is not in the journal. Raises Interrupted between layers when should_stop() says so, and
        ConvertError for weights that cannot be encoded or a disk that is full; in either case a later run continues."""
        try:
            self._run(threads, progress, should_stop)
        except OSError as error:
            raise ConvertError(
                f"writing failed: {error}",
                str(error.filename or self.directory),
                "make room or choose another --output, then run the same command again: it continues from here",
            ) from None

    def _run(self, threads: int, progress: Progress, should_stop: ShouldStop) -> None:
        planned = {p.tensor.name: p for p in self.plan.tensors}
        finished = self._finished_tensors()
        done, total = 0, self.plan.n_bytes
        with ThreadPoolExecutor(threads) as pool, self.journal.open("a", encoding="utf-8") as journal:
            for layout in self.layouts:
                path = partial_path(self.directory / layout.file_name)
                if finished.issuperset(entry.name for entry in layout.tensors) and not path.exists():
                    done += sum(entry.n_bytes for entry in layout.tensors)
                    continue
                with path.open("r+b" if path.exists() else "w+b") as file:
                    if file.seek(0, os.SEEK_END) < len(layout.header):
                        file.seek(0)
                        file.write(layout.header)
                    layer = None
                    for entry, offset in zip(layout.tensors, layout.offsets, strict=True):
                        if entry.name not in finished:
                            if planned[entry.name].tensor.layer != layer and should_stop():
                                raise Interrupted
                            file.seek(offset)
                            file.truncate()
                            digest = self._write_tensor(file, planned[entry.name], pool, threads, progress, done, total)
                            file.flush()
                            os.fsync(file.fileno())
                            journal.write(json.dumps({"tensor": entry.name, "sha256": digest}) + "\n")
                            journal.flush()
                            os.fsync(journal.fileno())
                        layer = planned[entry.name].tensor.layer
                        done += entry.n_bytes
                        progress("encode", done, total, "B")
                    file.truncate(layout.n_bytes)

    def _write_tensor(
        self,
        file,
        planned: PlannedTensor,
        pool: ThreadPoolExecutor,
        threads: int,
        progress: Progress,
        done: int,
        total: int,
    ) -> str:
        """Append a tensor's data and padding; returns the data's SHA-256. At most 2 chunks a thread are in flight."""
        digest = hashlib.sha256()
        waiting: deque[Future[np.ndarray]] = deque()
        chunks = _chunks(planned)

        def submit() -> None:
            if (chunk := next(chunks, None)) is not None:
                waiting.append(pool.submit(self._encode_chunk, chunk))

        for _ in range(2 * threads):
            submit()
        while waiting:
            data = waiting.popleft().result().data
            submit()
            file.write(data)
            digest.update(data)
            done += data.nbytes
            progress("encode", done, total, "B")
        file.write(bytes(padded(planned.n_bytes) - planned.n_bytes))
        return digest.hexdigest()

    def _encode_chunk(self, chunk: _Chunk) -> np.ndarray:
        tensor = chunk.planned.tensor
        importance = self.importance.get(tensor.name)
        try:
            return get_format(chunk.planned.format).encode(
                read_rows(self.checkpoint, tensor, chunk.start, chunk.stop),
                None if importance is None else importance[chunk.matrix],
                self.plan.effort,
            )
        except ConvertError as error:
            where = f"tensor {tensor.name} ({', '.join(tensor.sources)}), from row {chunk.start} on: {error.where}"
            raise ConvertError(error.what, where, error.remedy) from None

    def _finished_tensors(self) -> set[str]:
        """The tensors of the journal whose bytes are in the partial files as they were written."""
        recorded = read_journal(self.journal)
        finished = set()
        for layout in self.layouts:
            final = self.directory / layout.file_name
            partial = partial_path(final)
            if partial.exists():
                sound = _sound_tensors(partial, layout, recorded)
                if not sound:
                    partial.unlink()
                finished.update(sound)
            elif final.exists():  # a run that was killed while it renamed the files of a split artifact
                sound = _sound_tensors(final, layout, recorded)
                finished.update(sound if len(sound) == len(layout.tensors) else ())
        return finished

    def complete(self) -> list[Path]:
        """Rename the partial files to their final names; returns these. A file already renamed is left."""
        paths = [self.directory / layout.file_name for layout in self.layouts]
        for path in paths:
            if partial_path(path).exists():
                partial_path(path).rename(path)
        sync_directory(self.directory)
        return paths


def read_journal(path: Path) -> dict[str, str]:
    """SHA-256 by tensor name; a last line cut short by a kill does not count."""
    entries = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        entries[entry["tensor"]] = entry["sha256"]
    return entries


def _sound_tensors(path: Path, layout: GgufLayout, recorded: dict[str, str]) -> list[str]:
    """The leading tensors of a file whose bytes are those on record: files are written in order, so nothing behind the
    first gap counts."""
    sound: list[str] = []
    with path.open("rb") as file:
        if file.read(len(layout.header)) != layout.header:
            return sound
        for entry, offset in zip(layout.tensors, layout.offsets, strict=True):
            if entry.name not in recorded or _digest(file, offset, entry.n_bytes) != recorded[entry.name]:
                break
            sound.append(entry.name)
    return sound


def _digest(file, offset: int, n_bytes: int) -> str:
    file.seek(offset)
    digest = hashlib.sha256()
    while n_bytes and (data := file.read(min(n_bytes, 1 << 24))):
        digest.update(data)
        n_bytes -= len(data)
    return digest.hexdigest() if not n_bytes else ""
