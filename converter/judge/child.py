"""A runtime in a process of its own: what it cannot recover from ends that process, and not the conversion.

The child is a module of this project, run with -m. It reads one JSON object on stdin and writes JSON objects, one a
line, on stdout; what else its libraries write there is left out.
"""

import json
import os
import re
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any, Literal, NoReturn

from bitwright.calibration.child import start_child
from bitwright.calibration.control import Interrupted, ShouldStop
from bitwright.converter.judge.llama_cpp import installed

Runtime = Literal["llama.cpp", "transformers"]
Told = Callable[[int, int], None]
"""Shown how much is done of how much."""

UNAVAILABLE, TROUBLED = 4, 5
"""A child's exit codes when the runtime is not here, or cannot be called; and when the machine lacks what it takes."""

# Ways to end that say nothing about the artifact: the kernel when memory runs out, a shutdown, a closed session.
_ENDED_BY_SYSTEM = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGXCPU)
# What a runtime says when it gets no memory.
_NO_MEMORY = re.compile(r"bad_alloc|failed to allocate|cannot allocate|unable to allocate|out of memory", re.IGNORECASE)
_ATTEMPTS = 2
_POLL_SECONDS = 0.2
_TOLD = "done and in all"


class RuntimeUnavailable(Exception):
    """The runtime is not here, or cannot be called: says nothing about the artifact."""


class RuntimeFailed(Exception):
    """The runtime does not load the artifact, or does not survive running it."""


class RuntimeTroubled(Exception):
    """The system ended the runtime, or it stood still, more than once: says nothing about the artifact, and another
    time it may be otherwise."""


class _Ended(Exception):
    """One attempt that the system ended."""


def is_installed(runtime: Runtime) -> bool:
    return installed() if runtime == "llama.cpp" else find_spec("compressed_tensors") is not None


def check_installed(runtime: Runtime) -> None:
    """Raises RuntimeUnavailable that says how to install it."""
    if not is_installed(runtime):
        packages = {"llama.cpp": ("xllamacpp", "'bitwright[llama-cpp]'"), "transformers": ("compressed-tensors",) * 2}
        package, install = packages[runtime]
        raise RuntimeUnavailable(f"{package} is not installed: pip install {install}")


def converse(
    module: str,
    request: Mapping[str, Any],
    n_lines: int,
    *,
    name: str,
    patience: float,
    should_stop: ShouldStop,
    told: Told = lambda *_: None,
) -> list[dict[str, Any]]:
    """The n_lines objects that the child answers the request with.

    name: of the runtime, for messages. patience: seconds without a line after which the child counts as standing still.
    told: is shown how far the child is, as it tells; these lines do not count. A child that the system ends is started
    once more.
    Raises RuntimeUnavailable, RuntimeFailed, RuntimeTroubled, and Interrupted when should_stop, polled all the while,
    says so.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return _attempt(module, request, n_lines, name, patience, should_stop, told)
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
    told: Told,
) -> list[dict[str, Any]]:
    with tempfile.TemporaryFile() as errors:
        child = start_child(module, errors)
        assert child.stdin is not None and child.stdout is not None
        lines: list[dict[str, Any]] = []
        try:
            try:
                with child.stdin as stdin:
                    stdin.write(json.dumps(request).encode())
            except BrokenPipeError:
                pass  # it has ended already; its exit code says why
            for line in _lines(child.stdout.fileno(), name, patience, should_stop):
                if not line.startswith(b"{"):
                    continue
                data = json.loads(line)
                if _TOLD in data:
                    told(*data[_TOLD])
                else:
                    lines.append(data)
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


def serve(respond: Callable[[dict[str, Any]], None]) -> None:
    """Of the child: let `respond` answer the request; where it cannot, end and say why."""
    request = json.load(sys.stdin)
    try:
        respond(request)
    except ImportError as error:
        quit_unavailable(error)
    except Exception as error:  # whatever a runtime raises is what it says of the artifact
        quit_failed(error)


def answer(data: Mapping[str, Any]) -> None:
    """Of the child: one line of its answer."""
    print(json.dumps(data), flush=True)


def tell(done: int, total: int) -> None:
    """Of the child: how far it is, which also says that it does not stand still."""
    answer({_TOLD: [done, total]})


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
