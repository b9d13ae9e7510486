"""What goes into every matrix: extremes and squares by channel, and histograms of all values and of tokens' peaks; and
what goes into the caches of keys and values."""

import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from bitwright.calibration.passes.device_inputs import DeviceInputs, ProductInputs
from bitwright.calibration.passes.input_sums import EXACT, InputSums, smoothed
from bitwright.calibration.statistics.histogram import FLOAT32_SHIFT, N_CODES, N_MAGNITUDES, by_bins
from bitwright.calibration.stream.checkpointing import flat_arrays, load_flat_arrays
from bitwright.calibration.stream.device.totals import Maxima, Totals
from bitwright.calibration.stream.device.transfer import to_host
from bitwright.calibration.stream.micro_batches import N_GROUPS, Excerpt
from bitwright.calibration.stream.observer import GroupedSums, Sums, refuse_not_finite

# Rows that are kept of a parameter's inputs, over all its matrices, as many of every group of the text and one of a
# matrix at least; and at most of one micro-batch, so that those of one text do not crowd out the others.
KEPT_ROWS = 256
_ROWS_OF_A_BATCH = 16

CACHED = ("keys", "values")
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
    """An Observer of inputs. decay: of the smoothed ranges, of the past in a step.

    write_rows: given some rows of a layer's inputs at the end of the layer, where they are wanted; where several
    matrices are shown the same tensor, those of the first one. excerpt, apart: as of GroupedSums, whose sums of squares
    and of values by group are in `grouped`.
    Of finished layers: sums: parameter -> InputSums. ranges: parameter -> as of `smoothed`; or, where groups are kept
    apart, ends: parameter -> what these are made of. caches: ("keys" or "values", layer) -> largest magnitudes of what
    a cache would hold, float32 [n_heads, head_size].
    Within a micro-batch sums are taken in float32 by torch's cascade summation, beyond it as Totals do.
    """

    one_group_at_once = True  # ranges are smoothed, and rows are kept, from micro-batch to micro-batch

    def __init__(
        self,
        decay: float,
        write_rows: Callable[[Rows], None] | None = None,
        first: int = 0,
        *,
        excerpt: Excerpt | None = None,
        apart: bool = False,
    ) -> None:
        self.decay, self.write_rows, self.first = decay, write_rows, first
        self.grouped = GroupedSums({"squares": {}, "totals": {}}, excerpt, _refuse, apart)
        self.sums: dict[str, InputSums] = {}
        self.ranges: dict[str, np.ndarray] = {}
        self.ends: dict[str, np.ndarray] = {}
        self._totals = {"squares": Totals[str](), "totals": Totals[str]()}  # of a micro-batch
        self._rows: dict[tuple[int, str, int, int], KeptRows] = {}  # by the group of the text, too
        self._caches = Maxima[tuple[str, int]]()
        self._ends: dict[str, list[np.ndarray]] = {}
        self._there: dict[str, DeviceInputs] = {}
        self._latest: tuple[weakref.ref[torch.Tensor], Product | None] | None = None

    @property
    def caches(self) -> dict[tuple[str, int], np.ndarray]:
        return self._caches.host

    @property
    def inputs(self) -> dict[str, dict[str, np.ndarray]]:
        """The fields of MatrixInputs, parameter by parameter, where groups are added up; the ranges of what no row has
        reached are not numbers."""
        exact = {key: {name: getattr(sums, key) for name, sums in self.sums.items()} for key in EXACT}
        return exact | self.grouped.total | {"ranges": self.ranges}

    def fresh(self, first: int) -> "InputObserver":
        return InputObserver(self.decay, self.write_rows, first)

    def observe(
        self, parameter: str, matrix: int, n_matrices: int, inputs: torch.Tensor, outputs: torch.Tensor | None
    ) -> None:
        if self._latest is None or self._latest[0]() is not inputs:
            rows = inputs.reshape(-1, inputs.shape[-1]).float()
            self._latest = (weakref.ref(inputs), _seen(rows))
            if self.write_rows is not None and outputs is not None and len(rows):
                kept = self._rows.setdefault((0, parameter, matrix, n_matrices), KeptRows())
                kept.add(_some_rows(rows, f"{parameter} {matrix} {self.first}"), _ROWS_OF_A_BATCH)
        n_columns, seen = inputs.shape[-1], self._latest[1]
        if inputs.device.type == "cpu":
            into = self._sums_of(parameter, n_matrices, n_columns)
            if seen is not None and isinstance(seen.exact, InputSums):
                into.add(seen.exact, slice(matrix, matrix + 1))
        else:
            if parameter not in self._there:
                self._there[parameter] = DeviceInputs(n_matrices, n_columns, inputs.device)
            if seen is not None and isinstance(seen.exact, ProductInputs):
                self._there[parameter].add(seen.exact, matrix)
        squares, total = (0.0, 0.0) if seen is None else (seen.squares, seen.total)
        self._totals["squares"].add(parameter, (n_matrices, n_columns), matrix, squares)
        self._totals["totals"].add(parameter, (n_matrices,), matrix, total)

    def observe_cache(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        for kind, states in (("keys", keys), ("values", values)):
            peaks = states.detach().abs().amax(dim=(0, 2)).float()
            self._caches.add((kind, layer), tuple(peaks.shape), ..., peaks)

    def move_to(self, device: torch.device) -> None:
        for totals in self._totals.values():
            totals.move_to(device)
        for there in self._there.values():
            there.move_to(device)
        for kept in self._rows.values():
            kept.rows = list(torch.stack(kept.rows).to(device)) if kept.rows else []
        self._caches.move_to(device)

    def merge(self, other: "InputObserver") -> None:
        self.grouped.add(other.first, other._totals)
        for parameter, sums in other.sums.items():
            self._sums_of(parameter, *sums.minima.shape).add(sums)
            self._ends.setdefault(parameter, []).append(sums.ends())
        for parameter, there in other._there.items():
            if parameter not in self._there:
                self._there[parameter] = there.empty_like()
            self._there[parameter].add_batch(there)
        group = self.grouped.group_of(other.first)
        for (_, parameter, matrix, n_matrices), kept in other._rows.items():
            capacity = max(1, KEPT_ROWS // N_GROUPS // n_matrices)
            self._rows.setdefault((group, parameter, matrix, n_matrices), KeptRows()).add(kept.rows, capacity)
        self._caches.merge(other._caches)

    def _sums_of(self, parameter: str, n_matrices: int, n_columns: int) -> InputSums:
        if parameter not in self.sums:
            self.sums[parameter] = InputSums.empty(n_matrices, n_columns)
        return self.sums[parameter]

    def _take_rows(self) -> Rows:
        """The rows that are kept, group by group; they are kept no longer."""
        taken: dict[str, dict[int, list[np.ndarray]]] = {}
        order = sorted(self._rows)
        arrays = to_host([torch.stack(self._rows[key].rows) for key in order])
        for (_, parameter, matrix, _), rows in zip(order, arrays, strict=True):
            taken.setdefault(parameter, {}).setdefault(matrix, []).append(rows)
        self._rows.clear()
        return {name: {i: np.concatenate(of[i]) for i in sorted(of)} for name, of in sorted(taken.items())}

    def _settle(self) -> None:
        """Bring over what a GPU has summed up of a layer, and take its micro-batches together."""
        arrays = iter(self.grouped.close([tensor for there in self._there.values() for tensor in there.tensors()]))
        for parameter, there in self._there.items():
            sums, ends = there.settled(arrays)
            self._sums_of(parameter, *there.minima.shape).add(sums)
            self._ends.setdefault(parameter, []).extend(ends)
        self._there.clear()
        self._caches.settle()
        for parameter, of_batches in self._ends.items():
            stacked = np.stack(of_batches)
            if not self.grouped.apart:
                self.ranges[parameter] = smoothed(stacked, self.decay, self.ranges.get(parameter))
            elif parameter in self.ends:
                self.ends[parameter] = np.concatenate([self.ends[parameter], stacked])
            else:
                self.ends[parameter] = stacked
        self._ends.clear()

    def to_arrays(self) -> dict[str, np.ndarray]:
        self._settle()
        if self.write_rows is not None:
            self.write_rows(self._take_rows())
        kinds = {key: {name: getattr(sums, key) for name, sums in self.sums.items()} for key in EXACT}
        caches = {
            f"cached {cached}": {str(layer): peaks for (kind, layer), peaks in self.caches.items() if kind == cached}
            for cached in CACHED
        }
        return self.grouped.to_arrays() | flat_arrays(kinds | {"ranges": self.ranges, "ends": self.ends} | caches)

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        kinds: dict[str, dict[str, np.ndarray]] = {key: {} for key in (*EXACT, "ranges", "ends")}
        kinds |= {f"cached {kind}": {} for kind in CACHED}
        own = {name: array for name, array in arrays.items() if name.partition("/")[0] in kinds}
        load_flat_arrays(own, kinds)
        self.grouped.load_arrays({name: array for name, array in arrays.items() if name not in own})
        self.sums = {name: InputSums(**{key: kinds[key][name] for key in EXACT}) for name in kinds["counts"]}
        self.ranges, self.ends = kinds["ranges"], kinds["ends"]
        self._caches.host = {
            (kind, int(layer)): peaks for kind in CACHED for layer, peaks in kinds[f"cached {kind}"].items()
        }


class Product(NamedTuple):
    """The inputs of one product, where these are. exact: their statistics without order. squares: sum by column,
    float32 [n_columns]; total: of all values."""

    exact: InputSums | ProductInputs
    squares: torch.Tensor
    total: torch.Tensor | float


def _refuse(sums: Sums) -> None:
    for parameter, squares in sums["squares"].items():
        refuse_not_finite(squares, parameter)


def _seen(rows: torch.Tensor) -> Product | None:
    """The statistics of one matrix's inputs; None without any. rows: float32 [n, n_columns]. Counts of a bin are
    integers, so no order of adding matters."""
    if not len(rows):
        return None
    squares = rows.square().sum(0)
    if rows.device.type != "cpu":
        return Product(ProductInputs(rows), squares, rows.sum())
    minima, maxima = rows.amin(dim=0), rows.amax(dim=0)  # several times as fast as aminmax
    peaks = torch.maximum(-rows.amin(dim=1), rows.amax(dim=1))
    exact = InputSums.empty(1, rows.shape[1])
    exact.minima[0], exact.maxima[0] = minima.numpy(), maxima.numpy()
    exact.counts[0] = len(rows)
    exact.values[0] = _counts(rows.reshape(-1))
    exact.peaks[0] = _counts(peaks)[N_MAGNITUDES:]
    return Product(exact, squares, float(rows.sum()))


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
