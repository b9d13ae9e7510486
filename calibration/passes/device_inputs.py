"""Statistics of a parameter's inputs on a GPU, until its layer is done and they come over in one piece."""

from collections.abc import Iterator

import numpy as np
import torch

from bitwright.calibration.passes.input_sums import InputSums
from bitwright.calibration.statistics.histogram import FLOAT32_SHIFT, N_CODES, N_MAGNITUDES, by_bins


class ProductInputs:
    """Statistics of the rows that one matrix is multiplied with, float32 [n, n_columns], n > 0."""

    def __init__(self, rows: torch.Tensor):
        self.count, self.device = len(rows), rows.device
        self.minima, self.maxima = rows.amin(dim=0), rows.amax(dim=0)
        peaks = torch.maximum(-rows.amin(dim=1), rows.amax(dim=1))
        self.values, self.peaks = _code_counts(rows.reshape(-1)), _code_counts(peaks)


class DeviceInputs:
    """As InputSums. The histograms are by code: int64 [n_matrices, N_CODES]. batches: what smoothed ranges are made of,
    of every micro-batch the smallest and the largest input [n_matrices]."""

    def __init__(self, n_matrices: int, n_columns: int, device: torch.device):
        self.minima = torch.full((n_matrices, n_columns), torch.inf, device=device)
        self.maxima = torch.full((n_matrices, n_columns), -torch.inf, device=device)
        self.values = torch.zeros((n_matrices, N_CODES), dtype=torch.int64, device=device)
        self.peaks = torch.zeros_like(self.values)
        self.counts = np.zeros(n_matrices, np.int64)
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def empty_like(self) -> "DeviceInputs":
        n_matrices, n_columns = self.minima.shape
        return DeviceInputs(n_matrices, n_columns, self.minima.device)

    def add(self, product: ProductInputs, matrix: int) -> None:
        self.minima[matrix] = torch.minimum(self.minima[matrix], product.minima)
        self.maxima[matrix] = torch.maximum(self.maxima[matrix], product.maxima)
        self.values[matrix] += product.values
        self.peaks[matrix] += product.peaks
        self.counts[matrix] += product.count

    def move_to(self, device: torch.device) -> None:
        """Those of one micro-batch."""
        self.minima, self.maxima = self.minima.to(device), self.maxima.to(device)
        self.values, self.peaks = self.values.to(device), self.peaks.to(device)

    def add_batch(self, other: "DeviceInputs") -> None:
        """Another micro-batch, the next in order, which is not used again."""
        self.batches.append((other.minima.amin(dim=1), other.maxima.amax(dim=1)))
        self.minima = torch.minimum(self.minima, other.minima)
        self.maxima = torch.maximum(self.maxima, other.maxima)
        self.values += other.values
        self.peaks += other.peaks
        self.counts += other.counts

    def tensors(self) -> list[torch.Tensor]:
        """All that `settled` is given, on the host."""
        ends = [torch.stack(of) for of in zip(*self.batches, strict=True)]
        return [self.minima, self.maxima, self.values, self.peaks, *ends]

    def settled(self, arrays: Iterator[np.ndarray]) -> tuple[InputSums, np.ndarray]:
        """The statistics, and for smoothed ranges the ends of every micro-batch, float32 [n_batches, n_matrices, 2]."""
        minima, maxima, values, peaks, least, largest = (next(arrays) for _ in range(6))
        sums = InputSums(
            minima=minima,
            maxima=maxima,
            counts=self.counts,
            values=np.stack([by_bins(codes) for codes in values]),
            peaks=np.stack([by_bins(codes)[N_MAGNITUDES:] for codes in peaks]),
        )
        return sums, np.stack([least, largest], axis=2)


def _code_counts(values: torch.Tensor) -> torch.Tensor:
    """How often each code occurs among float32 values [n], int64 [N_CODES]. Integers add up in any order.
    torch.bincount would have the host wait for the largest."""
    codes = (values.contiguous().view(torch.int32) >> FLOAT32_SHIFT) & (N_CODES - 1)
    counts = torch.zeros(N_CODES, dtype=torch.int32, device=values.device)
    return counts.index_add_(0, codes, torch.ones_like(codes)).long()
