"""Row and column sums of the squared gradient of every matrix, taken while the layer stream runs backwards."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from calibration.gradient_sums import KINDS
from calibration.weights import HEAD
from formats.errors import ConvertError


class SquaredGradients:
    """An observer of a GradientStream.

    n_blocks: how many blocks of as many rows each matrix of a parameter is made of, by the parameter's name and its
    number of matrices. Columns are kept apart by block, because a gate and an up projection that the model keeps in one
    parameter are two tensors of the checkpoint.

    A matrix is multiplied with all tokens of a sequence, so the gradient that is squared is that of a whole sequence.
    The head is the exception: each of its positions has a label of its own, and the products of two positions' have
    no mean, so positions are squared one by one, which is the same in the mean and nearer to it.
    """

    def __init__(self, n_blocks: Callable[[str, int], int]):
        self.n_blocks = n_blocks
        self.sums: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in KINDS}

    def fresh(self) -> "SquaredGradients":
        return SquaredGradients(self.n_blocks)

    def observe(
        self, parameter: str, matrix: int, n_matrices: int, inputs: torch.Tensor, outputs: torch.Tensor | None
    ) -> None:
        assert outputs is not None
        outputs.register_hook(partial(self._product, parameter, matrix, n_matrices, inputs.detach()))

    def _product(
        self, parameter: str, matrix: int, n_matrices: int, inputs: torch.Tensor, gradients: torch.Tensor
    ) -> None:
        """inputs: [n_tokens, n_columns] of one sequence, or [n_samples, n_tokens, n_columns]; gradients: by the
        outputs, alike."""
        n_columns, n_rows = inputs.shape[-1], gradients.shape[-1]
        n_blocks = self.n_blocks(parameter, n_matrices)
        self._add("count", parameter, (n_matrices, 1), matrix, inputs.numel() // n_columns)
        flat = inputs.reshape(-1, n_columns).float()
        self._add("inputs", parameter, (n_columns,), ..., flat.sum(0))
        self._add("squared_inputs", parameter, (n_columns,), ..., flat.square().sum(0))
        square = _squared_positions if parameter == HEAD else _squared_sequence
        sequences = (values.reshape(-1, *values.shape[-2:]) for values in (inputs, gradients))
        for x, g in zip(*sequences, strict=True):
            for block, part in enumerate(g.chunk(n_blocks, dim=-1)):
                rows, columns = square(x, part)
                span = slice(block * len(rows), (block + 1) * len(rows))
                self._add("rows", parameter, (n_matrices, n_rows), (matrix, span), rows)
                shape = (n_matrices * n_blocks, n_columns)
                self._add("columns", parameter, shape, matrix * n_blocks + block, columns)

    def observe_lookup(self, parameter: str, n_rows: int, tokens: torch.Tensor, gradients: torch.Tensor) -> None:
        """The embedding; the gradient of a row is the sum over its places in a sequence."""
        width = gradients.shape[-1]
        for sequence, by_place in zip(tokens, gradients, strict=True):
            found, places, times = sequence.unique(return_inverse=True, return_counts=True)
            squares = (
                torch.zeros(len(found), width, device=found.device).index_add_(0, places, by_place.float()).square()
            )
            rows = found.cpu().numpy()
            self._add("rows", parameter, (1, n_rows), (0, rows), squares.sum(1))
            self._add("columns", parameter, (1, width), 0, squares.sum(0))
            self._add("count", parameter, (1, n_rows), (0, rows), times)

    def _add(self, kind: str, parameter: str, shape: tuple[int, ...], place: Any, values: torch.Tensor | int) -> None:
        if parameter not in self.sums[kind]:
            self.sums[kind][parameter] = np.zeros(shape)
        self.sums[kind][parameter][place] += values.cpu().numpy() if isinstance(values, torch.Tensor) else values

    def merge(self, other: "SquaredGradients") -> None:
        for parameter, columns in other.sums["columns"].items():
            if not np.isfinite(columns).all():
                raise ConvertError(
                    "the gradients are not finite",
                    parameter,
                    "check the weights; on a GPU try --device cpu, which computes in float32",
                )
        for kind, sums in self.sums.items():
            for parameter, values in other.sums[kind].items():
                if parameter in sums:
                    sums[parameter] += values
                else:
                    sums[parameter] = values

    def to_arrays(self) -> dict[str, np.ndarray]:
        return {f"{kind}/{parameter}": values for kind, sums in self.sums.items() for parameter, values in sums.items()}

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        for key, values in arrays.items():
            kind, _, parameter = key.partition("/")
            self.sums[kind][parameter] = values


def _squared_sequence(inputs: torch.Tensor, gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column sums of (sum_t g_ti x_tj)^2; the whole of it exists here only."""
    squares = (gradients.T @ inputs).float().square_()
    return squares.sum(1), squares.sum(0)


def _squared_positions(inputs: torch.Tensor, gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column sums of sum_t g_ti^2 x_tj^2, which never exists."""
    x, g = inputs.float().square(), gradients.float().square()
    return x.sum(1) @ g, g.sum(1) @ x
