"""Seeing every matrix product, by the identity of its weight, without touching the model's code."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from bitwright.calibration.stream.checkpointing import flat_arrays, load_flat_arrays
from bitwright.calibration.stream.device.totals import Totals
from bitwright.calibration.stream.device.transfer import to_host
from bitwright.calibration.stream.micro_batches import N_GROUPS, Excerpt
from bitwright.formats.errors import ConvertError


class Observer(Protocol):
    """A statistic over matrix products. `fresh` makes an empty one, to which a worker thread shows the products of one
    micro-batch; these are merged in the order of the micro-batches, whatever the order in which they end."""

    def fresh(self, first: int) -> Self:
        """first: the first sample of the micro-batch, by its number in the text."""

    def observe(
        self, parameter: str, matrix: int, n_matrices: int, inputs: torch.Tensor, outputs: torch.Tensor | None
    ) -> None:
        """inputs: [..., n_columns], multiplied with the transposed matrix of that index in the parameter; outputs:
        [..., n_rows], that product, or None where it is not computed."""

    def move_to(self, device: torch.device) -> None:
        """What has been seen on another GPU goes to this one, where it is merged."""

    def merge(self, other: Self) -> None: ...

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything collected so far, for a checkpoint. Called at the end of every layer: what the observer keeps
        beside the checkpoint is on the disk when it returns, so that no kill parts the two."""

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Continue from a checkpoint."""


# A parameter, the index of a matrix in it, and how many it has; by the address of the matrix.
Owner = tuple[str, int, int]
Owners = dict[int, Owner]


def locate_matrices(parameters: Mapping[str, torch.Tensor]) -> Owners:
    """A slice of a 3-D parameter, which is how transformers calls an expert, is known by its address inside of it."""
    owners: Owners = {}
    for name, parameter in parameters.items():
        matrices = parameter if parameter.dim() == 3 else parameter.unsqueeze(0)
        owners |= {matrix.data_ptr(): (name, i, len(matrices)) for i, matrix in enumerate(matrices)}
    return owners


class Product(NamedTuple):
    """A matrix product as models write it: inputs [..., n_columns], the matrix [n_rows, n_columns], a view of what is
    stored in either orientation, and the bias [n_rows] that is added."""

    inputs: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Product:
    return Product(input, weight, bias)


def _matmul(input: torch.Tensor, other: torch.Tensor) -> Product:
    return Product(input, other.mT if other.dim() > 1 else other)


def _mm(input: torch.Tensor, mat2: torch.Tensor) -> Product:
    return Product(input, mat2.mT)


def _addmm(input: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, **scales: float) -> Product:
    return Product(mat1, mat2.mT, input)


_EITHER_SIDE = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
_PRODUCTS: dict[Callable[..., Any], Callable[..., Product]] = {
    torch.nn.functional.linear: _linear,
    **dict.fromkeys(_EITHER_SIDE, _matmul),
    **dict.fromkeys((torch.mm, torch.Tensor.mm, torch.bmm, torch.Tensor.bmm), _mm),
    torch.addmm: _addmm,
}


class ProductMode(TorchFunctionMode):
    """While active in a thread, sees each product with one of these matrices.

    A product of all experts with one batch of rows each is taken apart: every expert's is a product of its own, over
    the rows that are not all zero, which is how models mark tokens that go to other experts.
    """

    def __init__(self, owners: Owners):
        super().__init__()
        self.owners = owners

    def product(self, owner: Owner, product: Product, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What stands for the product; compute: as torch does it. owner: the matrix."""
        raise NotImplementedError

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}

        def compute() -> Any:
            return func(*args, **kwargs)

        if func not in _PRODUCTS:
            return compute()
        product = _PRODUCTS[func](*args, **kwargs)
        owner = self.owners.get(product.weight.data_ptr())
        if owner is not None and product.weight.dim() == 2:
            return self.product(owner, product, compute)
        if owner is not None and product.weight.dim() == 3 and owner[1:] == (0, len(product.weight)):
            return self._by_expert(owner, product)
        if func in _EITHER_SIDE and product.inputs.dim() == 2 and product.weight.dim() > 1:
            owner = self.owners.get(product.inputs.data_ptr())
            if owner is not None:  # a matrix on the left, of inputs that are columns
                turned = Product(product.weight, product.inputs)
                return self.product(owner, turned, lambda: compute().mT).mT
        return compute()

    def _by_expert(self, owner: Owner, product: Product) -> torch.Tensor:
        name, _, n_matrices = owner
        outputs = []
        for i, (inputs, weight) in enumerate(zip(product.inputs, product.weight, strict=True)):
            rows = inputs.detach().any(-1).nonzero()[:, 0]
            of_expert = inputs.new_zeros(len(inputs), len(weight))
            if len(rows):
                taken = Product(inputs[rows], weight)
                computed = self.product((name, i, n_matrices), taken, partial(torch.mm, taken.inputs, weight.mT))
                of_expert = of_expert.index_copy(0, rows, computed)
            outputs.append(of_expert)
        return torch.stack(outputs)


