"""The error of every tensor of an artifact: what the stage `verify` measures, of either kind of artifact."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from bitwright.calibration.control import OnProgress
from bitwright.formats.errors import ConvertError

_SOURCE_BYTES = 4  # of a weight, as it is compared


@dataclass(frozen=True)
class TensorError:
    """A tensor's error: mean squared error over mean squared weight, and the same weighted by importance."""

    tensor: str
    format: str
    relative_error: float
    weighted_error: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Part(NamedTuple):
    """Some rows of a tensor. decoded, source: float32 [n_rows, n_columns]. importance: of the columns, float64
    [n_columns], None where nothing is known."""

    decoded: np.ndarray
    source: np.ndarray
    importance: np.ndarray | None = None


class DecodedTensor(NamedTuple):
    """A tensor as it can be read from the artifact. parts: all of its rows, read as they are asked for."""

    name: str
    format: str
    n_weights: int
    parts: Iterable[Part]


def measure_errors(
    tensors: Sequence[DecodedTensor], where: str, progress: OnProgress, threads: int = 1
) -> list[TensorError]:
    """The error of every tensor. where: the artifact's files, for people. threads: each takes whole tensors, so that no
    figure depends on their number.

    Raises ConvertError for a tensor that decodes to something that is not finite, or that is further from the source
    than zeros are.
    """
    errors = []
    done, total = 0, sum(tensor.n_weights for tensor in tensors) * _SOURCE_BYTES
    with ThreadPoolExecutor(threads) as pool:
        try:
            for tensor, error in zip(tensors, pool.map(partial(_error, where=where), tensors), strict=True):
                errors.append(error)
                done += tensor.n_weights * _SOURCE_BYTES
                progress("verify", done, total, "B")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return errors


def _error(tensor: DecodedTensor, where: str) -> TensorError:
    sums = np.zeros(4)  # squared error, squared weight, and both weighted
    for part in tensor.parts:
        if not np.isfinite(part.decoded).all():
            raise verification_failed(tensor.name, "decodes to values that are not finite", where)
        error, weight = (_column_squares(values) for values in (part.decoded - part.source, part.source))
        sums[:2] += error.sum(), weight.sum()
        if part.importance is None:
            sums[2:] += error.sum(), weight.sum()
        else:
            sums[2:] += error @ part.importance, weight @ part.importance
    relative, weighted = (sums[i] / sums[i + 1] if sums[i + 1] else float(sums[i] > 0) for i in (0, 2))
    if weighted > 1:
        what = f"is further from the source than zeros are (weighted error {weighted:.3g})"
        raise verification_failed(tensor.name, what, where)
    return TensorError(tensor.name, tensor.format, float(relative), float(weighted))


def _column_squares(values: np.ndarray) -> np.ndarray:
    """The sum of the squares of every column, float64 [n_columns]."""
    squares: np.ndarray = np.square(values, dtype=np.float64).reshape(-1, values.shape[-1]).sum(axis=0)
    return squares


def verification_failed(name: str, what: str, where: str) -> ConvertError:
    return ConvertError(
        f"verification failed: the tensor {name} {what}",
        where,
        "convert again with --fresh; if it fails again, report it with the model's name and this message",
    )
