"""Parsed data against declared types."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from bitwright.formats.typed import ABSENT, Absent, from_plain, is_a, to_plain


@pytest.mark.parametrize(
    ("declared", "right", "wrong"),
    [
        (int, [0, -1, 2**70], [True, 1.0, "1", None]),
        (bool, [True], [1, None]),
        (float, [0.5, 1, -1], [True, float("nan"), float("inf"), 10**400, "0.5"]),
        (str, ["", "x"], [b"x", None, 1]),
        (Path, [Path("x")], ["x"]),
        (Literal["a", "b"], ["a"], ["c", 1, ["a"]]),
        (int | None, [None, 3], ["3", True]),
        (float | Literal["auto"], ["auto", 0.5], ["0.5", "x"]),
        (tuple[str, ...], [(), ("x",)], [["x"], ("x", 1), "x"]),
        (list[int], [[], [1, 2]], [(1,), [1, "2"], {1: 1}, 1]),
        (dict[str, float], [{}, {"x": 1.0}], [{1: 1.0}, {"x": "1"}, [], [("x", 1.0)], {"x": 1.0, "y": None}]),
    ],
)
def test_is_a(declared: Any, right: list[Any], wrong: list[Any]) -> None:
    assert [value for value in right if not is_a(value, declared)] == []
    assert [value for value in wrong if is_a(value, declared)] == []


@dataclass(frozen=True)
class Point:
    x: float
    name: str | None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure:
    corners: tuple[Point, ...]
    pairs: tuple[tuple[int, float], ...]
    centre: Point | None
    by_name: dict[str, Point]
    colour: Literal["red", "green"]
    note: str | Absent | None = ABSENT
    sizes: dict[str, float] = field(default_factory=dict)


FIGURE = Figure((Point(1, "a"), Point(0.5, None, ("t",))), ((3, 0.5),), Point(2, "c"), {"p": Point(0, "b")}, "red")


def test_dataclasses_to_json_and_back():
    plain = json.loads(json.dumps(to_plain(FIGURE)))
    assert from_plain(Figure, plain) == FIGURE and "note" not in plain
    assert from_plain(Figure, plain | {"note": None}).note is None
    assert math.isinf(from_plain(Point, {"x": math.inf}).x)


def test_keys_that_are_missing_and_keys_that_nobody_knows():
    assert from_plain(Point, {"x": 1, "y": 2}) == Point(1, None)
    plain = to_plain(FIGURE)
    del plain["centre"]
    assert from_plain(Figure, plain).centre is None
    del plain["corners"]
    with pytest.raises(ValueError, match=r"figure\.corners is not"):
        from_plain(Figure, plain, "figure")


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"corners": [{"x": 1}, {"x": "1"}]}, "corners.1.x"),
        ({"corners": {"x": 1}}, "corners"),
        ({"pairs": [[3, 0.5, 1]]}, "pairs.0"),
        ({"pairs": [[0.5, 3]]}, "pairs.0.0"),
        ({"centre": []}, "centre"),
        ({"by_name": {"p": {}}}, "by_name.p.x"),
        ({"by_name": {1: {"x": 1}}}, "by_name"),
        ({"colour": "blue"}, "colour"),
        ({"note": 1}, "note"),
        ({"sizes": None}, "sizes"),
    ],
)
def test_plain_data_of_another_shape(changes: dict[str, Any], where: str):
    with pytest.raises(ValueError, match=f"^the record.{where} is not"):
        from_plain(Figure, to_plain(FIGURE) | changes)
