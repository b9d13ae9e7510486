"""The process in which the device is pretended."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
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


@pytest.fixture(scope="session")
def pretend() -> Iterator[Callable[..., Any]]:
    """pretend("scenario", ...): what that function of scenarios.py returns, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,))
    process.start()
    theirs.close()

    def run(name: str, *arguments: Any, **limits: int) -> Any:
        ours.send((name, arguments, limits))
        done, result = ours.recv()
        assert done, result
        return result

    yield run
    ours.send(None)
    process.join()
