"""Patterns of rows and columns: which of the stored ones a tensor of the artifact has, and in what order.

    "heads two=2 half -> heads half two"     the two halves of every head's rows interleaved
    "part=3 heads head -> part[0] heads head"  the first third
    "positions -> positions[2:]"             all but the first two
    "heads row=5 -> heads row[:2], heads row[2:]"       the first two rows of every head, then the other three
    "words -> words, words[0] copies=5"       all, and the first one five times more
    "two=2 keys -> two keys | keys group -> group keys" the first 2 * keys as they are, the others in another order

On the left the axes that the stored ones are counted by, slowest first: dimensions by their name, `name=size` for any
other, and one may be left to what remains. On the right the same axes in the order of the artifact; `axis[i]` and
`axis[first:stop]` take a part of one. Sizes and bounds are expressions. A last axis `copies=size` on the right: every
one is taken so often. A comma on the right: what follows is taken of the same stored ones, and comes after. Where
stored ones that follow each other are counted by other axes, their patterns stand one behind the other, with `|`
between them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from bitwright.converter.architectures.expression import Expression
from bitwright.profiles.layout import Selection

_AXIS = re.compile(r"(?P<name>\w+)(\[(?P<part>[^\]]+)\])?(=(?P<size>\S+))?$")
_COPIES = "copies"

_Axes = list[re.Match[str]]


@dataclass(frozen=True)
class Pattern:
    """text: as the data file has it. Raises ValueError where that is none."""

    text: str

    def __post_init__(self) -> None:
        for stored, takings in self._parts():
            names = [axis["name"] for axis in stored]
            for taken in takings:
                if sorted(names) != sorted(axis["name"] for axis in self._own(taken)) or len(set(names)) != len(names):
                    raise ValueError(f"the pattern {self.text!r} has other axes on its right than on its left")

    def selection(self, n_stored: int, dimensions: Mapping[str, Any]) -> Selection:
        """What it takes of so many rows or columns. Raises ValueError where the sizes do not go into their number."""
        parts = self._parts()
        sizes = [[self._size(axis, dimensions) for axis in stored] for stored, _ in parts]
        left = n_stored - sum(prod(size or 0 for size in part) for part in sizes)
        filled = [self._filled(part, left) for part in sizes]
        if sum(map(prod, filled)) != n_stored:
            raise ValueError(f"the axes of {self.text!r} are {filled}, and {n_stored} are stored")
        selection, first = None, n_stored
        for (stored, takings), part in reversed(list(zip(parts, filled, strict=True))):
            first -= prod(part)
            names = [axis["name"] for axis in stored]
            for taken in reversed(takings):
                pieces = {axis["name"]: axis["part"] for axis in taken}
                spans = [self._span(pieces[name], size, dimensions) for name, size in zip(names, part, strict=True)]
                order = tuple(names.index(axis["name"]) for axis in self._own(taken))
                copies = self._size(taken[-1], dimensions) if taken[-1]["name"] == _COPIES else 1
                selection = Selection(tuple(part), order, tuple(spans), first, selection, copies or 0)
        assert selection is not None  # a pattern takes something
        return selection

    @staticmethod
    def _own(taken: _Axes) -> _Axes:
        """The axes of what is taken that are axes of the stored ones."""
        return taken[:-1] if taken[-1]["name"] == _COPIES else taken

    @staticmethod
    def _filled(sizes: list[int | None], left: int) -> list[int]:
        """The sizes of axes, the one that has none in its text with what is left over."""
        known = prod(size for size in sizes if size is not None)
        return [(left // known if known else 0) if size is None else size for size in sizes]

    def _parts(self) -> list[tuple[_Axes, list[_Axes]]]:
        """Of every part the axes of the stored ones, and those of what is taken of them, one after the other."""
        parts = []
        for text in self.text.split("|"):
            left, arrow, right = text.partition("->")
            if not arrow:
                raise ValueError(f"{self.text!r} is no pattern of axes")
            parts.append((self._axes(left), [self._axes(taken) for taken in right.split(",")]))
        return parts

    def _axes(self, text: str) -> _Axes:
        matches = [_AXIS.match(axis) for axis in text.split()]
        axes = [match for match in matches if match is not None]
        if not axes or len(axes) < len(matches):
            raise ValueError(f"{self.text!r} is no pattern of axes")
        return axes

    @staticmethod
    def _size(axis: re.Match[str], dimensions: Mapping[str, Any]) -> int | None:
        if axis["size"] is not None:
            return int(Expression(axis["size"]).evaluate(dimensions))
        known = dimensions.get(axis["name"])
        return known if isinstance(known, int) else None

    @staticmethod
    def _span(part: str | None, size: int, dimensions: Mapping[str, Any]) -> tuple[int, int]:
        if part is None:
            return 0, size
        first, colon, stop = (text.strip() for text in part.partition(":"))
        start = int(Expression(first).evaluate(dimensions)) if first else 0
        if not colon:
            return start, start + 1
        end = int(Expression(stop).evaluate(dimensions)) if stop else size
        return start, end
