"""The work directory of a layer stream: where it is, what it has collected, and the hidden states of all samples.

    stream.npz      fingerprint, finished layers, the observer's arrays; replaced whole after every layer
    hidden-0.bin    hidden states [n_samples, sequence_length, width] after an even number of layers
    hidden-1.bin    the same after an odd number

A layer reads one hidden file and writes the other. stream.npz, which says how many layers are done, is replaced after
the written one has reached the disk: killed at any moment, the stream continues after the last layer that it names.
It holds the hash of every sample of the hidden states, too; where these, or itself by the checksums of an npz file, are
not what was written, the stream starts over.
Plain file reads keep the hidden states out of the process's memory; the page cache holds what fits.

A pass that keeps every layer's input numbers its files by the layers done. A pass backwards has the same directory, in
which a layer more is done with every layer down, and the hidden files hold gradients.
"""

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from bitwright.calibration.control import OnProgress, say
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import make_directory, open_descriptor, remove, sync_descriptor, write_at
from bitwright.formats.files.whole import whole_file

STATE_NAME = "stream.npz"
NOT_STARTED = -1

# Of the arrays of stream.npz: what begins so holds hashes of hidden states, uint8 [n_samples, _HASH_BYTES], by file.
_HASHES = "hashes of "
_HASH_BYTES = 32

_REMEDY = "free some space, or give another --work-dir; the same command continues after the last whole layer"


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Failures to write, such as a full disk, in the user's terms."""
    try:
        yield
    except OSError as error:
        raise ConvertError(
            f"the calibration checkpoint cannot be written ({error.strerror})",
            str(path),
            _REMEDY,
        ) from error


