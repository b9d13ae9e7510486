"""What goes into every matrix: extremes and squares by channel, and histograms of all values and of tokens' peaks; and
what goes into the caches of keys and values."""

import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Self

import numpy as np
import torch

from bitwright.calibration.passes.device_inputs import DeviceInputs, ProductInputs, bring_over
from bitwright.calibration.statistics.activations import MatrixInputs
from bitwright.calibration.statistics.histogram import FLOAT32_SHIFT, N_BINS, N_CODES, N_MAGNITUDES, by_bins
from bitwright.calibration.stream.checkpointing import flat_arrays, load_flat_arrays
from bitwright.calibration.stream.device.totals import Maxima
from bitwright.calibration.stream.device.transfer import to_host
from bitwright.calibration.stream.observer import refuse_not_finite

# Rows that are kept of a parameter's inputs, over all its matrices, and of one matrix at least; and at most of one
# micro-batch, so that those of one text do not crowd out the others.
KEPT_ROWS, _LEAST_ROWS = 256, 16
_ROWS_OF_A_BATCH = 16


class InputSums(MatrixInputs):
    """Statistics of the inputs of one parameter's matrices, to which more is added in place. The extremes of a matrix
    that no row has reached are infinite."""

    @classmethod
    def empty(cls, n_matrices: int, n_columns: int) -> Self:
        return cls(
            minima=np.full((n_matrices, n_columns), np.inf, np.float32),
            maxima=np.full((n_matrices, n_columns), -np.inf, np.float32),
            squares=np.zeros((n_matrices, n_columns)),
            counts=np.zeros(n_matrices, np.int64),
            totals=np.zeros(n_matrices),
            values=np.zeros((n_matrices, N_BINS), np.int64),
            peaks=np.zeros((n_matrices, N_MAGNITUDES + 1), np.int64),
            ranges=np.zeros((n_matrices, 2)),
        )

    def add(self, other: MatrixInputs, matrices: slice = slice(None)) -> None:
        """Other rows of these matrices, all but their smoothed ranges."""
        for key, combine in (("minima", np.minimum), ("maxima", np.maximum)):
            into = getattr(self, key)[matrices]
            combine(into, getattr(other, key), out=into)
        for key in ("squares", "counts", "totals", "values", "peaks"):
            into = getattr(self, key)[matrices]
            into += getattr(other, key)

    def add_batch(self, other: MatrixInputs, decay: float) -> None:
        """Another micro-batch, the next in order."""
        ends = np.stack([other.minima.min(axis=1), other.maxima.max(axis=1)], axis=1)
        self.add_batches(other, [(ends, other.counts > 0)], decay)

    def add_batches(self, other: MatrixInputs, ends: Sequence[tuple[np.ndarray, np.ndarray]], decay: float) -> None:
        """The sum of the next micro-batches. ends: of each, in order, the smallest and the largest input of every
        matrix, float32 [n_matrices, 2], and which matrices had any, bool [n_matrices]."""
        reached = self.counts > 0
        for of_batch, seen in ends:
            batch = of_batch[seen].astype(np.float64)
            kept = np.where(reached[seen, None], decay, 0.0)
            self.ranges[seen] = kept * self.ranges[seen] + (1 - kept) * batch
            reached = reached | seen
        self.add(other)


FIELDS = tuple(field.name for field in fields(MatrixInputs))
_CACHED = ("keys", "values")
# parameter -> matrix -> float32 [n, n_columns]: some rows of its inputs
Rows = dict[str, dict[int, np.ndarray]]


class KeptRows:
    """Every n-th of the rows that are shown, in their order; n doubles when they become too many."""

    def __init__(self) -> None:
        self.rows: list[torch.Tensor] = []
        self._seen, self._step = 0, 1

    def add(self, rows: Iterable[torch.Tensor], capacity: int) -> None:
        for row in rows:
            if self._seen % self._step == 0:
                self.rows.append(row)
            self._seen += 1
        while len(self.rows) > capacity:
            self.rows, self._step = self.rows[::2], 2 * self._step


