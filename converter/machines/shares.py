"""Which tensors of a plan a part encodes: the same on every machine, and about as many weights for each part."""

from collections.abc import Sequence
from typing import TypeVar

from bitwright.converter.machines.part import Part
from bitwright.profiles.planning.plan import PlannedTensor

R = TypeVar("R", bound=PlannedTensor)


def rows_of(rows: Sequence[R], part: Part) -> tuple[R, ...]:
    """The part's rows of a plan, in the plan's order. The largest go first, each to the part that has least; tensors
    whose encodings find the same scale stay together."""
    together: dict[str, list[R]] = {}
    for row in rows:
        together.setdefault(row.encoded_with, []).append(row)
    weights = {name: sum(row.tensor.n_weights for row in members) for name, members in together.items()}
    loads = [0] * part.count
    mine = set()
    for name in sorted(together, key=lambda name: (-weights[name], name)):
        i = loads.index(min(loads))
        loads[i] += weights[name]
        if i == part.index - 1:
            mine.add(name)
    return tuple(row for row in rows if row.encoded_with in mine)
