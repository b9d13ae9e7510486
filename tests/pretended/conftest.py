"""Scenarios on a pretended device."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.pretended.process import started


@pytest.fixture(scope="session")
def pretend() -> Iterator[Callable[..., Any]]:
    """pretend("scenario", ...): what that function of scenarios.py returns, in a process of its own; where that ends,
    the test fails, and the next one has another."""
    running = [started()]

    def run(name: str, *arguments: Any, **limits: int) -> Any:
        process, ours = running[0]
        try:
            ours.send((name, arguments, limits))
            done, result = ours.recv()
        except (EOFError, OSError):
            process.join()
            running[0] = started()
            pytest.fail(f"the process of the pretended device ended with {process.exitcode} in {name}{arguments}")
        assert done, result
        return result

    yield run
    process, ours = running[0]
    ours.send(None)
    process.join()
