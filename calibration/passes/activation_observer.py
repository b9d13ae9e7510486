"""What goes into every matrix: extremes and squares by channel, and histograms of all values and of tokens' peaks; and
what goes into the caches of keys and values."""

import weakref
import zlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Self

import numpy as np
import torch

from bitwright.calibration.statistics.activations import MatrixInputs
from bitwright.calibration.statistics.histogram import FLOAT32_SHIFT, N_BINS, N_CODES, N_MAGNITUDES, by_bins
from bitwright.calibration.stream.checkpointing import flat_arrays, load_flat_arrays
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
        self._smooth(other, decay)
        self.add(other)

    def _smooth(self, other: MatrixInputs, decay: float) -> None:
        seen, first = other.counts > 0, self.counts == 0
        batch = np.stack([other.minima.min(axis=1), other.maxima.max(axis=1)], axis=1)[seen].astype(np.float64)
        kept = np.where(first[seen, None], 0.0, decay)
        self.ranges[seen] = kept * self.ranges[seen] + (1 - kept) * batch


FIELDS = tuple(field.name for field in fields(MatrixInputs))
_CACHED = ("keys", "values")
# parameter -> matrix -> float32 [n, n_columns]: some rows of its inputs
Rows = dict[str, dict[int, np.ndarray]]


class KeptRows:
    """Every n-th of the rows that are shown, in their order; n doubles when they become too many."""

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []
        self._seen, self._step = 0, 1

    def add(self, rows: np.ndarray, capacity: int) -> None:
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
    magnitudes of what a cache would hold, float32 [n_heads, head_size].
    Within a micro-batch sums are taken in float32 by torch's cascade summation, beyond it in float64.
    """

    def __init__(self, decay: float, write_rows: Callable[[Rows], None] | None = None) -> None:
        self.decay, self.write_rows = decay, write_rows
        self.inputs: dict[str, InputSums] = {}
        self.rows: dict[tuple[str, int, int], KeptRows] = {}
        self.caches: dict[tuple[str, int], np.ndarray] = {}
        self._latest: tuple[weakref.ref[torch.Tensor], InputSums] | None = None

    def fresh(self, first: int) -> "InputObserver":
        return InputObserver(self.decay, self.write_rows)

    def observe(
        self, parameter: str, matrix: int, n_matrices: int, inputs: torch.Tensor, outputs: torch.Tensor | None
    ) -> None:
        if self._latest is None or self._latest[0]() is not inputs:
            rows = inputs.reshape(-1, inputs.shape[-1]).float()
            self._latest = (weakref.ref(inputs), _sums(rows))
            if self.write_rows is not None and outputs is not None:
                kept = self.rows.setdefault((parameter, matrix, n_matrices), KeptRows())
                kept.add(_some_rows(rows), _ROWS_OF_A_BATCH)
        sums = self._latest[1]
        into = self.inputs.setdefault(parameter, InputSums.empty(n_matrices, inputs.shape[-1]))
        into.add(sums, slice(matrix, matrix + 1))

    def observe_cache(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        for kind, states in (("keys", keys), ("values", values)):
            self._add_peaks((kind, layer), states.detach().abs().amax(dim=(0, 2)).float().cpu().numpy())

    def _add_peaks(self, key: tuple[str, int], peaks: np.ndarray) -> None:
        self.caches[key] = np.maximum(self.caches[key], peaks) if key in self.caches else peaks

    def merge(self, other: "InputObserver") -> None:
        for parameter, inputs in other.inputs.items():
            refuse_not_finite(inputs.squares, parameter)
            n_matrices, n_columns = inputs.squares.shape
            into = self.inputs.setdefault(parameter, InputSums.empty(n_matrices, n_columns))
            into.add_batch(inputs, self.decay)
        for key, kept in other.rows.items():
            capacity = max(_LEAST_ROWS, KEPT_ROWS // key[2])
            self.rows.setdefault(key, KeptRows()).add(np.array(kept.rows), capacity)
        for place, peaks in other.caches.items():
            self._add_peaks(place, peaks)

    def _take_rows(self) -> Rows:
        """The rows that are kept; they are kept no longer."""
        taken: Rows = {}
        for (parameter, matrix, _), kept in sorted(self.rows.items()):
            taken.setdefault(parameter, {})[matrix] = np.array(kept.rows)
        self.rows.clear()
        return taken

    def to_arrays(self) -> dict[str, np.ndarray]:
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
        self.caches = {
            (kind, int(layer)): peaks for kind in _CACHED for layer, peaks in caches[f"cached {kind}"].items()
        }


def _sums(rows: torch.Tensor) -> InputSums:
    """The statistics of one matrix's inputs, rows: float32 [n, n_columns]. Counts of a bin are integers, so no order of
    adding matters."""
    sums = InputSums.empty(1, rows.shape[1])
    if len(rows):
        minima, maxima = rows.amin(dim=0), rows.amax(dim=0)  # several times as fast as aminmax
        peaks = torch.maximum(-rows.amin(dim=1), rows.amax(dim=1))
        sums.minima[0], sums.maxima[0] = minima.cpu().numpy(), maxima.cpu().numpy()
        sums.squares[0] = rows.square().sum(0).cpu().numpy()
        sums.counts[0] = len(rows)
        sums.totals[0] = float(rows.sum())
        sums.values[0] = _counts(rows.reshape(-1))
        sums.peaks[0] = _counts(peaks)[N_MAGNITUDES:]
    return sums


def _counts(values: torch.Tensor) -> np.ndarray:
    """Values by the bins of statistics/histogram.py: int64 [N_BINS]."""
    codes = values.contiguous().view(torch.int32) >> FLOAT32_SHIFT
    return by_bins(torch.bincount(codes.bitwise_and_(N_CODES - 1), minlength=N_CODES).cpu().numpy())


def _some_rows(rows: torch.Tensor) -> np.ndarray:
    """At most _ROWS_OF_A_BATCH of them: the one with the largest value, which few tokens have and much depends on, and
    others drawn by what they hold: the same whenever they come, and from all places."""
    if len(rows) > _ROWS_OF_A_BATCH:
        seed, largest = zlib.crc32(rows[-1].cpu().numpy().tobytes()), int(rows.abs().amax(dim=1).argmax())
        drawn = np.random.default_rng(seed).choice(len(rows), _ROWS_OF_A_BATCH, replace=False)
        chosen = np.unique([largest, *drawn[drawn != largest][: _ROWS_OF_A_BATCH - 1]])
        rows = rows[torch.from_numpy(chosen).to(rows.device)]
    return rows.cpu().numpy().copy()
