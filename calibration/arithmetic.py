"""Computing a model's matrix products in another arithmetic than float32, without touching the model's code; and what a
cache makes of keys and values."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch.overrides import TorchFunctionMode

from calibration.observer import Owners


class Arithmetic(Protocol):
    """How products with an artifact's matrices are computed, and its caches kept."""

    def product(
        self, names: Sequence[str], inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The product of inputs [..., n_columns] with the transposed weight [n_rows, n_columns], plus bias; None for as
        torch does it. names: the stored tensors whose rows make up the weight, in order."""

    def cached(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What attention reads back of keys and values [n_samples, n_heads, n_positions, head_size] from the layer's
        cache: these themselves where it keeps them as they are."""


# Parameter, matrix in it, matrices in it -> the stored tensors that make up the matrix.
NamesOf = Callable[[str, int, int], Sequence[str]]


class _ReplacedProducts(TorchFunctionMode):
    def __init__(self, arithmetic: Arithmetic, owners: Owners, names_of: NamesOf):
        super().__init__()
        self.arithmetic, self.owners, self.names_of = arithmetic, owners, names_of

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            replaced = self._replaced(*args, **(kwargs or {}))
            if replaced is not None:
                return replaced
        return func(*args, **(kwargs or {}))

    def _replaced(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        owner = self.owners.get(weight.data_ptr())
        if owner is None:
            return None
        return self.arithmetic.product(self.names_of(*owner), input, weight, bias)


@contextmanager
def computed_by(arithmetic: Arithmetic, owners: Owners, names_of: NamesOf) -> Iterator[None]:
    """In this thread, products with these matrices are the arithmetic's."""
    with _ReplacedProducts(arithmetic, owners, names_of):
        yield
