"""Adding up what the groups of a text have summed where an array is too large to keep one a group: in an order that is
the same whoever has which groups, and in which few arrays are there at a time.

Groups are added up in quarters, in their order, and the quarters in theirs. Whoever has consecutive groups can add up
those of a quarter as soon as it has the quarter's first one, and whole quarters where it has the first of all.
"""

from collections.abc import MutableMapping
from typing import Any

_QUARTER = 4
"""Groups of which each quarter is made."""


def add_quarters(sums: MutableMapping[int, Any], first: int, stop: int) -> None:
    """Add up in place what can be, where all sums of the groups from `first` to `stop` are there: of these at most
    three are left where the first is group 0, and one where they are all.

    sums: first group that a sum is of -> the sum, an array that may be changed. A group without one has nothing to add.
    """
    for group in sorted(group for group in sums if group < stop):
        quarter = group - group % _QUARTER
        if first <= quarter < group:
            _add(sums, quarter, group)
    if first == 0:
        for quarter in range(_QUARTER, stop - _QUARTER + 1, _QUARTER):
            if quarter in sums:
                _add(sums, 0, quarter)


def _add(sums: MutableMapping[int, Any], into: int, group: int) -> None:
    added = sums.pop(group)
    if into in sums:
        sums[into] += added
    else:
        sums[into] = added
