"""SmoothQuant: by how much every channel of a matrix's input is divided, and its column multiplied.

s_j = max|X_j|**alpha / max|W_j|**(1 - alpha)            (Xiao et al. 2022, arXiv:2211.10438, eq. 4)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bitwright.calibration.choices import DEFAULT_ALPHA, Alpha
from bitwright.calibration.statistics.activation_ranges import best_part
from bitwright.calibration.statistics.histogram import counted
from bitwright.formats.errors import ConvertError

if TYPE_CHECKING:
    import torch

ALPHA_GRID = tuple(i / 20 for i in range(21))
"""What `auto` tries, beside leaving the inputs as they are."""

LARGEST_FACTOR = 2.0**13
"""Factors lie between its inverse and it, which leaves a float16 norm its precision."""

_LARGEST = 127.0
_LARGEST_STATIC = 127.5  # of what a stored scale is the range


@dataclass(frozen=True)
class SmoothQuantConfig:
    """alpha: how much of the inputs' range goes into the weights, from 0 (nothing) to 1 (everything); "auto" for the
    one of ALPHA_GRID that leaves each group the least error. Raises ConvertError for another alpha."""

    alpha: Alpha = DEFAULT_ALPHA

    def __post_init__(self) -> None:
        if self.alpha != "auto" and not 0 <= self.alpha <= 1:
            raise _no_alpha(self.alpha)


def parse_alpha(text: str) -> Alpha:
    """The alpha that a command line gives. Raises ConvertError for what is neither "auto" nor a number from 0 to 1."""
    if text == "auto":
        return "auto"
    try:
        alpha = float(text)
    except ValueError:
        raise _no_alpha(text) from None
    return SmoothQuantConfig(alpha).alpha


def _no_alpha(value: object) -> ConvertError:
    return ConvertError(
        f"alpha is {value!r}, and must be a number from 0 to 1, or auto",
        "--alpha",
        f"leave it out for {DEFAULT_ALPHA}, or let the calibration choose: --alpha auto",
    )


def smoothing_factors(inputs: np.ndarray, weights: np.ndarray, alpha: float) -> np.ndarray:
    """What each channel of the input is divided by: float32 [n_columns].

    inputs, weights: the largest magnitudes of every channel of the input and of every column. A channel or a column
    that is always zero has the factor 1: nothing is to be gained there.
    """
    live = (inputs > 0) & (weights > 0)
    factors = np.ones(len(inputs))
    factors[live] = inputs[live].astype(np.float64) ** alpha / weights[live].astype(np.float64) ** (1 - alpha)
    return factors.clip(1 / LARGEST_FACTOR, LARGEST_FACTOR).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Products:
    """Inputs and matrices that are multiplied with them. rows: float32 [n, n_columns]; weights: of each matrix some
    rows, float32 [n_rows, n_columns]. inputs, columns: float32 [n_columns], what the factors are computed from."""

    rows: np.ndarray
    weights: tuple[np.ndarray, ...]
    inputs: np.ndarray
    columns: np.ndarray


def output_error(products: Sequence[Products], alpha: float | None, static: bool = False, device: str = "cpu") -> float:
    """The mean, over all matrices, of the relative squared error of their outputs when inputs (by row) and weights (by
    row) are smoothed and rounded to INT8; alpha None: not smoothed. static: inputs have one stored scale. device: what
    computes it, and has float64.

    Every row of outputs counts relative to its own energy and the median row's together: neither a few rows of huge
    outputs nor many of tiny ones decide alone. Of a CPU computed on one core.
    """
    with _one_core():
        return _error_of([_Placed(group, device) for group in products], alpha, static)


def choose_alpha(
    products: Sequence[Products], static: bool = False, device: str = "cpu"
) -> tuple[float | None, dict[str, float]]:
    """The alpha with the least output_error, None for not smoothing at all; and the errors of all that was tried, by
    name. Of equally good ones (to six digits, so that no order of summing decides) the one nearest the default."""
    with _one_core():
        placed = [_Placed(group, device) for group in products]
        tried = {alpha: _error_of(placed, alpha, static) for alpha in (None, *ALPHA_GRID)}

    def rank(alpha: float | None) -> tuple[float, float]:
        return float(f"{tried[alpha]:.6g}"), 2.0 if alpha is None else abs(alpha - DEFAULT_ALPHA)

    return min(tried, key=rank), {"off" if alpha is None else f"{alpha:g}": e for alpha, e in tried.items()}


class _Placed:
    """Products on the device that measures them. matrices: of each the weights, the outputs float32 [n, n_rows], and
    what the squared error of each row of these is divided by, float64 [n]."""

    def __init__(self, products: Products, device: str):
        import torch

        self.products, self.rows = products, torch.from_numpy(products.rows).to(device)
        self.matrices = []
        for weights in (torch.from_numpy(of).to(device) for of in products.weights):
            wanted = self.rows @ weights.T
            energies = wanted.double().square().sum(1)
            self.matrices.append((weights, wanted, (energies + energies.median()).clamp_min(1e-300)))

    def errors(self, alpha: float | None, static: bool) -> Iterator[float]:
        """As output_error, of every matrix."""
        import torch

        inputs, columns = self.products.inputs, self.products.columns
        factors = np.ones(len(inputs), np.float32) if alpha is None else smoothing_factors(inputs, columns, alpha)
        scales, peak = torch.from_numpy(factors).to(self.rows.device), float((inputs / factors).max())
        smoothed = self.rows / scales
        rounded = rounded_as_one(smoothed, peak) if static else rounded_by_row(smoothed)
        for weights, wanted, scale_of_rows in self.matrices:
            missed = rounded @ rounded_by_row(weights * scales).T - wanted
            yield 2 * float((missed.double().square().sum(1) / scale_of_rows).mean())


def _error_of(placed: Sequence[_Placed], alpha: float | None, static: bool) -> float:
    return float(np.mean([error for of in placed for error in of.errors(alpha, static)]))


# Divisors are tensors: with a number CUDA multiplies by its inverse, which rounds otherwise.
def rounded_by_row(rows: "torch.Tensor") -> "torch.Tensor":
    """Every row rounded to 255 symmetric steps of its own, as INT8 stores it: float32 like rows."""
    scales = rows.abs().amax(dim=1, keepdim=True) / rows.new_full((), _LARGEST)
    scales = scales.masked_fill(scales == 0, 1)
    return (rows / scales).round() * scales


def rounded_as_one(rows: "torch.Tensor", peak: float) -> "torch.Tensor":
    """All rows rounded to INT8 under one scale, as static schemes do: float32 like rows. peak: the largest magnitude
    that was seen; the range is the part of it that suits these rows best."""
    if peak == 0:
        return rows
    scale = rows.new_full((), peak * best_part(counted(rows.cpu().numpy()), -peak, peak) / _LARGEST_STATIC)
    return (rows / scale).round().clamp(-128, 127) * scale


@contextmanager
def _one_core() -> Iterator[None]:
    """torch's products on a CPU do not depend on a number of threads meanwhile."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
