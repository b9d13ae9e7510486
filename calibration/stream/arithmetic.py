"""Computing a model's matrix products in another arithmetic than float32, without touching the model's code; and what a
cache makes of keys and values."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from bitwright.calibration.stream.observer import Owner, Owners, Product, ProductMode


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


class _ReplacedProducts(ProductMode):
    def __init__(self, arithmetic: Arithmetic, owners: Owners, names_of: NamesOf):
        super().__init__(owners)
        self.arithmetic, self.names_of = arithmetic, names_of

    def product(self, owner: Owner, product: Product, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        replaced = self.arithmetic.product(self.names_of(*owner), *product)
        return compute() if replaced is None else replaced


@contextmanager
def computed_by(arithmetic: Arithmetic, owners: Owners, names_of: NamesOf) -> Iterator[None]:
    """In this thread, products with these matrices are the arithmetic's."""
    with _ReplacedProducts(arithmetic, owners, names_of):
        yield
