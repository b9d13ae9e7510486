"""What goes into the matrices of a model, and into its caches: how large activations are, by channel, by token and over
all."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from bitwright.calibration.statistics.histogram import magnitudes, mean_square, quantile
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import make_directory
from bitwright.formats.files.seals import SEALS, is_sealed, is_sound, sealed
from bitwright.formats.files.whole import whole_file

DECAY = 0.9
"""The share of the past in the smoothed ranges, in every micro-batch's step."""


@dataclass(frozen=True, eq=False)
class MatrixInputs:
    """Statistics of the inputs of a tensor's matrices; an expert that no token reached has zeros.

    minima, maxima: float32 [n_matrices, n_columns]. squares: float64 [n_matrices, n_columns], sums over `counts` int64
    [n_matrices] rows. totals: float64 [n_matrices], sums of all values. values: int64 [n_matrices, N_BINS] and peaks:
    int64 [n_matrices, N_MAGNITUDES + 1], histograms of all values and of the rows' largest magnitudes, see
    histogram.py. ranges: float64 [n_matrices, 2], least and largest value of a micro-batch, exponentially
    smoothed over the micro-batches.
    """

    minima: np.ndarray
    maxima: np.ndarray
    squares: np.ndarray
    counts: np.ndarray
    totals: np.ndarray
    values: np.ndarray
    peaks: np.ndarray
    ranges: np.ndarray

    def absmax(self) -> np.ndarray:
        """The largest magnitude of every channel: float32 [n_matrices, n_columns]."""
        largest: np.ndarray = np.maximum(-self.minima, self.maxima)
        return largest

    def together(self) -> "MatrixInputs":
        """All matrices as one."""
        weights = self.counts[:, None] / max(1, self.counts.sum())
        return MatrixInputs(
            minima=self.minima.min(axis=0, keepdims=True),
            maxima=self.maxima.max(axis=0, keepdims=True),
            squares=self.squares.sum(axis=0, keepdims=True),
            counts=self.counts.sum(keepdims=True),
            totals=self.totals.sum(keepdims=True),
            values=self.values.sum(axis=0, keepdims=True),
            peaks=self.peaks.sum(axis=0, keepdims=True),
            ranges=(self.ranges * weights).sum(axis=0, keepdims=True),
        )

    def figures(self) -> "InputFigures":
        """In a few numbers, over all matrices."""
        one = self.together()
        n_values = int(one.counts[0]) * one.squares.shape[1]
        channel_peaks, sizes = one.absmax()[0].astype(np.float64), magnitudes(one.values[0])
        if not n_values or not channel_peaks.any():
            return InputFigures(int(one.counts[0]), *(0.0,) * 9)
        mean, channel_rms = float(one.totals[0]) / n_values, np.sqrt(one.squares[0] / one.counts[0])
        live = channel_peaks > 0
        typical = float(np.median(channel_rms[live])) or float(channel_rms.max())
        variance = float(one.squares[0].sum()) / n_values - mean**2
        return InputFigures(
            rows=int(one.counts[0]),
            absmax=float(channel_peaks.max()),
            mean=mean,
            std=float(np.sqrt(max(0.0, variance))),
            percentile_99=quantile(sizes, 0.99),
            percentile_99_9=quantile(sizes, 0.999),
            outlier_ratio=float(channel_peaks.max() / np.median(channel_peaks[live])),
            typical=typical,
            token_range=float(np.log2(np.sqrt(mean_square(one.peaks[0])) / typical)),
            dynamic_range=float(np.log2(channel_peaks.max() / typical)),
        )


@dataclass(frozen=True)
class InputFigures:
    """absmax, mean, std: of all values. percentile_99, percentile_99_9: of their magnitudes, at most 3.2 % off.
    outlier_ratio: the largest channel's absmax over the median channel's. typical: the root mean square of the median
    channel. dynamic_range: effective, in bits: log2(absmax / typical), what an 8-bit grid over the whole tensor has to
    span before a typical channel sees a step; token_range: the same with the root mean square of the rows' own absmax,
    what a grid for each row has to span. Channels that are always zero count in none of them."""

    rows: int
    absmax: float
    mean: float
    std: float
    percentile_99: float
    percentile_99_9: float
    outlier_ratio: float
    typical: float
    token_range: float
    dynamic_range: float


