"""The stage `write`: encoded tensors into files whose every byte has its place already.

A file grows beside its final name, tensor by tensor; when all are there it is renamed. The journal in the work
directory says which tensors are safely on the disk, and what their bytes were.
"""

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, Generic, Protocol, TypeVar

import numpy as np

from bitwright.calibration.control import Interrupted, OnProgress, ShouldStop, say, took
from bitwright.converter.artifact.layout import Layout, partial_path, spans
from bitwright.converter.artifact.ownership import Replaceable, check_free, put_in_place, remove_replaced, same_file
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import open_file, remove, rename, sync_directory, sync_file
from bitwright.formats.files.journal import append_line, read_lines
from bitwright.profiles.planning.plan import PlannedTensor

JOURNAL = "encoded.jsonl"

R = TypeVar("R", bound=PlannedTensor)
"""The rows of one kind of plan."""


class PlanEncoder(Protocol[R]):
    """Encodes what a plan has, in the order of the files; as converter.gguf.encode.Encoder does."""

    @property
    def rows(self) -> tuple[R, ...]:
        """All rows of the plan."""

    def encode(self, planned: R) -> Iterator[np.ndarray]:
        """The data that stand for it in the file, in order, uint8."""

    def remarks(self, name: str) -> dict[str, object]:
        """What the journal should keep of an entry that has been encoded, besides its hash: plain data."""

    def was_copied(self, name: str) -> bool:
        """Whether an entry was there encoded already, so that the time it took says nothing of encoding."""


class ArtifactWriter(Generic[R]):
    """Writes the files of an artifact, a checkpoint after every tensor.

    journal: JSON lines, one {"tensor", "sha256"} for each tensor whose data is safely on the disk, and what the
    encoder remarks of it. replaceable: what may be replaced where the files are to be; None for a directory of ours,
    in which anything may.
    """

    def __init__(
        self,
        encoder: PlanEncoder[R],
        layouts: Sequence[Layout],
        directory: Path,
        journal: Path,
        replaceable: Replaceable | None = None,
    ):
        self.encoder, self.layouts, self.directory, self.journal = encoder, layouts, directory, journal
        self.replaceable = replaceable
        self._planned = {planned.tensor.name: planned for planned in encoder.rows}
        self._total = sum(planned.n_bytes for planned in encoder.rows)

    def write(self, progress: OnProgress, should_stop: ShouldStop) -> list[Path]:
        """Encode and write whatever is not there yet; returns the finished files.

        Raises Interrupted between layers when should_stop() says so, and ConvertError for weights that cannot be
        encoded or a disk that is full; after any of these, and after a kill, a later call continues.
        """
        try:
            self._write_files(progress, should_stop)
            return self._complete()
        except OSError as error:
            raise ConvertError(
                f"writing failed: {error}",
                str(error.filename or self.directory),
                "make room or choose another --output, then run the same command again: it continues from here",
            ) from None

    def _write_files(self, progress: OnProgress, should_stop: ShouldStop) -> None:
        finished = self._finished_tensors(progress)
        done = 0
        for layout in self.layouts:
            path = partial_path(self.directory / layout.file_name)
            if finished.issuperset(entry.name for entry in layout.tensors) and not path.exists():
                done += sum(entry.n_bytes for entry in layout.tensors)
                continue
            if self.replaceable is not None:
                open_file(path).close()
                self.replaceable.grows(path)  # before anything is in it
            with open_file(path) as file:
                if file.seek(0, os.SEEK_END) < len(layout.header):
                    file.seek(0)
                    file.write(layout.header)
                layer = None
                for entry, offset, end in spans(layout):
                    planned = self._planned[entry.name]
                    if entry.name not in finished:
                        if planned.tensor.layer != layer and should_stop():
                            raise Interrupted
                        file.seek(offset)
                        file.truncate()
                        began = time.monotonic()
                        digest = self._write_tensor(file, planned, progress, done)
                        file.write(bytes(end - file.tell()))
                        sync_file(file)
                        record = {"tensor": entry.name, "sha256": digest, **self.encoder.remarks(entry.name)}
                        append_line(self.journal, record)
                        if not self.encoder.was_copied(entry.name):
                            took(progress, entry.name, planned.tensor.n_weights, time.monotonic() - began)
                    layer = planned.tensor.layer
                    done += entry.n_bytes
                    progress("encode", done, self._total, "B")
                file.truncate(layout.n_bytes)
                sync_file(file)

    def _write_tensor(self, file: BinaryIO, planned: R, progress: OnProgress, done: int) -> str:
        """Append a tensor's data; returns their SHA-256."""
        digest = hashlib.sha256()
        for data in self.encoder.encode(planned):
            file.write(data.data)
            digest.update(data.data)
            done += data.nbytes
            progress("encode", done, self._total, "B")
        return digest.hexdigest()

    def _finished_tensors(self, progress: OnProgress) -> set[str]:
        """The tensors of the journal whose bytes are in the partial files as they were written.

        Raises ConvertError for a file in the place of one of ours, before anything is encoded in vain."""
        recorded = {entry["tensor"]: entry["sha256"] for entry in read_lines(self.journal, partial(say, progress))}
        finished = set()
        for layout in self.layouts:
            final = self.directory / layout.file_name
            growing = partial_path(final)
            if os.path.lexists(growing):
                sound = _sound_tensors(growing, layout, recorded) if growing.is_file() else []
                if self.replaceable is not None and not sound:
                    self.replaceable.check_growing(growing, begins_as(growing, layout))
                _tell_damage(growing, layout, recorded, len(sound), progress)
                if not sound:
                    remove(growing)
                finished.update(sound)
            elif final.exists():  # a run that was killed while it renamed the files of a split artifact
                sound = _sound_tensors(final, layout, recorded)
                if len(sound) == len(layout.tensors) and final.stat().st_size == layout.n_bytes:
                    finished.update(sound)
                    continue
            if self.replaceable is not None and not (growing.exists() and final.exists() and same_file(final, growing)):
                check_free([final], self.replaceable)
        return finished

    def _complete(self) -> list[Path]:
        """Rename the partial files to their final names; returns these. A file already renamed is left."""
        paths = [self.directory / layout.file_name for layout in self.layouts]
        for path in paths:
            if partial_path(path).exists():
                self._put_in_place(path)
            elif self.replaceable is not None:
                remove_replaced(path, self.replaceable)
        sync_directory(self.directory)
        return paths

    def _put_in_place(self, path: Path) -> None:
        if self.replaceable is None:
            rename(partial_path(path), path)
        else:
            put_in_place(partial_path(path), path, self.replaceable)


