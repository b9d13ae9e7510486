"""What goes into every matrix: extremes and squares by channel, and histograms of all values and of tokens' peaks; and
what goes into the caches of keys and values."""

import weakref
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from calibration.histogram import FLOAT32_SHIFT, N_BINS, N_CODES, N_MAGNITUDES, by_bins
from formats.errors import ConvertError

# Rows that are kept of a parameter's inputs, over all its matrices, and of one matrix at least; and at most of one
# micro-batch, so that those of one text do not crowd out the others.
KEPT_ROWS, _LEAST_ROWS = 256, 16
_ROWS_OF_A_BATCH = 16


@dataclass
class InputSums:
    """Statistics of the inputs of one parameter's matrices, told apart as experts are.

    minima, maxima: float32 [n_matrices, n_columns]. squares: float64 [n_matrices, n_columns], sums. counts: int64
    [n_matrices], rows. totals: float64 [n_matrices], sums of all values. values: int64 [n_matrices, N_BINS]; peaks:
    int64 [n_matrices, N_MAGNITUDES + 1], of the largest magnitude of every row. ranges: float64 [n_matrices, 2], the
    smoothed least and largest value of a micro-batch.
    """

    minima: np.ndarray
    maxima: np.ndarray
    squares: np.ndarray
    counts: np.ndarray
    totals: np.ndarray
    values: np.ndarray
    peaks: np.ndarray
    ranges: np.ndarray

    @classmethod
    def empty(cls, n_matrices: int, n_columns: int) -> "InputSums":
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

    def add(self, other: "InputSums", matrices: slice = slice(None)) -> None:
        """Other rows of these matrices, all but their smoothed ranges."""
        for key, combine in (("minima", np.minimum), ("maxima", np.maximum)):
            into = getattr(self, key)[matrices]
            combine(into, getattr(other, key), out=into)
        for key in ("squares", "counts", "totals", "values", "peaks"):
            into = getattr(self, key)[matrices]
            into += getattr(other, key)

    def add_batch(self, other: "InputSums", decay: float) -> None:
        """Another micro-batch, the next in order."""
        self._smooth(other, decay)
        self.add(other)

    def _smooth(self, other: "InputSums", decay: float) -> None:
        seen, first = other.counts > 0, self.counts == 0
        batch = np.stack([other.minima.min(axis=1), other.maxima.max(axis=1)], axis=1)[seen].astype(np.float64)
        kept = np.where(first[seen, None], 0.0, decay)
        self.ranges[seen] = kept * self.ranges[seen] + (1 - kept) * batch


FIELDS = ("minima", "maxima", "squares", "counts", "totals", "values", "peaks", "ranges")


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

    keep_rows: keep some rows of the inputs of the layer that is running, for `take_rows`; where several matrices are
    shown the same tensor, for the first one. caches: ("keys" or "values", layer) -> largest magnitudes of what a cache
    would hold, float32 [n_heads, head_size].
    Within a micro-batch sums are taken in float32 by torch's cascade summation, beyond it in float64.
    """

    def __init__(self, decay: float = 0.9, keep_rows: bool = False) -> None:
        self.decay, self.keep_rows = decay, keep_rows
        self.inputs: dict[str, InputSums] = {}
        self.rows: dict[tuple[str, int, int], KeptRows] = {}
        self.caches: dict[tuple[str, int], np.ndarray] = {}
        self._latest: tuple[weakref.ref[torch.Tensor], InputSums] | None = None

    def fresh(self) -> "InputObserver":
        return InputObserver(self.decay, self.keep_rows)

    def observe(
        self, parameter: str, matrix: int, n_matrices: int, inputs: torch.Tensor, outputs: torch.Tensor | None
    ) -> None:
        if self._latest is None or self._latest[0]() is not inputs:
            rows = inputs.reshape(-1, inputs.shape[-1]).float()
            self._latest = (weakref.ref(inputs), _sums(rows))
            if self.keep_rows and outputs is not None:
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
            if not np.isfinite(inputs.squares).all():
                column = np.argwhere(~np.isfinite(inputs.squares))[0][-1]
                raise ConvertError(
                    "the model computes values that are not finite",
                    f"column {column} of the inputs of {parameter}",
                    "check the weights; on a GPU try --device cpu, which computes in float32",
                )
            n_matrices, n_columns = inputs.squares.shape
            into = self.inputs.setdefault(parameter, InputSums.empty(n_matrices, n_columns))
            into.add_batch(inputs, self.decay)
        for key, kept in other.rows.items():
            capacity = max(_LEAST_ROWS, KEPT_ROWS // key[2])
            self.rows.setdefault(key, KeptRows()).add(np.array(kept.rows), capacity)
        for place, peaks in other.caches.items():
            self._add_peaks(place, peaks)

    def take_rows(self) -> dict[str, dict[int, np.ndarray]]:
        """The rows that are kept, parameter -> matrix -> float32 [n, n_columns]; they are kept no longer."""
        taken: dict[str, dict[int, np.ndarray]] = {}
        for (parameter, matrix, _), kept in sorted(self.rows.items()):
            taken.setdefault(parameter, {})[matrix] = np.array(kept.rows)
        self.rows.clear()
        return taken

    def to_arrays(self) -> dict[str, np.ndarray]:
        arrays = {f"{key}/{name}": getattr(sums, key) for name, sums in self.inputs.items() for key in FIELDS}
        return arrays | {f"cached {kind}/{layer}": peaks for (kind, layer), peaks in self.caches.items()}

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        names = [key.partition("/")[2] for key in arrays if key.startswith("counts/")]
        self.inputs = {name: InputSums(**{key: arrays[f"{key}/{name}"] for key in FIELDS}) for name in names}
        self.caches = {}
        for key, peaks in arrays.items():
            kind, _, place = key.partition("/")
            if kind in ("cached keys", "cached values"):
                self.caches[kind.removeprefix("cached "), int(place)] = peaks


def _sums(rows: torch.Tensor) -> InputSums:
    """Of one matrix; rows: float32 [n, n_columns]. Counts of a bin are integers, so no order of adding matters."""
    found = InputSums.empty(1, rows.shape[1])
    if len(rows):
        minima, maxima = rows.amin(dim=0), rows.amax(dim=0)  # several times as fast as aminmax
        peaks = torch.maximum(-rows.amin(dim=1), rows.amax(dim=1))
        found.minima[0], found.maxima[0] = minima.cpu().numpy(), maxima.cpu().numpy()
        found.squares[0] = rows.square().sum(0).cpu().numpy()
        found.counts[0] = len(rows)
        found.totals[0] = float(rows.sum())
        found.values[0] = _counts(rows.reshape(-1))
        found.peaks[0] = _counts(peaks)[N_MAGNITUDES:]
    return found


def _counts(values: torch.Tensor) -> np.ndarray:
    """Values by the bins of calibration.histogram: int64 [N_BINS]."""
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
