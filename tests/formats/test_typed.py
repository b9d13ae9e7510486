"""Parsed data against declared types."""

from pathlib import Path
from typing import Any, Literal

import pytest

from formats.typed import is_a


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