class InputObserver:
    """An Observer of inputs. inputs: parameter -> InputSums. decay: of the smoothed ranges, of the past in a step.

    write_rows: given some rows of a layer's inputs at the end of the layer, where they are wanted; where several
    matrices are shown the same tensor, those of the first one. caches: ("keys" or "values", layer) -> largest
    magnitudes of what a cache would hold, float32 [n_heads, head_size]. inputs, caches: of finished layers.
    Within a micro-batch sums are taken in float32 by torch's cascade summation, beyond it in float64, or on a GPU as
    Totals do.
    """

    one_group_at_once = True  # ranges are smoothed, and rows are kept, from micro-batch to micro-batch

    def __init__(self, decay: float, write_rows: Callable[[Rows], None] | None = None, first: int = 0) -> None:
        self.decay, self.write_rows, self.first = decay, write_rows, first
        self.inputs: dict[str, InputSums] = {}
        self.rows: dict[tuple[str, int, int], KeptRows] = {}
        self._caches = Maxima[tuple[str, int]]()
        self._there: dict[str, DeviceInputs] = {}
        self._latest: tuple[weakref.ref[torch.Tensor], InputSums | ProductInputs | None] | None = None

    @property
    def caches(self) -> dict[tuple[str, int], np.ndarray]:
        return self._caches.host

    def fresh(self, first: int) -> "InputObserver":
        return InputObserver(self.decay, self.write_rows, first)

    def observe(
        self, parameter: str, matrix: int, n_matrices: int, inputs: torch.Tensor, outputs: torch.Tensor | None
    ) -> None:
        if self._latest is None or self._latest[0]() is not inputs:
            rows = inputs.reshape(-1, inputs.shape[-1]).float()
            self._latest = (weakref.ref(inputs), _sums(rows))
            if self.write_rows is not None and outputs is not None:
                kept = self.rows.setdefault((parameter, matrix, n_matrices), KeptRows())
                kept.add(_some_rows(rows, f"{parameter} {matrix} {self.first}"), _ROWS_OF_A_BATCH)
        sums = self._latest[1]
        if isinstance(sums, InputSums):
            into = self.inputs.setdefault(parameter, InputSums.empty(n_matrices, inputs.shape[-1]))
            into.add(sums, slice(matrix, matrix + 1))
            return
        if parameter not in self._there:
            self._there[parameter] = DeviceInputs(n_matrices, inputs.shape[-1], inputs.device)
        if sums is not None:
            self._there[parameter].add(sums, matrix)

    def observe_cache(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        for kind, states in (("keys", keys), ("values", values)):
            peaks = states.detach().abs().amax(dim=(0, 2)).float()
            self._caches.add((kind, layer), tuple(peaks.shape), ..., peaks)

    def move_to(self, device: torch.device) -> None:
        for there in self._there.values():
            there.move_to(device)
        for kept in self.rows.values():
            kept.rows = list(torch.stack(kept.rows).to(device)) if kept.rows else []
        self._caches.move_to(device)

    def merge(self, other: "InputObserver") -> None:
        for parameter, inputs in other.inputs.items():
            refuse_not_finite(inputs.squares, parameter)
            n_matrices, n_columns = inputs.squares.shape
            into = self.inputs.setdefault(parameter, InputSums.empty(n_matrices, n_columns))
            into.add_batch(inputs, self.decay)
        for parameter, there in other._there.items():
            if parameter not in self._there:
                self._there[parameter] = there.empty_like()
            self._there[parameter].add_batch(there)
        for key, kept in other.rows.items():
            capacity = max(_LEAST_ROWS, KEPT_ROWS // key[2])
            self.rows.setdefault(key, KeptRows()).add(kept.rows, capacity)
        self._caches.merge(other._caches)

    def _take_rows(self) -> Rows:
        """The rows that are kept; they are kept no longer."""
        taken: Rows = {}
        order = sorted(self.rows)
        arrays = to_host([torch.stack(self.rows[key].rows) for key in order])
        for (parameter, matrix, _), rows in zip(order, arrays, strict=True):
            taken.setdefault(parameter, {})[matrix] = rows
        self.rows.clear()
        return taken

    def _settle(self) -> None:
        """Bring over what a GPU has summed up of a layer."""
        for (parameter, there), (inputs, ends) in zip(
            self._there.items(), bring_over(list(self._there.values())), strict=True
        ):
            refuse_not_finite(inputs.squares, parameter)
            into = self.inputs.setdefault(parameter, InputSums.empty(*there.minima.shape))
            into.add_batches(inputs, ends, self.decay)
        self._there.clear()
        self._caches.settle()

    def to_arrays(self) -> dict[str, np.ndarray]:
        self._settle()
        if self.write_rows is not None:
            self.write_rows(self._take_rows())
        sums = {key: {name: getattr(inputs, key) for name, inputs in self.inputs.items()} for key in FIELDS}
        caches = {
            f"cached {cached}": {str(layer): peaks for (kind, layer), peaks in self.caches.items() if kind == cached}
            for cached in _CACHED
        }
        return flat_arrays(sums | caches)

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        sums: dict[str, dict[str, np.ndarray]] = {key: {} for key in FIELDS}
        caches: dict[str, dict[str, np.ndarray]] = {f"cached {kind}": {} for kind in _CACHED}
        load_flat_arrays(arrays, sums | caches)
        self.inputs = {name: InputSums(**{key: sums[key][name] for key in FIELDS}) for name in sums["counts"]}
        self._caches.host = {
            (kind, int(layer)): peaks for kind in _CACHED for layer, peaks in caches[f"cached {kind}"].items()
        }


def _sums(rows: torch.Tensor) -> InputSums | ProductInputs | None:
    """The statistics of one matrix's inputs, where these are; None on a GPU without any. rows: float32 [n, n_columns].
    Counts of a bin are integers, so no order of adding matters."""
    if rows.device.type != "cpu":
        return ProductInputs(rows) if len(rows) else None
    sums = InputSums.empty(1, rows.shape[1])
    if len(rows):
        minima, maxima = rows.amin(dim=0), rows.amax(dim=0)  # several times as fast as aminmax
        peaks = torch.maximum(-rows.amin(dim=1), rows.amax(dim=1))
        sums.minima[0], sums.maxima[0] = minima.numpy(), maxima.numpy()
        sums.squares[0] = rows.square().sum(0).numpy()
        sums.counts[0] = len(rows)
        sums.totals[0] = float(rows.sum())
        sums.values[0] = _counts(rows.reshape(-1))
        sums.peaks[0] = _counts(peaks)[N_MAGNITUDES:]
    return sums


def _counts(values: torch.Tensor) -> np.ndarray:
    """Values by the bins of statistics/histogram.py: int64 [N_BINS]."""
    codes = values.contiguous().view(torch.int32) >> FLOAT32_SHIFT
    return by_bins(torch.bincount(codes.bitwise_and_(N_CODES - 1), minlength=N_CODES).numpy())


def _some_rows(rows: torch.Tensor, place: str) -> torch.Tensor:
    """At most _ROWS_OF_A_BATCH of them: the one with the largest value, which few tokens have and much depends on, and
    others drawn by what they hold: the same whenever they come, and from all places. On a GPU, where that would have
    the host wait, they are drawn by their place in the model and the text, and the largest takes the place of one."""
    if len(rows) <= _ROWS_OF_A_BATCH:
        return rows.clone()
    if rows.device.type == "cpu":
        seed, largest = zlib.crc32(rows[-1].numpy().tobytes()), int(rows.abs().amax(dim=1).argmax())
        drawn = np.random.default_rng(seed).choice(len(rows), _ROWS_OF_A_BATCH, replace=False)
        chosen = np.unique([largest, *drawn[drawn != largest][: _ROWS_OF_A_BATCH - 1]])
        return rows[torch.from_numpy(chosen)]
    random = np.random.default_rng(zlib.crc32(place.encode()))
    drawn = np.sort(random.choice(len(rows), _ROWS_OF_A_BATCH, replace=False))
    indices = torch.from_numpy(drawn).to(rows.device)
    indices[int(random.integers(_ROWS_OF_A_BATCH))] = rows.abs().amax(dim=1).argmax()
    return rows[indices]
