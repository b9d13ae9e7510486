"""The expressions of the data files: sizes, conditions and values, computed from a configuration.

They are a small part of Python: numbers, texts, names (keys of config.json and dimensions), arithmetic, comparisons,
`and`, `or`, `not`, `in`, `... if ... else ...`, lists, indices and slices, and the functions below, of which
`position(list, value)` is the index of the first such value, the length of the list where there is none, and
`count(list, value)` how many there are; `each` makes a list of a value that is none; `normal_quantile(share)` is what
so large a share of a standard normal distribution lies below.
"""

import ast
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from types import CodeType
from typing import Any


def _position(values: list[Any], value: Any) -> int:
    return values.index(value) if value in values else len(values)


def _count(values: list[Any], value: Any) -> int:
    return values.count(value)


def _normal_quantile(share: float) -> float:
    ends = {0.0: -math.inf, 1.0: math.inf}
    return ends[share] if share in ends else NormalDist().inv_cdf(share)


_FUNCTIONS = {
    **{"min": min, "max": max, "len": len, "int": int, "sum": sum, "abs": abs, "list": list, "range": range},
    **{"sqrt": math.sqrt, "log": math.log, "position": _position, "count": _count},
    "normal_quantile": _normal_quantile,
    "each": lambda value: value if isinstance(value, list) else [value],
}
_ALLOWED = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.List, ast.Tuple, ast.Subscript, ast.Slice, ast.Call),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)


class Unknown(Exception):
    """An expression needs a value that the configuration does not give; the message is its name."""


@dataclass(frozen=True)
class Expression:
    """text: as the data file has it. Raises ValueError where that is no expression of these."""

    text: str

    def __post_init__(self) -> None:
        for node in ast.walk(self._tree):
            called = isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS)
            if called or not isinstance(node, _ALLOWED):
                raise ValueError(f"{self.text!r} has {type(node).__name__}, which no expression of a data file has")

    def evaluate(self, names: Mapping[str, Any]) -> Any:
        """The value; a name without one is None. Raises Unknown where that makes the rest impossible."""
        try:
            return eval(self._code, {"__builtins__": {}}, _Names(names))
        except (TypeError, ValueError, AttributeError, IndexError, KeyError, ArithmeticError):
            missing = next((name for name in self.names() if names.get(name) is None), self.text)
            raise Unknown(missing) from None

    def is_name(self) -> bool:
        """Whether it is a name and nothing more."""
        return isinstance(self._tree.body, ast.Name)

    def names(self) -> Iterator[str]:
        """The names that it is made of."""
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Name) and node.id not in _FUNCTIONS:
                yield node.id

    @cached_property
    def _tree(self) -> ast.Expression:
        try:
            return ast.parse(self.text, mode="eval")
        except SyntaxError:
            raise ValueError(f"{self.text!r} is no expression") from None

    @cached_property
    def _code(self) -> CodeType:
        return compile(self._tree, "data file", "eval")


class _Names(dict[str, Any]):
    """What an expression finds: the names given to it, then the functions, then None."""

    def __init__(self, names: Mapping[str, Any]):
        self.given = names

    def __missing__(self, name: str) -> Any:
        value = self.given.get(name)
        return _FUNCTIONS.get(name) if value is None else value
