"""A disk as a kill leaves it at every step of a run, and a disk that fails at one."""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Literal

from bitwright.formats.files.disk import Step, observed

State = dict[str, bytes | None]
"""Everything in a directory: relative path -> content, None for a directory."""
Kind = tuple[Step, str]
"""A step, and where it is taken: names that differ by numbers, hashes or tensors are one place."""
Choice = Literal["every", "kinds"] | int


@dataclass(frozen=True)
class Point:
    """The disk just before a step was taken, as a kill there leaves it; before a file is synced, as a power cut does:
    half of what was written to it since the last time is zeros."""

    kind: Kind
    state: State = field(repr=False)


def kind_of(step: Step, path: Path, root: Path) -> Kind:
    place = os.path.relpath(path, root)
    place = re.sub(r"[0-9a-f]{16,}", "HASH", place)
    place = re.sub(r"[^/]*\.weight\.npz", "TENSOR.npz", place)
    return step, re.sub(r"\d+", "N", place)


class _Reader:
    """Reads directories again and again, and files only where they have changed."""

    def __init__(self, root: Path):
        self.root = root
        self._known: dict[str, tuple[tuple[int, int, int], bytes]] = {}

    def read(self) -> State:
        state: State = {}
        for directory, names, files in os.walk(self.root):
            for name in names:
                state[os.path.relpath(os.path.join(directory, name), self.root)] = None
            for name in files:
                path = os.path.join(directory, name)
                relative, stat = os.path.relpath(path, self.root), os.stat(path)
                identity = stat.st_ino, stat.st_mtime_ns, stat.st_size
                if relative not in self._known or self._known[relative][0] != identity:
                    self._known[relative] = identity, Path(path).read_bytes()
                state[relative] = self._known[relative][1]
        return state


def read_state(root: Path) -> State:
    return _Reader(root).read()


def restore(state: State, root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for name, content in sorted(state.items()):
        if content is None:
            (root / name).mkdir(parents=True, exist_ok=True)
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)


def recorded(root: Path, run: Callable[[], object]) -> list[Point]:
    """The disk before every step of a whole run."""
    reader = _Reader(root)
    points: list[Point] = []
    synced: dict[Path, int] = {}

    def observe(step: Step, path: Path) -> None:
        state = reader.read()
        name = os.path.relpath(path, root)
        if step == "sync" and (content := state.get(name)) is not None:
            start = synced.get(path, 0) if synced.get(path, 0) < len(content) else 0
            start += (len(content) - start) // 2
            state[name] = content[:start] + bytes(len(content) - start)
            synced[path] = len(content)
        points.append(Point(kind_of(step, path, root), state))

    with observed(observe):
        run()
    return points


def sample(points: list[Point], choice: Choice) -> list[Point]:
    """Points of a run, of which those with equal disks count once: every one, the first of each kind, or so many,
    evenly spaced. Of the steps that make and fill a file that has not got its name yet, the last stands for all, and of
    those of one kind with no other step between them the first, the middle and the last."""
    points = [p for p in points if p.kind[0] not in ("make", "write") or not p.kind[1].endswith(".tmp")]
    alike = [list(group) for _, group in groupby(points, key=lambda point: point.kind)]
    points = [group[i] for group in alike for i in sorted({0, len(group) // 2, len(group) - 1})]
    if choice == "kinds":
        points = list({point.kind: point for point in reversed(points)}.values())[::-1]
    elif choice != "every":
        points = [points[round((i + 0.5) * len(points) / choice)] for i in range(choice)]
    return list({hash(tuple(sorted((k, v or b"") for k, v in p.state.items()))): p for p in points}.values())


@contextmanager
def failing(root: Path, failed: set[Kind]) -> Iterator[None]:
    """A disk on which the first step of a kind that is not among the failed ones, which it joins, fails: of some kinds
    with an error that passes, of others because the disk is full from then on."""
    full, n_before = False, len(failed)

    def observe(step: Step, path: Path) -> None:
        nonlocal full
        kind = kind_of(step, path, root)
        if full and step in ("make", "write", "sync"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if kind in failed or len(failed) > n_before:
            return
        failed.add(kind)
        full = len(failed) % 2 == 0 and step in ("make", "write")
        number = errno.ENOSPC if full else errno.EIO
        raise OSError(number, os.strerror(number))

    with observed(observe):
        yield
