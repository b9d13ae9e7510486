"""A runtime in a process of its own: what it cannot recover from ends that process, and not the conversion.

The child is a module of this project, run with -m. It reads one JSON object on stdin and writes JSON objects, one a
line, on stdout; what else its libraries write there is left out.
"""

import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from calibration.control import Interrupted, ShouldStop

UNAVAILABLE, TROUBLED = 4, 5
"""A child's exit codes when the runtime is not here, or cannot be called; and when the machine lacks what it takes."""

# Ways to end that say nothing about the artifact: the kernel when memory runs out, a shutdown, a closed session.
_ENDED_BY_SYSTEM = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGXCPU)
# What a runtime says when it gets no memory.
_NO_MEMORY = re.compile(r"bad_alloc|failed to allocate|cannot allocate|unable to allocate|out of memory", re.IGNORECASE)
_ATTEMPTS = 2
_POLL_SECONDS = 0.2


class RuntimeUnavailable(Exception):
    """The runtime is not here, or cannot be called: says nothing about the artifact."""


class RuntimeFailed(Exception):
    """The runtime does not load the artifact, or does not survive running it."""


class RuntimeTroubled(Exception):
    """The system ended the runtime, or it stood still, more than once: says nothing about the artifact, and another
    time it may be otherwise."""


class _Ended(Exception):
    """One attempt that the system ended."""


def converse(
    module: str,
    request: Mapping[str, Any],
    n_lines: int,
    *,
    name: str,
    patience: float,
    should_stop: ShouldStop,
    seen: Callable[[int], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """The n_lines objects that the child answers the request with.

    name: of the runtime, for messages. patience: seconds without a line after which the child counts as standing still.
    seen: told how many lines have come. A child that the system ends is started once more.
    Raises RuntimeUnavailable, RuntimeFailed, RuntimeTroubled, and Interrupted when should_stop, polled all the while,
    says so.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return _attempt(module, request, n_lines, name, patience, should_stop, seen)
        except _Ended as error:
            if attempt == _ATTEMPTS:
                raise RuntimeTroubled(f"{error}, {_ATTEMPTS} times") from None
    raise AssertionError("unreachable")


def _attempt(
    module: str,
    request: Mapping[str, Any],
    n_lines: int,
    name: str,
    patience: float,
    should_stop: ShouldStop,
    seen: Callable[[int], None],
) -> list[dict[str, Any]]:
    root = str(Path(__file__).parent.parent)
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            # A Ctrl-C is ours to answer.
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(":")},
        )
        assert child.stdin is not None and child.stdout is not None
        lines: list[dict[str, Any]] = []
        try:
            try:
                with child.stdin as stdin:
                    stdin.write(json.dumps(request).encode())
            except BrokenPipeError:
                pass  # it has ended already; its exit code says why
            for line in _lines(child.stdout.fileno(), name, patience, should_stop):
                if line.startswith(b"{"):
                    lines.append(json.loads(line))
                    seen(len(lines))
            code = child.wait()
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()
    if code or len(lines) != n_lines:
        _fail(code, said, name)
    return lines


def _lines(descriptor: int, name: str, patience: float, should_stop: ShouldStop) -> Iterator[bytes]:
    """What the child writes, line by line, to the end of the stream."""
    rest, heard = b"", time.monotonic()
    while True:
        if should_stop():
            raise Interrupted(f"stopped while {name} ran")
        if not select.select([descriptor], [], [], _POLL_SECONDS)[0]:
            if time.monotonic() - heard > patience:
                raise _Ended(f"{name} stood still for {patience:.0f} s")
            continue
        data = os.read(descriptor, 1 << 16)
        if not data:
            return
        heard = time.monotonic()
        *whole, rest = (rest + data).split(b"\n")
        yield from whole


def _fail(code: int, said: list[str], name: str) -> NoReturn:
    if code == UNAVAILABLE:
        raise RuntimeUnavailable(said[-1] if said else f"{name} is not available")
    if code == TROUBLED:
        raise _Ended(f"{name} lacks what it takes: {said[-1] if said else 'it does not say what'}")
    if -code in _ENDED_BY_SYSTEM:
        raise _Ended(f"{name} was ended by {signal.Signals(-code).name}")
    ended = [f"{name} was ended by {signal.Signals(-code).name}"] if code < 0 else []
    raise RuntimeFailed(": ".join([*ended, *said[-1:]]) or f"{name} failed ({code})")


def answer(data: Mapping[str, Any]) -> None:
    """Of the child: one line of its answer."""
    print(json.dumps(data), flush=True)


def quit_unavailable(error: Exception) -> NoReturn:
    """Of the child: end because the runtime cannot be called."""
    print(error, file=sys.stderr)
    sys.exit(UNAVAILABLE)


def quit_failed(error: Exception) -> NoReturn:
    """Of the child: end with the reason in one line: the runtime refuses the artifact, or the machine lacks memory,
    space or a right, which says nothing about the artifact."""
    text = "; ".join(str(error).splitlines()) or type(error).__name__
    print(text, file=sys.stderr)
    of_system = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)
    sys.exit(TROUBLED if of_system or _NO_MEMORY.search(text) else 1)
