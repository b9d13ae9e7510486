"""Row and column sums of the squared gradient of every matrix, taken while the layer stream runs backwards."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from bitwright.calibration.sensitivity.gradient_sums import KINDS
from bitwright.calibration.stream.device.totals import Totals
from bitwright.calibration.stream.micro_batches import Excerpt
from bitwright.calibration.stream.observer import GroupedSums, Sums
from bitwright.calibration.stream.weights import HEAD
from bitwright.formats.errors import ConvertError


class SquaredGradients:
    """An observer of a GradientStream.

    n_blocks: how many blocks of as many rows each matrix of a parameter is made of, by the parameter's name and its
    number of matrices. excerpt, apart: as of GroupedSums. Columns are kept apart by block, because a gate and an up
    projection that the model keeps in one parameter are two tensors of the checkpoint.

    A matrix is multiplied with all tokens of a sequence, so the gradient that is squared is that of a whole sequence;
    on a GPU, where experts see the tokens of several sequences together, of those. The head is the exception: each of
    its positions has a label of its own, and the products of two positions' gradients have no mean, so positions are
    squared one by one, which is the same in the mean and nearer to it.
    """

    def __init__(self, n_blocks: Callable[[str, int], int], excerpt: Excerpt | None = None, apart: bool = False):
        self.n_blocks = n_blocks
        self.grouped = GroupedSums({kind: {} for kind in KINDS}, excerpt, _refuse_not_finite, apart)
        self.first = 0
        self._totals = {kind: Totals[str]() for kind in KINDS}

    @property
    def sums(self) -> dict[str, dict[str, np.ndarray]]:
        """Kind -> parameter -> sums, of finished layers."""
        return self.grouped.total

    def fresh(self, first: int) -> "SquaredGradients":
        observer = SquaredGradients(self.n_blocks)
        observer.first = first
        return observer

    def observe(
        self, parameter: str, matrix: int, n_matrices: int, inputs: torch.Tensor, outputs: torch.Tensor | None
    ) -> None:
        if outputs is None or not outputs.requires_grad:  # not computed, or only to choose among positions
            return
        hook = partial(self._product, parameter, matrix, n_matrices, inputs.detach())
        outputs.register_hook(hook)  # type: ignore[no-untyped-call]

    def _product(
        self, parameter: str, matrix: int, n_matrices: int, inputs: torch.Tensor, gradients: torch.Tensor
    ) -> None:
        """inputs: [n_samples, n_tokens, n_columns], or the tokens of one group [n_tokens, n_columns]; gradients: by the
        outputs, alike."""
        n_columns, n_rows = inputs.shape[-1], gradients.shape[-1]
        n_blocks = self.n_blocks(parameter, n_matrices)
        flat = inputs.reshape(-1, n_columns).float()
        self._add("count", parameter, (n_matrices, 1), matrix, len(flat))
        self._add("inputs", parameter, (n_columns,), ..., flat.sum(0))
        self._add("squared_inputs", parameter, (n_columns,), ..., flat.square().sum(0))
        sums = _sums_of_positions if parameter == HEAD else partial(_sums_of_group, n_blocks=n_blocks)
        groups = (values.reshape(-1, *values.shape[-2:]) for values in (inputs, gradients))
        rows, columns = zip(*(sums(x, g) for x, g in zip(*groups, strict=True)), strict=True)
        self._add("rows", parameter, (n_matrices, n_rows), matrix, torch.stack(rows).sum(0))
        place = slice(matrix * n_blocks, (matrix + 1) * n_blocks)
        self._add("columns", parameter, (n_matrices * n_blocks, n_columns), place, torch.stack(columns).sum(0))

    def observe_lookup(self, parameter: str, n_rows: int, tokens: torch.Tensor, gradients: torch.Tensor) -> None:
        """The embedding; the gradient of a row is the sum over its places in a sequence. It is taken on the CPU: CUDA
        would add in another order every time."""
        width = gradients.shape[-1]
        for sequence, by_place in zip(tokens.cpu(), gradients.float().cpu(), strict=True):
            found, places, times = sequence.unique(return_inverse=True, return_counts=True)
            squares = torch.zeros(len(found), width).index_add_(0, places, by_place).square()
            rows = found.numpy()
            self._add("rows", parameter, (1, n_rows), (0, rows), squares.sum(1))
            self._add("columns", parameter, (1, width), 0, squares.sum(0))
            self._add("count", parameter, (1, n_rows), (0, rows), times)

    def _add(self, kind: str, parameter: str, shape: tuple[int, ...], place: Any, values: torch.Tensor | int) -> None:
        self._totals[kind].add(parameter, shape, place, values)

    def move_to(self, device: torch.device) -> None:
        for totals in self._totals.values():
            totals.move_to(device)

    def merge(self, other: "SquaredGradients") -> None:
        self.grouped.add(other.first, other._totals)

    def to_arrays(self) -> dict[str, np.ndarray]:
        return self.grouped.to_arrays()

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.grouped.load_arrays(arrays)


def _refuse_not_finite(sums: Sums) -> None:
    for parameter, of_parameter in sums["columns"].items():
        if not np.isfinite(of_parameter).all():
            raise ConvertError(
                "the gradients are not finite",
                parameter,
                "check the weights; on a GPU try --device cpu, which computes in float32",
            )


def _sums_of_group(inputs: torch.Tensor, gradients: torch.Tensor, n_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the squared sum over tokens of g_ti x_tj, the whole of which exists here only: [n_rows] of its rows,
    [n_blocks, n_columns] of its columns."""
    squares = (gradients.T @ inputs).float().square_()
    return squares.sum(1), squares.view(n_blocks, -1, squares.shape[1]).sum(1)


def _sums_of_positions(inputs: torch.Tensor, gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of sum_t g_ti^2 x_tj^2, which never exists: [n_rows] of its rows, [1, n_columns] of its columns."""
    x, g = inputs.float().square(), gradients.float().square()
    return x.sum(1) @ g, (g.sum(1) @ x)[None]