@dataclass(frozen=True, eq=False)
class CachedPeaks:
    """The largest magnitudes of what a layer's cache would hold, by key-value head and channel: of keys as they are
    after norms and rotary embedding. Both float32 [n_heads, head_size]."""

    keys: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class ActivationStatistics:
    """inputs: GGUF tensor name -> statistics. model ... sequence_length: as of ImportanceMatrix. transform: which
    change of the model these are of, "" for none: a hash of the factors that it is smoothed with. decay: of the ranges.
    caches: by layer, of those whose attention has a cache.

    Raises ConvertError for arrays that contradict each other or are not finite.
    """

    inputs: Mapping[str, MatrixInputs]
    model: str | None
    revision: str | None
    corpus: str
    corpus_sha256: str
    samples: int
    sequence_length: int
    transform: str = ""
    decay: float = DECAY
    caches: Mapping[int, CachedPeaks] = field(default_factory=dict)
    where: str = field(default="activation statistics", repr=False)

    def __post_init__(self) -> None:
        for name, inputs in self.inputs.items():
            n_matrices, n_columns = inputs.squares.shape
            right = all(getattr(inputs, key).shape == (n_matrices, n_columns) for key in ("minima", "maxima"))
            right &= inputs.counts.shape == inputs.totals.shape == (n_matrices,)
            right &= inputs.ranges.shape == (n_matrices, 2)
            if not right:
                raise self._refused(name, "has statistics of shapes that do not agree")
            floats = (inputs.minima, inputs.maxima, inputs.squares, inputs.totals, inputs.ranges)
            if not all(np.isfinite(values).all() for values in floats):
                raise self._refused(name, "has statistics that are not finite")
            if any((values < 0).any() for values in (inputs.squares, inputs.counts, inputs.values, inputs.peaks)):
                raise self._refused(name, "has negative counts or squares")
            if (inputs.minima > inputs.maxima).any():
                raise self._refused(name, "has minima above the maxima")
        for layer, cached in self.caches.items():
            for peaks in (cached.keys, cached.values):
                if peaks.ndim != 2 or not np.isfinite(peaks).all() or (peaks < 0).any():
                    raise ConvertError(
                        f"the cache of layer {layer} has magnitudes that are negative or not finite",
                        self.where,
                        "compute the activation statistics again",
                    )

    def of(self, name: str) -> MatrixInputs:
        """Raises ConvertError for a tensor that was not seen."""
        if name not in self.inputs:
            raise ConvertError(
                "there are no activation statistics of this tensor",
                f"{self.where}, tensor {name}",
                "compute them again: bitwright imatrix --activations MODEL",
            )
        return self.inputs[name]

    def divided(self, factors: Mapping[str, np.ndarray], seen_again: "ActivationStatistics") -> "ActivationStatistics":
        """The statistics of the same model smoothed: by channel these ones, divided; histograms, ranges and means those
        of the smoothed model, which it was looked at once more for, maybe on fewer samples. Caches are those of the
        second look.

        factors: GGUF tensor -> [n_matrices, n_columns], what its inputs are divided by; absent for 1.
        """
        inputs = {}
        for name, again in seen_again.inputs.items():
            first = self.of(name)
            by = np.asarray(factors[name] if name in factors else np.ones_like(first.minima), np.float64)
            share = first.counts / np.maximum(again.counts, 1)
            inputs[name] = replace(
                again,
                minima=(first.minima / by).astype(np.float32),
                maxima=(first.maxima / by).astype(np.float32),
                squares=first.squares / np.square(by),
                counts=first.counts,
                totals=again.totals * share,
            )
        return replace(
            seen_again, inputs=inputs, samples=self.samples, sequence_length=self.sequence_length, where=self.where
        )

    def importance(self) -> ImportanceMatrix:
        """What the encoders want of them."""
        return ImportanceMatrix(
            sums={name: inputs.squares for name, inputs in self.inputs.items()},
            counts={name: inputs.counts for name, inputs in self.inputs.items()},
            model=self.model,
            revision=self.revision,
            corpus=self.corpus,
            corpus_sha256=self.corpus_sha256,
            samples=self.samples,
            sequence_length=self.sequence_length,
            where=self.where,
        )

    def notes(self) -> list[str]:
        """What a user should know: experts that no token reached."""
        return self.importance().notes()

    def _refused(self, name: str, problem: str) -> ConvertError:
        return ConvertError(f"the tensor {name!r} {problem}", self.where, "compute the activation statistics again")


class RowsLost(ConvertError):
    """Rows that were kept are gone or damaged; another pass over the text brings them back."""

    def __init__(self, path: Path):
        remedy = "start again with --fresh; of statistics that were given, merge the parts again"
        super().__init__("the sample of activations is not what was written", str(path), remedy)


class InputRows:
    """Some rows of the inputs of matrices, on the disk: DIRECTORY/TENSOR.npz, sealed, for each GGUF tensor that has
    any."""

    def __init__(self, directory: Path):
        self.directory = directory

    def has(self, tensor: str) -> bool:
        """Raises RowsLost where nothing is left that could tell."""
        if not (self.directory / SEALS).exists():
            raise RowsLost(self.directory)
        return self._path(tensor).exists() or is_sealed(self._path(tensor))

    def read(self, tensor: str) -> dict[int, np.ndarray]:
        """Matrix -> float32 [n, n_columns]. Raises RowsLost for a file that is missing or has changed."""
        if not is_sound(self._path(tensor)):
            raise RowsLost(self._path(tensor))
        with np.load(self._path(tensor), allow_pickle=False) as stored:
            return {int(key): stored[key] for key in stored.files}

    def write(self, tensor: str, rows: Mapping[int, np.ndarray]) -> None:
        make_directory(self.directory)
        with sealed(self._path(tensor)) as draft, whole_file(draft, "sample of activations") as file:
            np.savez(file, allow_pickle=False, **{str(matrix): values for matrix, values in rows.items()})

    def _path(self, tensor: str) -> Path:
        return self.directory / f"{tensor}.npz"
