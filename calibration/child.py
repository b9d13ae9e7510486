"""A module of this project, run with -m in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import IO


def start_child(module: str, errors: int | IO[bytes] = subprocess.DEVNULL) -> "subprocess.Popen[bytes]":
    """Start the module, with pipes for its input and output. errors: where its stderr goes.

    It imports this project from where this process does, be that a source tree or an installed wheel, and nothing from
    the current directory. A Ctrl-C reaches this process alone. Its OpenMP threads sleep while they wait for each other:
    where other work has the cores, those that spin take three times as long.
    """
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        start_new_session=True,
        env={
            "OMP_WAIT_POLICY": "PASSIVE",
            **os.environ,
            "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(":"),
        },
    )
