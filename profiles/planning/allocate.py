"""Meeting a budget: the format of every tensor it is free to choose, by what each costs in bytes and in divergence."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

import numpy as np

from bitwright.formats.errors import ConvertError
from bitwright.formats.registry import get_format
from bitwright.profiles.evidence import Evidence
from bitwright.profiles.planning.knapsack import Choice, choose, frontier
from bitwright.profiles.reading.budget import Budget
from bitwright.profiles.sizes import size_text
from bitwright.profiles.vocabulary import TensorSpec

SizeOf = Callable[[TensorSpec, str], int]
"""(tensor, format) -> bytes that the budget counts for it, whatever else goes with it included."""

_FRONTIER_POINTS = 6


@dataclass(frozen=True)
class Group:
    """Tensors that share a format, and the formats they may have: n_bytes, losses float64 [n_formats], over all of the
    tensors."""

    tensors: tuple[TensorSpec, ...]
    formats: tuple[str, ...]
    n_bytes: np.ndarray
    losses: np.ndarray


@dataclass(frozen=True)
class Fixed:
    """What is not the budget's to choose: bytes of the rest of the artifact, and the predicted loss of the tensors
    whose format is decided. n_weights: of the whole model."""

    n_bytes: int
    loss: float
    n_weights: int


@dataclass(frozen=True)
class Allocation:
    """formats and reasons: of every free tensor, by its name. gap, exact: see plan.Spent."""

    formats: dict[str, str]
    reasons: dict[str, str]
    gap: float
    exact: bool


class Unmeetable(ConvertError):
    """No choice of formats meets the budget."""


def known_loss(evidence: Evidence | None, tensor: TensorSpec, format_name: str) -> float | None:
    """The expected loss, None where the evidence has none; of a 16 or 32 bit format that was not measured nothing worth
    counting."""
    if evidence is None:
        return None
    losses = evidence.losses.get(tensor.name, {})
    return 0.0 if format_name not in losses and get_format(format_name).block_size == 1 else losses.get(format_name)


def loss_of(evidence: Evidence, tensor: TensorSpec, format_name: str) -> float:
    """The expected loss. Raises ConvertError where the evidence has none."""
    if (loss := known_loss(evidence, tensor, format_name)) is not None:
        return loss
    losses = evidence.losses.get(tensor.name, {})
    raise ConvertError(
        f"what {format_name} costs this tensor was not measured; measured: {', '.join(losses) or 'nothing'}",
        f"{evidence.where}, tensor {tensor.name}",
        "measure the model again, with this format among those that are tried",
    )


def group_tensors(
    free: Sequence[TensorSpec],
    decided: Mapping[str, tuple[TensorSpec, str]],
    budget: Budget,
    evidence: Evidence,
    size_of: SizeOf,
    with_importance: Collection[str],
    least_bits_of: Callable[[TensorSpec], float],
) -> list[Group]:
    """The free tensors with their options, in groups where the budget wants some alike.

    decided: name -> tensor and format, of those that are not free: what should be like them has their format.
    with_importance: names of the tensors whose columns have an importance. least_bits_of: what a tensor has at least.
    Raises ConvertError for a tensor that no format of the budget suits, and for decided ones that are not alike.
    """
    members: dict[object, list[TensorSpec]] = {}
    for tensor in free:
        members.setdefault(_group_key(tensor, budget), []).append(tensor)
    given: dict[object, dict[str, str]] = {}
    for tensor, name in decided.values():
        given.setdefault(_group_key(tensor, budget), {})[name] = tensor.name
    groups = []
    for key, tensors in members.items():
        allowed = [set(_formats_of(tensor, budget, with_importance, least_bits_of(tensor))) for tensor in tensors]
        names = [name for name in budget.formats if all(name in formats for formats in allowed)]
        if not names:
            raise _nothing_suits(tensors, budget, max(map(least_bits_of, tensors)))
        if fixed := given.get(key):
            names = list(fixed)
            if len(names) > 1 or not all(get_format(names[0]).fits(tensor.n_columns) for tensor in tensors):
                raise ConvertError(
                    f"tensors that should share a format cannot: rules give {_text(fixed)}",
                    f"{budget.where}, key alike, tensor {tensors[0].name}",
                    "name one format for all of them, or leave them out of `alike`",
                )
        groups.append(
            Group(
                tuple(tensors),
                tuple(names),
                np.array([sum(size_of(tensor, name) for tensor in tensors) for name in names], np.float64),
                np.array([sum(loss_of(evidence, tensor, name) for tensor in tensors) for name in names]),
            )
        )
    return groups


def _group_key(tensor: TensorSpec, budget: Budget) -> object:
    """What groups a tensor: equal for tensors that share a format."""
    alike = next((roles for roles in budget.alike if tensor.role in roles and tensor.layer is not None), None)
    return (alike, tensor.layer) if alike else tensor.name


def _text(formats: Mapping[str, str]) -> str:
    return ", ".join(f"{name} to {tensor}" for name, tensor in formats.items())


def _formats_of(tensor: TensorSpec, budget: Budget, with_importance: Collection[str], least: float) -> list[str]:
    names = []
    for name in budget.formats:
        block_format = get_format(name)
        # As in encoding, only matrices of the layers are refused without importance.
        starved = block_format.needs_importance and tensor.layer is not None and tensor.name not in with_importance
        if block_format.fits(tensor.n_columns) and block_format.bits_per_weight >= least and not starved:
            names.append(name)
    return names


def _nothing_suits(tensors: Sequence[TensorSpec], budget: Budget, least: float) -> ConvertError:
    return ConvertError(
        f"no format of the budget suits rows of {', '.join(sorted({str(t.n_columns) for t in tensors}))}"
        f" with at least {least:g} bits a weight",
        f"{budget.where}: {', '.join(tensor.name for tensor in tensors)}",
        "add F16, or a format of 32 weights a block such as Q8_0, to the budget's formats",
    )


def allocate(groups: Sequence[Group], budget: Budget, fixed: Fixed) -> Allocation:
    """The choice of the least predicted loss within the budget's size, or of the least size within its divergence.

    Raises ConvertError, with points of the frontier, when there is none.
    """
    n_bytes, losses = [group.n_bytes for group in groups], [group.losses for group in groups]
    limit = _byte_limit(budget, fixed)
    if limit is None:
        choice = choose(losses, n_bytes, budget.most_loss - fixed.loss)
    else:
        choice = choose(n_bytes, losses, limit - fixed.n_bytes)
    if choice is None or (limit is not None and choice.cost + fixed.loss > budget.most_loss):
        raise _infeasible(n_bytes, losses, budget, fixed, limit, choice)
    return Allocation(
        {tensor.name: group.formats[i] for group, i in _chosen(groups, choice) for tensor in group.tensors},
        {tensor.name: _reason(group, i) for group, i in _chosen(groups, choice) for tensor in group.tensors},
        choice.cost - choice.bound,
        choice.exact,
    )


def _chosen(groups: Sequence[Group], choice: Choice) -> list[tuple[Group, int]]:
    return list(zip(groups, choice.choices, strict=True))


def _byte_limit(budget: Budget, fixed: Fixed) -> int | None:
    if budget.as_rules:
        return budget.data_bytes
    if budget.bpw is not None:
        return int(budget.bpw * fixed.n_weights / 8)
    return budget.size


def _reason(group: Group, chosen: int) -> str:
    """What was chosen, and what the next format up would have bought; down, where there is none up."""
    n_bytes, losses = group.n_bytes - group.n_bytes[chosen], group.losses - group.losses[chosen]
    text = f"budget: {group.formats[chosen]} {group.losses[chosen]:.2g} nats"
    if len(group.tensors) > 1:
        text += f" for {len(group.tensors)} tensors alike"
    better = np.flatnonzero((n_bytes > 0) & (losses < 0))
    if len(better):
        up = better[np.argmax(-losses[better] / n_bytes[better])]
        return f"{text}; {group.formats[up]} would save {-losses[up]:.2g} for +{size_text(n_bytes[up])}"
    return f"{text}; no format of the budget costs less"


def _enough(value: float) -> str:
    """At least the value, in four digits: what is asked for when it is typed again can be had."""
    digits = 3 - floor(log10(value)) if value > 0 else 0
    return f"{ceil(value * 10.0**digits - 1e-9) / 10.0**digits:.4g}"


def _point(size: float, kld: float, budget: Budget, fixed: Fixed) -> str:
    """A point of the frontier in the unit of the goal."""
    divergence = f"(KLD {_enough(kld)})"
    if budget.bpw is not None:
        return f"{_enough(8 * size / fixed.n_weights)} bpw {divergence}"
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= factor:
            return f"{_enough(size / factor)} {unit} {divergence}"
    return f"{_enough(size / 2**10)} KiB {divergence}"


def _infeasible(
    n_bytes: list[np.ndarray],
    losses: list[np.ndarray],
    budget: Budget,
    fixed: Fixed,
    limit: int | None,
    choice: Choice | None,
) -> Unmeetable:
    """Says what cannot be met, the two feasible points nearest to it, and some of the frontier."""
    points = frontier(n_bytes, losses) + np.array([fixed.n_bytes, fixed.loss])
    nearest: list[tuple[float, float]] = []
    if limit is not None and choice is None:
        what = f"the smallest plan takes {size_text(points[0, 0])}, and {size_text(limit)} are asked for"
        nearest = [tuple(point) for point in points[:2]]
    elif limit is not None and choice is not None:
        reached = choice.cost + fixed.loss
        what = f"{size_text(limit)} reach a predicted KL divergence of {reached:.4g}, not {budget.most_loss:g}"
        nearest = [(choice.weight + fixed.n_bytes, reached)]
        if (smallest := choose(losses, n_bytes, budget.most_loss - fixed.loss)) is not None:
            nearest.append((smallest.cost + fixed.n_bytes, smallest.weight + fixed.loss))
        else:
            nearest.append(tuple(points[-1]))
    else:
        what = f"the least predicted KL divergence is {points[-1, 1]:.4g}, and {budget.most_loss:g} is asked for"
        nearest = [tuple(point) for point in points[-2:]]
    lines = [f"{size_text(size):>10}  KLD {kld:.4g}" for size, kld in _sampled(points)]
    feasible = " or ".join(_point(size, kld, budget, fixed) for size, kld in nearest)
    return Unmeetable(
        f"the budget cannot be met: {what}",
        budget.where,
        f"nearest: {feasible}; raise the target, or lower what the profile fixes. Size and predicted KLD:\n    "
        + "\n    ".join(lines),
    )


def _sampled(points: np.ndarray) -> np.ndarray:
    """Some points of the frontier, evenly over its sizes in ratio."""
    wanted = np.geomspace(points[0, 0], points[-1, 0], _FRONTIER_POINTS)
    sampled: np.ndarray = points[np.unique(np.abs(points[:, :1] - wanted).argmin(axis=0))]
    return sampled
