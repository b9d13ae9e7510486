"""How fast this machine is, measured in about a second: matrices of one layer, and a few rows in each format.

It stands in for rates of earlier runs. What goes on around the products and the rows takes longer than they do.
"""

import time
from collections.abc import Callable

import numpy as np

from bitwright.converter.boundary.machine import nvidia_gpu, usable_cores
from bitwright.converter.job.job import Job
from bitwright.formats.choices import Effort
from bitwright.formats.registry import FORMATS
from bitwright.formats.schemes.registry import SCHEMES
from bitwright.profiles.vocabulary import ModelMap

_TOKENS = 256
_MOST_WEIGHTS = 1 << 22  # of a matrix that products are timed with
_SHAPES = 8
_ENCODED_WEIGHTS = 1 << 15
_ENOUGH_SECONDS = 0.05


def measured_products(job: Job, model_map: ModelMap) -> float | None:
    """Products a second of this many threads with matrices of the model's first layer, float32; None where a GPU will
    do them."""
    import platform

    if job.device not in ("auto", "cpu") or (job.device == "auto" and (nvidia_gpu() or platform.system() == "Darwin")):
        return None
    shapes = {
        (tensor.n_rows // tensor.n_matrices, tensor.n_columns)
        for tensor in model_map.tensors
        if tensor.quantizable and tensor.layer == 0
    }
    n_products, seconds = 0, 0.0
    for n_rows, n_columns in sorted(shapes, reverse=True)[:_SHAPES]:
        weights = np.ones((min(n_rows, max(1, _MOST_WEIGHTS // n_columns)), n_columns), np.float32)
        tokens = np.ones((_TOKENS, n_columns), np.float32)
        tokens[:1] @ weights.T  # which may start threads
        seconds += _shortest(lambda tokens=tokens, weights=weights: tokens @ weights.T)  # type: ignore[misc]
        n_products += _TOKENS * weights.size
    share = min(1.0, job.n_threads / usable_cores())
    return share * n_products / seconds if seconds else None


def measured_encoding(name: str, n_columns: int, effort: Effort, threads: int) -> float | None:
    """Weights a second that so many threads encode in this format or scheme, in rows of so many; None for what is
    neither."""
    encode = _encoder(name, effort)
    if encode is None:
        return None
    importance = np.linspace(0.5, 2.0, n_columns, dtype=np.float32)
    n_rows = max(1, _ENCODED_WEIGHTS // n_columns)
    rows = np.random.default_rng(0).standard_normal((n_rows, n_columns), np.float32)
    encode(rows[:1], importance)  # which may compile it
    return threads * rows.size / _shortest(lambda: encode(rows, importance))


def _encoder(name: str, effort: Effort) -> Callable[[np.ndarray, np.ndarray], object] | None:
    if name in SCHEMES:
        return SCHEMES[name].encode
    if name in FORMATS:
        block_format = FORMATS[name]
        return lambda rows, importance: block_format.encode(rows, importance, effort)
    return None


def _shortest(work: Callable[[], object]) -> float:
    """Seconds that it takes at best, of as many tries as there is time for: others use the machine, too."""
    shortest, began = float("inf"), time.perf_counter()
    while shortest == float("inf") or time.perf_counter() - began < _ENOUGH_SECONDS:
        start = time.perf_counter()
        work()
        shortest = min(shortest, time.perf_counter() - start)
    return max(shortest, 1e-9)