class ProductNames(ProductMode):
    """While active in a thread, collects the names of the parameters of such products in `seen`."""

    def __init__(self, owners: Owners):
        super().__init__(owners)
        self.seen: set[str] = set()

    def product(self, owner: Owner, product: Product, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        self.seen.add(owner[0])
        return compute()


class ProductTap(ProductMode):
    """While active in a thread, shows the observer each product with one of these matrices."""

    def __init__(self, owners: Owners, observer: Observer):
        super().__init__(owners)
        self.observer = observer

    def product(self, owner: Owner, product: Product, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        outputs = compute()
        self.observer.observe(*owner, product.inputs, outputs)
        return outputs


Sums = Mapping[str, Mapping[str, np.ndarray]]
"""kind -> parameter -> an array that is added up."""


def refuse_not_finite(sums: np.ndarray, parameter: str) -> None:
    """Raises ConvertError where inputs of a parameter's matrices were not finite; sums: of these, [..., n_columns]."""
    if not np.isfinite(sums).all():
        column = np.argwhere(~np.isfinite(sums))[0][-1]
        raise ConvertError(
            "the model computes values that are not finite",
            f"column {column} of the inputs of {parameter}",
            "check the weights; on a GPU try --device cpu, which computes in float32",
        )


class GroupedSums:
    """Sums over an excerpt of a text, made of the sums over its groups: of a group first, then of the groups in order.

    total: kind -> parameter -> array, into which the sums of all finished groups go; excerpt: None for a single group.
    refuse: raises ConvertError for sums, by kind, that cannot be; asked of every group that is done.
    apart: the sums of every group are kept by themselves in `groups` instead, for a machine that has some of them.
    """

    def __init__(
        self,
        total: dict[str, dict[str, np.ndarray]],
        excerpt: Excerpt | None,
        refuse: Callable[[Sums], None],
        apart: bool = False,
    ):
        self.total, self.excerpt, self.refuse, self.apart = total, excerpt, refuse, apart
        self.groups: dict[int, dict[str, dict[str, np.ndarray]]] = {}
        self._open: list[tuple[int, dict[str, Totals[str]]]] = []

    def group_of(self, sample: int) -> int:
        return 0 if self.excerpt is None else self.excerpt.group_of(sample)

    @property
    def all_groups(self) -> range:
        """Of which the excerpt is made."""
        return range(N_GROUPS) if self.excerpt is None else self.excerpt.groups

    def add(self, first: int, totals: Mapping[str, Totals[str]]) -> None:
        """What a micro-batch that begins with this sample has shown, by kind, which is not used again; micro-batches
        come in order."""
        group = self.group_of(first)
        self.refuse({kind: of.host for kind, of in totals.items()})
        if self._open and self._open[-1][0] == group:
            for kind, of_kind in self._open[-1][1].items():
                of_kind.merge(totals[kind])
        else:
            self._open.append((group, dict(totals)))

    def close(self, beside: Sequence[torch.Tensor] = ()) -> list[np.ndarray]:
        """Nothing more comes of the layer: its groups are added up. beside: what else is on the device, which comes
        over in the same copy and is returned."""
        of_groups = [of_kind for _, totals in self._open for of_kind in totals.values()]
        pairs = [part for of_kind in of_groups for part in of_kind.pairs()]
        brought = to_host([*pairs, *beside])
        parts = iter(brought[: len(pairs)])
        settled = iter([of_kind.take_over(parts) for of_kind in of_groups])
        for group, totals in self._open:
            self.refuse({kind: next(settled) for kind in totals})
            into = self.groups.setdefault(group, {kind: {} for kind in self.total}) if self.apart else self.total
            add_sums(into, {kind: of.host for kind, of in totals.items()})
        self._open = []
        return brought[len(pairs) :]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything of the layers that are done, for a checkpoint."""
        self.close()
        of_groups = ((f"{group}:{kind}", of) for group, sums in self.groups.items() for kind, of in sums.items())
        return flat_arrays({**self.total, **dict(of_groups)})

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        numbers = {int(name.partition(":")[0]) for name in arrays if ":" in name.partition("/")[0]}
        self.groups = {group: {kind: {} for kind in self.total} for group in sorted(numbers)}
        of_groups = {f"{group}:{kind}": of for group, sums in self.groups.items() for kind, of in sums.items()}
        load_flat_arrays(arrays, {**self.total, **of_groups})


def add_sums(into: dict[str, dict[str, np.ndarray]], sums: Sums) -> None:
    """What is not there yet is taken over, without a copy."""
    for kind, of_kind in sums.items():
        for parameter, values in of_kind.items():
            if parameter in into[kind]:
                into[kind][parameter] += values
            else:
                into[kind][parameter] = values


class NoStatistic:
    """Observes nothing: for a pass whose hidden states are all that is wanted."""

    def fresh(self, first: int) -> Self:
        return self

    def observe(
        self, parameter: str, matrix: int, n_matrices: int, inputs: torch.Tensor, outputs: torch.Tensor | None
    ) -> None:
        pass

    def move_to(self, device: torch.device) -> None:
        pass

    def merge(self, other: Self) -> None:
        pass

    def to_arrays(self) -> dict[str, np.ndarray]:
        return {}

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        pass


class SquaredInputs:
    """Per matrix the sum of squared inputs of every column, and the rows they were summed over.

    sums: parameter -> float64 [n_matrices, n_columns], of finished layers; counts: parameter -> int64 [n_matrices].
    Within a micro-batch the sum is taken in float32 by torch's cascade summation, beyond it as Totals do. excerpt,
    apart: as of GroupedSums.
    """

    def __init__(self, excerpt: Excerpt | None = None, apart: bool = False) -> None:
        self.grouped = GroupedSums({"sums": {}, "counts": {}}, excerpt, _refuse_squares, apart)
        self.first = 0
        self._totals = {"sums": Totals[str](), "counts": Totals[str](np.int64)}
        self._latest: tuple[weakref.ref[torch.Tensor], torch.Tensor] | None = None

    @property
    def sums(self) -> dict[str, np.ndarray]:
        return self.grouped.total["sums"]

    @property
    def counts(self) -> dict[str, np.ndarray]:
        return self.grouped.total["counts"]

    def fresh(self, first: int) -> Self:
        observer = type(self)()
        observer.first = first
        return observer

    def observe(
        self, parameter: str, matrix: int, n_matrices: int, inputs: torch.Tensor, outputs: torch.Tensor | None
    ) -> None:
        # Query, key and value are fed the same tensor, and so are gate and up: it is summed once. The reference is
        # weak, so that micro-batches that wait to be merged keep no activations alive.
        if self._latest is None or self._latest[0]() is not inputs:
            squares = inputs.detach().reshape(-1, inputs.shape[-1]).float().square()
            self._latest = (weakref.ref(inputs), squares.sum(0))
        squares = self._latest[1]
        self._totals["sums"].add(parameter, (n_matrices, len(squares)), matrix, squares)
        self._totals["counts"].add(parameter, (n_matrices,), matrix, inputs.numel() // inputs.shape[-1])

    def move_to(self, device: torch.device) -> None:
        for totals in self._totals.values():
            totals.move_to(device)

    def merge(self, other: Self) -> None:
        self.grouped.add(other.first, other._totals)

    def to_arrays(self) -> dict[str, np.ndarray]:
        return self.grouped.to_arrays()

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.grouped.load_arrays(arrays)


def _refuse_squares(sums: Sums) -> None:
    for parameter, of_parameter in sums["sums"].items():
        refuse_not_finite(of_parameter, parameter)