def flat_arrays(kinds: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """An observer's arrays as a checkpoint stores them: kind -> parameter -> array, named "KIND/PARAMETER"."""
    return {f"{kind}/{parameter}": array for kind, arrays in kinds.items() for parameter, array in arrays.items()}


def load_flat_arrays(stored: Mapping[str, np.ndarray], kinds: Mapping[str, dict[str, np.ndarray]]) -> None:
    """The inverse of flat_arrays, into the dictionaries of these kinds."""
    for name, array in stored.items():
        kind, _, parameter = name.partition("/")
        kinds[kind][parameter] = array


class HiddenStates:
    """One file of hidden states; whole samples are read and written, from any thread. width: of a position, as what was
    written last has it, 0 before. hashes: by sample, of what was written since the file was opened."""

    def __init__(self, path: Path, sequence_length: int, dtype: torch.dtype, width: int = 0):
        self.path, self.sequence_length, self.dtype, self.width = path, sequence_length, dtype, width
        self.descriptor = -1
        with _explained(path):
            self.descriptor = open_descriptor(path)
        self.hashes: dict[int, bytes] = {}

    def read(self, start: int, stop: int, pinned: bool = False) -> torch.Tensor:
        """Samples start to stop: [stop - start, sequence_length, width]. pinned: in memory that CUDA copies from."""
        shape = stop - start, self.sequence_length, self.width
        states = torch.empty(shape, dtype=self.dtype, pin_memory=pinned)
        buffer = states.view(torch.uint8).numpy().data.cast("B")
        if os.preadv(self.descriptor, [buffer], start * self.sample_bytes) != len(buffer):
            raise ConvertError(
                "the file of hidden states is cut short", str(self.path), "start the calibration again with --fresh"
            )
        return states

    def write(self, start: int, states: torch.Tensor) -> None:
        self.width = states.shape[-1]
        buffer = states.cpu().contiguous().view(torch.uint8).numpy().data.cast("B")
        for i in range(len(states)):
            self.hashes[start + i] = _hash(buffer[i * self.sample_bytes : (i + 1) * self.sample_bytes])
        with _explained(self.path):
            write_at(self.descriptor, self.path, buffer, start * self.sample_bytes)

    @property
    def sample_bytes(self) -> int:
        return self.sequence_length * self.width * self.dtype.itemsize

    def sync(self) -> None:
        with _explained(self.path):
            sync_descriptor(self.descriptor, self.path)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _hash(data: bytes | memoryview) -> bytes:
    return sha256(data).digest()


class StreamCheckpoint:
    """Opens the work directory, or creates it. layers_done: NOT_STARTED, or the decoder layers behind us. keep: a file
    of hidden states for every layer, not two in turn. damage: why it starts over, where it does. notes: what else is to
    be known of the hidden states, in terms of JSON.

    Raises ConvertError when the directory holds another run's checkpoint, naming what differs.
    """

    def __init__(
        self,
        directory: Path,
        fingerprint: Mapping[str, object],
        sequence_length: int,
        dtype: torch.dtype,
        *,
        keep: bool = False,
    ):
        make_directory(directory, _REMEDY)
        self.directory, self.fingerprint = directory, dict(fingerprint)
        self.keep, self._hidden = keep, (sequence_length, dtype)
        self._widths: dict[str, int] = {}
        self.notes: dict[str, Any] = {}
        self._open: dict[int, HiddenStates] = {}
        self._opening = Lock()
        self.layers_done, self.complete = NOT_STARTED, False
        self.arrays: dict[str, np.ndarray] = {}
        self._hashes: dict[str, np.ndarray] = {}
        self.damage: str | None = None
        if (directory / STATE_NAME).exists():
            self._load()

    def tell_damage(self, progress: OnProgress) -> None:
        if self.damage is not None:
            say(progress, f"{self.damage}: this pass over the model starts over")
            self.damage = None

    def hidden(self, layers_done: int) -> HiddenStates:
        """The hidden states after that many layers."""
        number = layers_done if self.keep else layers_done % 2
        with self._opening:  # one file has one set of hashes, whichever thread asks first
            if number not in self._open:
                path = self.directory / f"hidden-{number}.bin"
                self._open[number] = HiddenStates(path, *self._hidden, self._widths.get(path.name, 0))
            return self._open[number]

    def commit(self, layers_done: int, arrays: Mapping[str, np.ndarray], complete: bool = False) -> None:
        """Everything up to here is on disk when this returns."""
        states = self.hidden(layers_done)
        states.sync()
        if not self.keep:  # the layer that comes next writes over all other files
            self._hashes = {name: of for name, of in self._hashes.items() if name == states.path.name}
        if states.hashes:
            rows = [states.hashes[sample] for sample in sorted(states.hashes)]
            self._hashes[states.path.name] = np.frombuffer(b"".join(rows), np.uint8).reshape(-1, _HASH_BYTES)
            self._widths[states.path.name] = states.width
        self.layers_done, self.complete, self.arrays = layers_done, complete, dict(arrays)
        self._save()

    def _save(self) -> None:
        header = {
            "fingerprint": self.fingerprint,
            "layers_done": self.layers_done,
            "complete": self.complete,
            "widths": self._widths,
            "notes": self.notes,
        }
        stored = {"header": np.array(json.dumps(header)), **self.arrays}
        stored |= {f"{_HASHES}{name}": hashes for name, hashes in self._hashes.items()}
        with whole_file(self.directory / STATE_NAME, "calibration checkpoint", _REMEDY) as file:
            np.savez(file, allow_pickle=False, **stored)

    def discard_hidden_states(self) -> None:
        self._open.clear()
        if self._hashes:
            self._hashes.clear()
            self._save()
        for path in self.directory.glob("hidden-*.bin"):
            remove(path)

    def _load(self) -> None:
        path = self.directory / STATE_NAME
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            header = json.loads(str(arrays.pop("header")))
            fingerprint = header["fingerprint"]
            layers_done, complete = header["layers_done"], header["complete"]
            widths, notes = header["widths"], header["notes"]
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, NotImplementedError) as error:
            self.damage = f"{path} cannot be read ({error})"
            return
        differing = [key for key, value in self.fingerprint.items() if fingerprint.get(key) != value]
        if differing:
            raise ConvertError(
                f"the calibration checkpoint is another run's: {differing[0]} is {fingerprint.get(differing[0])!r} "
                f"there and {self.fingerprint[differing[0]]!r} here",
                str(path),
                "give another --work-dir, or start again with --fresh",
            )
        if self.keep and complete and not any(name.startswith(_HASHES) for name in arrays):
            return  # the hidden states that it was to keep have been discarded, and are wanted again
        hashes = {name.removeprefix(_HASHES): arrays.pop(name) for name in [*arrays] if name.startswith(_HASHES)}
        for name, of in hashes.items():
            if not self._is_sound(self.directory / name, of, widths[name]):
                self.damage = f"{self.directory / name} is not what was written there"
                return
        self.layers_done, self.complete, self.arrays, self._hashes = layers_done, complete, arrays, hashes
        self._widths, self.notes = widths, notes

    def _is_sound(self, path: Path, hashes: np.ndarray, width: int) -> bool:
        sequence_length, dtype = self._hidden
        n_bytes = sequence_length * width * dtype.itemsize
        if not path.is_file() or path.stat().st_size != n_bytes * len(hashes):
            return False
        with path.open("rb") as file:
            return all(_hash(file.read(n_bytes)) == of.tobytes() for of in hashes)
