"""Seeing every matrix product, by the identity of its weight, without touching the model's code."""

import weakref
from collections.abc import Mapping
from typing import Protocol, Self

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from formats.errors import ConvertError


class Observer(Protocol):
    """A statistic over matrix products. `fresh` makes an empty one, to which a worker thread shows the products of one
    micro-batch; these are merged in the order of the micro-batches, whatever the order in which they end."""

    def fresh(self) -> Self: ...

    def observe(
        self, parameter: str, matrix: int, n_matrices: int, inputs: torch.Tensor, outputs: torch.Tensor | None
    ) -> None:
        """inputs: [..., n_columns], multiplied with the transposed matrix of that index in the parameter; outputs:
        [..., n_rows], that product, or None where it is not computed."""

    def merge(self, other: Self) -> None: ...

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything collected so far, for a checkpoint."""

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Continue from a checkpoint."""


# Address of a matrix -> (parameter, index of the matrix in it, matrices in the parameter)
Owners = dict[int, tuple[str, int, int]]


def locate_matrices(parameters: Mapping[str, torch.Tensor]) -> Owners:
    """A slice of a 3-D parameter, which is how transformers calls an expert, is known by its address inside of it."""
    owners: Owners = {}
    for name, parameter in parameters.items():
        matrices = parameter if parameter.dim() == 3 else parameter.unsqueeze(0)
        owners |= {matrix.data_ptr(): (name, i, len(matrices)) for i, matrix in enumerate(matrices)}
    return owners


class ProductTap(TorchFunctionMode):
    """While active in a thread, shows the observer each product with one of these matrices."""

    def __init__(self, owners: Owners, observer: Observer):
        super().__init__()
        self.owners, self.observer = owners, observer

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear:
            self._show(result, *args, **(kwargs or {}))
        return result

    def _show(
        self, outputs: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        if owner := self.owners.get(weight.data_ptr()):
            self.observer.observe(*owner, input, outputs)


class NoStatistic:
    """Observes nothing: for a pass whose hidden states are all that is wanted."""

    def fresh(self) -> Self:
        return self

    def observe(
        self, parameter: str, matrix: int, n_matrices: int, inputs: torch.Tensor, outputs: torch.Tensor | None
    ) -> None:
        pass

    def merge(self, other: Self) -> None:
        pass

    def to_arrays(self) -> dict[str, np.ndarray]:
        return {}

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        pass


class SquaredInputs:
    """Per matrix the sum of squared inputs of every column, and the rows they were summed over.

    sums: parameter -> float64 [n_matrices, n_columns]; counts: parameter -> int64 [n_matrices]. Within a micro-batch
    the sum is taken in float32 by torch's cascade summation, beyond it in float64.
    """

    def __init__(self) -> None:
        self.sums: dict[str, np.ndarray] = {}
        self.counts: dict[str, np.ndarray] = {}
        self._latest: tuple[weakref.ref[torch.Tensor], np.ndarray] | None = None

    def fresh(self) -> "SquaredInputs":
        return SquaredInputs()

    def observe(
        self, parameter: str, matrix: int, n_matrices: int, inputs: torch.Tensor, outputs: torch.Tensor | None
    ) -> None:
        # Query, key and value are fed the same tensor, and so are gate and up: it is summed once. The reference is
        # weak, so that micro-batches that wait to be merged keep no activations alive.
        if self._latest is None or self._latest[0]() is not inputs:
            squares = inputs.reshape(-1, inputs.shape[-1]).float().square()
            self._latest = (weakref.ref(inputs), squares.sum(0).cpu().numpy().astype(np.float64))
        self._add(parameter, matrix, n_matrices, self._latest[1], inputs.numel() // inputs.shape[-1])

    def _add(self, parameter: str, matrix: int, n_matrices: int, squares: np.ndarray, n_rows: int) -> None:
        if parameter not in self.sums:
            self.sums[parameter] = np.zeros((n_matrices, squares.size))
            self.counts[parameter] = np.zeros(n_matrices, np.int64)
        self.sums[parameter][matrix] += squares
        self.counts[parameter][matrix] += n_rows

    def merge(self, other: "SquaredInputs") -> None:
        for parameter, sums in other.sums.items():
            if not np.isfinite(sums).all():
                column = np.argwhere(~np.isfinite(sums))[0][-1]
                raise ConvertError(
                    "the model computes values that are not finite",
                    f"column {column} of the inputs of {parameter}",
                    "check the weights; on a GPU try --device cpu, which computes in float32",
                )
            if parameter in self.sums:
                self.sums[parameter] += sums
                self.counts[parameter] += other.counts[parameter]
            else:
                self.sums[parameter], self.counts[parameter] = sums.copy(), other.counts[parameter].copy()

    def to_arrays(self) -> dict[str, np.ndarray]:
        sums = {f"sums/{parameter}": values for parameter, values in self.sums.items()}
        return sums | {f"counts/{parameter}": values for parameter, values in self.counts.items()}

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        for key, values in arrays.items():
            kind, _, parameter = key.partition("/")
            {"sums": self.sums, "counts": self.counts}[kind][parameter] = values
