"""The process in which the device is pretended."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

from tests.pretended import scenarios


def _serve(connection: Connection) -> None:
    while True:
        task = connection.recv()
        if task is None:
            os._exit(0)  # torch's thread of the backend in Python does not survive an ordinary end
        name, arguments, limits = task
        try:
            connection.send((True, getattr(scenarios, name)(*arguments, **limits)))
        except Exception as error:
            import traceback

            connection.send((False, f"{error!r}\n{''.join(traceback.format_tb(error.__traceback__)[-6:])}"))


def _started() -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,))
    process.start()
    theirs.close()
    return process, ours


@pytest.fixture(scope="session")
def pretend() -> Iterator[Callable[..., Any]]:
    """pretend("scenario", ...): what that function of scenarios.py returns, in a process of its own; where that ends,
    the test fails, and the next one has another."""
    running = [_started()]

    def run(name: str, *arguments: Any, **limits: int) -> Any:
        process, ours = running[0]
        try:
            ours.send((name, arguments, limits))
            done, result = ours.recv()
        except (EOFError, OSError):
            process.join()
            running[0] = _started()
            pytest.fail(f"the process of the pretended device ended with {process.exitcode} in {name}{arguments}")
        assert done, result
        return result

    yield run
    process, ours = running[0]
    ours.send(None)
    process.join()
