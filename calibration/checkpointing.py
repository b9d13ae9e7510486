"""The work directory of a layer stream: where it is, what it has collected, and the hidden states of all samples.

    stream.npz      fingerprint, finished layers, the observer's arrays; replaced whole after every layer
    hidden-0.bin    hidden states [n_samples, sequence_length, width] after an even number of layers
    hidden-1.bin    the same after an odd number

A layer reads one hidden file and writes the other. stream.npz, which says how many layers are done, is replaced after
the written one has reached the disk: killed at any moment, the stream continues after the last layer that it names.
Plain file reads keep the hidden states out of the process's memory; the page cache holds what fits.

A pass that keeps every layer's input numbers its files by the layers done. A pass backwards has the same directory, in
which a layer more is done with every layer down, and the hidden files hold gradients.
"""

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from formats.errors import ConvertError
from formats.whole_file import whole_file

STATE_NAME = "stream.npz"
NOT_STARTED = -1

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


class HiddenStates:
    """One file of hidden states; whole samples are read and written, from any thread."""

    def __init__(self, path: Path, sample_shape: tuple[int, int], dtype: torch.dtype):
        self.path, self.sample_shape, self.dtype = path, sample_shape, dtype
        self.sample_bytes = sample_shape[0] * sample_shape[1] * dtype.itemsize
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Samples start to stop: [stop - start, sequence_length, width]."""
        states = torch.empty((stop - start, *self.sample_shape), dtype=self.dtype)
        buffer = states.view(torch.uint8).numpy().data.cast("B")
        if os.preadv(self.descriptor, [buffer], start * self.sample_bytes) != len(buffer):
            raise ConvertError(
                "the file of hidden states is cut short", str(self.path), "start the calibration again with --fresh"
            )
        return states

    def write(self, start: int, states: torch.Tensor) -> None:
        buffer = states.cpu().contiguous().view(torch.uint8).numpy().data.cast("B")
        written = 0
        with _explained(self.path):
            while written < len(buffer):
                written += os.pwrite(self.descriptor, buffer[written:], start * self.sample_bytes + written)

    def sync(self) -> None:
        with _explained(self.path):
            os.fsync(self.descriptor)

    def __del__(self) -> None:
        os.close(self.descriptor)


class StreamCheckpoint:
    """Opens the work directory, or creates it. layers_done: NOT_STARTED, or the decoder layers behind us. keep: a file
    of hidden states for every layer, not two in turn.

    Raises ConvertError when the directory holds another run's checkpoint, naming what differs.
    """

    def __init__(
        self,
        directory: Path,
        fingerprint: Mapping[str, object],
        sample_shape: tuple[int, int],
        dtype: torch.dtype,
        *,
        keep: bool = False,
    ):
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.fingerprint = directory, dict(fingerprint)
        self.layers_done, self.complete = NOT_STARTED, False
        self.arrays: dict[str, np.ndarray] = {}
        if (directory / STATE_NAME).exists():
            self._load()
        self.keep, self._hidden = keep, (sample_shape, dtype)
        self._open: dict[int, HiddenStates] = {}

    def hidden(self, layers_done: int) -> HiddenStates:
        """The hidden states after that many layers."""
        number = layers_done if self.keep else layers_done % 2
        if number not in self._open:
            self._open[number] = HiddenStates(self.directory / f"hidden-{number}.bin", *self._hidden)
        return self._open[number]

    def commit(self, layers_done: int, arrays: Mapping[str, np.ndarray], complete: bool = False) -> None:
        """Everything up to here is on disk when this returns."""
        self.hidden(layers_done).sync()
        self.layers_done, self.complete, self.arrays = layers_done, complete, dict(arrays)
        header = {"fingerprint": self.fingerprint, "layers_done": layers_done, "complete": complete}
        with whole_file(self.directory / STATE_NAME, "calibration checkpoint", _REMEDY) as file:
            np.savez(file, allow_pickle=False, **{"header": np.array(json.dumps(header)), **arrays})

    def discard_hidden_states(self) -> None:
        self._open.clear()
        for path in self.directory.glob("hidden-*.bin"):
            path.unlink()

    def _load(self) -> None:
        path = self.directory / STATE_NAME
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            header = json.loads(str(arrays.pop("header")))
            fingerprint = header["fingerprint"]
            self.layers_done, self.complete = header["layers_done"], header["complete"]
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ConvertError(
                f"the calibration checkpoint cannot be read ({error})", str(path), "start again with --fresh"
            ) from error
        differing = [key for key, value in self.fingerprint.items() if fingerprint.get(key) != value]
        if differing:
            raise ConvertError(
                f"the calibration checkpoint is another run's: {differing[0]} is {fingerprint.get(differing[0])!r} "
                f"there and {self.fingerprint[differing[0]]!r} here",
                str(path),
                "give another --work-dir, or start again with --fresh",
            )
        self.arrays = arrays
