"""Histograms of activations: signed, logarithmic, counted in integers, so that merging them is exact in any order.

The magnitudes from 2**-16 to 2**16 have 32 bins an octave, by the exponent of a float32 and the first 5 bits of its
mantissa: finding a value's bin is a shift of its bits. Smaller magnitudes count as zero, larger ones in the outermost
bin. A bin is at most 1/32 of its lower bound wide, so a quantile, interpolated within it, is at most 3.2 % off.

    bin   0 ... 1023                 1024    1025 ... 2048
          -2**16 < x <= -2**-16      zero    2**-16 <= x < 2**16
"""

import numpy as np

OCTAVES_EACH_WAY = 16
MANTISSA_BITS = 5
N_MAGNITUDES = 2 * OCTAVES_EACH_WAY << MANTISSA_BITS
N_BINS = 2 * N_MAGNITUDES + 1
FLOAT32_SHIFT = 23 - MANTISSA_BITS
N_CODES = 1 << (32 - FLOAT32_SHIFT)
"""A float32 is counted by its leading bits: sign, exponent and 5 bits of the mantissa."""
# What these bits are of 2**-16; float32 stores exponents with a bias of 127.
_FIRST_CODE = (127 - OCTAVES_EACH_WAY) << MANTISSA_BITS


def _bins() -> np.ndarray:
    """The bin of every code: int64 [N_CODES]."""
    codes = np.arange(N_CODES)
    places = np.clip((codes & (N_CODES // 2 - 1)) - (_FIRST_CODE - 1), 0, N_MAGNITUDES)
    bins: np.ndarray = N_MAGNITUDES + np.where(codes < N_CODES // 2, places, -places)
    return bins


_BINS = _bins()


def counted(values: np.ndarray) -> np.ndarray:
    """Counts of float32 values, by bins: int64 [N_BINS]."""
    return by_bins(np.bincount(values.reshape(-1).view(np.uint32) >> FLOAT32_SHIFT, minlength=N_CODES))


def by_bins(codes: np.ndarray) -> np.ndarray:
    """Counts of codes, int64 [N_CODES], by bins: int64 [N_BINS]. Sums of less than 2**53 are exact."""
    return np.bincount(_BINS, weights=codes, minlength=N_BINS).astype(np.int64)


def _edges() -> np.ndarray:
    """Bounds of the bins of magnitudes: float64 [N_MAGNITUDES + 1]."""
    steps = np.arange(N_MAGNITUDES + 1)
    octave, within = steps >> MANTISSA_BITS, steps & ((1 << MANTISSA_BITS) - 1)
    edges: np.ndarray = np.ldexp(1 + within / (1 << MANTISSA_BITS), octave - OCTAVES_EACH_WAY)
    return edges


EDGES = _edges()
_MIDDLES = (EDGES[1:] + EDGES[:-1]) / 2
CENTERS = np.concatenate([-_MIDDLES[::-1], [0.0], _MIDDLES])
"""The value that stands for each bin: float64 [N_BINS]."""
_LOWER = np.concatenate([-EDGES[:0:-1], [-EDGES[0]], EDGES[:-1]])
_UPPER = np.concatenate([-EDGES[-2::-1], [EDGES[0]], EDGES[1:]])


def magnitudes(counts: np.ndarray) -> np.ndarray:
    """The counts with signs forgotten, zero first: int64 [N_MAGNITUDES + 1]."""
    folded = counts[N_MAGNITUDES:].copy()
    folded[1:] += counts[N_MAGNITUDES - 1 :: -1]
    return folded


def quantile(counts: np.ndarray, share: float) -> float:
    """The value that this share of the counted ones does not exceed; 0 where nothing was counted.

    counts: of signed values [N_BINS], or of magnitudes [N_MAGNITUDES + 1].
    """
    lower, upper = _LOWER, _UPPER
    if len(counts) != N_BINS:
        lower, upper = np.concatenate([[0.0], EDGES[:-1]]), EDGES
    sums = np.cumsum(counts)
    if not sums[-1]:
        return 0.0
    wanted = share * sums[-1]
    i = min(int(np.searchsorted(sums, wanted)), len(counts) - 1)
    within = (wanted - (sums[i] - counts[i])) / counts[i] if counts[i] else 0.0
    return float(lower[i] + within * (upper[i] - lower[i]))


def mean_square(counts: np.ndarray) -> float:
    """The mean square of magnitudes that were counted in bins [N_MAGNITUDES + 1], each taken for the middle of its bin:
    at most 3.2 % off; 0 where none was counted."""
    total = counts.sum()
    return float(counts[1:] @ np.square(_MIDDLES) / total) if total else 0.0
