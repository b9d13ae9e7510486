"""The process in which the device is pretended. A module of its own: a new process finds it by its name."""

import multiprocessing
import os
import traceback
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from tests.pretended import scenarios


def serve(connection: Connection) -> None:
    """Answer calls of scenarios, (name, arguments, limits), with (done, result) until None comes."""
    while True:
        task = connection.recv()
        if task is None:
            os._exit(0)  # torch's thread of the backend in Python does not survive an ordinary end
        name, arguments, limits = task
        try:
            connection.send((True, getattr(scenarios, name)(*arguments, **limits)))
        except Exception as error:
            connection.send((False, f"{error!r}\n{''.join(traceback.format_tb(error.__traceback__)[-6:])}"))


def started() -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,))
    process.start()
    theirs.close()
    return process, ours
