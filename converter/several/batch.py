"""A file of conversions, one a line: each in a process of its own, with a log as it goes, and tried again where it
failed by chance."""

import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitwright.converter.boundary.interrupts import STOPPED
from bitwright.converter.boundary.machine import usable_cores
from bitwright.formats.errors import ConvertError, TryAgain
from bitwright.formats.files.disk import make_directory
from bitwright.formats.files.regular_file import read_whole

# More than a person writes.
_LARGEST_BYTES = 1 << 20
_FIRST_PAUSE_SECONDS = 30.0


@dataclass(frozen=True)
class Outcome:
    """What became of one line. code: the exit code of its last try. log: what it said."""

    arguments: tuple[str, ...]
    code: int
    tries: int
    log: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_jobs(path: Path) -> list[list[str]]:
    """The arguments of every line; blank lines and comments do not count. Raises ConvertError."""
    lines = read_whole(path, _LARGEST_BYTES, "name a text file with a conversion in each line").decode().splitlines()
    jobs = []
    for number, line in enumerate(lines, start=1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise ConvertError(f"the line is no command ({error})", f"{path}, line {number}", "mend it") from None
        if words:
            jobs.append(words)
    if not jobs:
        raise ConvertError("the file names no conversion", str(path), "write the arguments of one in each line")
    return jobs


def run_batch(
    jobs: Sequence[Sequence[str]], logs: Path, parallel: int, retries: int, say: Callable[[str], None]
) -> list[Outcome]:
    """Run every job, `parallel` at a time, each on its share of the cores; a failure stops no other. What a job says
    goes line by line to `say` and to a file of its own in the directory `logs`.

    retries: how often a job that ended with TryAgain's exit code is run again, after pauses that double.
    """
    make_directory(logs, "use --logs")
    lock, width = threading.Lock(), len(str(len(jobs)))
    threads = max(1, usable_cores() // parallel)
    stopped = threading.Event()

    def run(numbered: tuple[int, Sequence[str]]) -> Outcome:
        number, arguments = numbered
        log = logs / f"{number:0{width}d}.log"
        command = [sys.executable, "-m", "bitwright.converter", *_with_threads(arguments, threads, parallel)]
        code, tries, pause = TryAgain.exit_code, 0, _FIRST_PAUSE_SECONDS
        with log.open("a", encoding="utf-8") as file:
            while code == TryAgain.exit_code and tries <= retries and not stopped.is_set():
                if tries:
                    stopped.wait(pause)
                    pause *= 2
                tries += 1
                file.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(arguments)}\n")
                code = _run(command, file.write, lambda line: _say(f"[{number}] {line}"))
        if code == STOPPED:
            stopped.set()
        return Outcome(tuple(arguments), code, tries, str(log))

    def _say(line: str) -> None:
        with lock:
            say(line)

    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(run, enumerate(jobs, start=1)))


def _run(command: Sequence[str], write: Callable[[str], object], say: Callable[[str], None]) -> int:
    """Run one command, and pass on every line as it comes."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", bufsize=1
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            write(line)
            say(line.rstrip("\n"))
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def _with_threads(arguments: Sequence[str], threads: int, parallel: int) -> list[str]:
    """The arguments with this job's share of the cores, where it runs beside others and says nothing of them."""
    said = any(word == "--threads" or word.startswith("--threads=") for word in arguments)
    if parallel == 1 or said or arguments[0] in ("publish", "split", "verify", "inspect", "profiles", "architectures"):
        return list(arguments)
    return [*arguments, "--threads", str(threads)]