def written_sha256(path: Path, layout: Layout, journal: Path) -> str:
    """SHA-256 of a finished file that is, to the byte, what the layout and the journal say. Raises ConvertError for any
    other, whoever has written it."""
    recorded = {entry["tensor"]: entry["sha256"] for entry in read_lines(journal)}
    whole = hashlib.sha256()
    with path.open("rb") as file:
        header = file.read(len(layout.header))
        whole.update(header)
        sound = header == layout.header
        for entry, offset, end in spans(layout):
            sound = sound and _digest(file, offset, entry.n_bytes, whole) == recorded.get(entry.name)
            padding = file.read(end - offset - entry.n_bytes)
            whole.update(padding)
            sound = sound and not any(padding)
        sound = sound and not file.read(1)
    if not sound:
        raise changed_meanwhile(path)
    return whole.hexdigest()


def changed_meanwhile(path: Path) -> ConvertError:
    return ConvertError(
        "the artifact is not what this job has written: it was changed or replaced meanwhile",
        str(path),
        "leave it alone until the job is done, then write it again with --fresh, or to another --output",
    )


def begins_as(path: Path, layout: Layout) -> bool:
    """Whether a file begins with the header of the layout, or with as much of it as a kill or a power cut, which leaves
    zeros, has let be written."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return layout.header.startswith(file.read(len(layout.header)).rstrip(b"\0"))


def continues(path: Path, layout: Layout, recorded: dict[str, str]) -> bool:
    """Whether the first tensor of the file is as the journal has it."""
    entry, offset = layout.tensors[0], layout.offsets[0]
    if not path.is_file() or entry.name not in recorded:
        return False
    with path.open("rb") as file:
        return file.read(len(layout.header)) == layout.header and (
            _digest(file, offset, entry.n_bytes) == recorded[entry.name]
        )


def _tell_damage(path: Path, layout: Layout, recorded: dict[str, str], n_sound: int, progress: OnProgress) -> None:
    """Where a file holds all of a tensor that is on record, and other bytes."""
    if n_sound < len(layout.tensors):
        entry, _, end = [*spans(layout)][n_sound]
        if entry.name in recorded and path.stat().st_size >= end:
            say(progress, f"{path}: {entry.name} is not what was written there, and is encoded again")


def _sound_tensors(path: Path, layout: Layout, recorded: dict[str, str]) -> list[str]:
    """The leading tensors of a file whose bytes are those on record: files are written in order, so nothing behind the
    first gap counts."""
    sound: list[str] = []
    with path.open("rb") as file:
        if file.read(len(layout.header)) != layout.header:
            return sound
        for entry, offset, end in spans(layout):
            if entry.name not in recorded or _digest(file, offset, entry.n_bytes) != recorded[entry.name]:
                break
            if file.read(end - offset - entry.n_bytes).strip(b"\0"):  # padding
                break
            sound.append(entry.name)
    return sound


def _digest(file: BinaryIO, offset: int, n_bytes: int, whole: "hashlib._Hash | None" = None) -> str:
    """SHA-256 of a part of the file, "" where it ends before. whole: takes the same bytes in, too."""
    file.seek(offset)
    digest = hashlib.sha256()
    while n_bytes and (data := file.read(min(n_bytes, 1 << 24))):
        digest.update(data)
        if whole is not None:
            whole.update(data)
        n_bytes -= len(data)
    return digest.hexdigest() if not n_bytes else ""
