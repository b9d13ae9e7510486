"""The models and the undisturbed runs that every test of faults compares with."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.disk import Point, State, read_state, recorded
from tests.faults.scenarios import SCENARIOS, begin, build_models, run


@dataclass(frozen=True)
class Undisturbed:
    """A whole run: the disk before every step, and at the end."""

    points: list[Point]
    end: State


@pytest.fixture(scope="session")
def models(tiny, tmp_path_factory) -> dict[str, Path]:
    return build_models(tiny, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """Where all scenarios run, one after the other: a job knows its output by its path."""
    return tmp_path_factory.mktemp("faults") / "root"


@pytest.fixture(scope="session")
def undisturbed(models, root) -> Callable[[str], Undisturbed]:
    known: dict[str, Undisturbed] = {}

    def of(name: str) -> Undisturbed:
        if name not in known:
            begin(root)
            points = recorded(root, lambda: run(SCENARIOS[name], models, root))
            known[name] = Undisturbed(points, read_state(root))
        return known[name]

    return of
