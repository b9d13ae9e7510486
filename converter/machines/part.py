"""Which part of a job a process does: part i of N, said on the command line or by the scheduler's variables."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from bitwright.formats.errors import ConvertError

_SLURM, _KUBERNETES = "SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"
_REMEDY = "say which part of how many: --part 3/16; or --part /16 where the scheduler counts: Slurm --array=1-16"


@dataclass(frozen=True, order=True)
class Part:
    """Part `index` of `count`, counted from 1."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def part_of(text: str | None, environment: Mapping[str, str] = os.environ) -> Part:
    """The part that a text names, "3/16"; "/16", and None, leave the index to the scheduler's variables, and None the
    count, too.

    The tasks of a Slurm array are counted from 1, or from 0 where the array begins there; pods of an indexed job of
    Kubernetes are counted from 0, and how many there are has to be said. An array that names some tasks only, as one
    does to run these again, does not tell how many there are.
    Raises ConvertError for what is no part, and where nothing tells which.
    """
    if text is not None and (said := re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)):
        return _checked(int(said[1]), int(said[2]), f"--part {text}")
    if text is not None and not re.fullmatch(r"/\d{1,9}", text):
        raise ConvertError(f"{text!r} is no part", "--part", _REMEDY)
    count = None if text is None else int(text[1:])
    if _SLURM in environment:
        return _of_array(environment, count)
    if _KUBERNETES in environment:
        if count is None:
            raise ConvertError("a job of Kubernetes does not tell how many pods it has", _KUBERNETES, _REMEDY)
        return _checked(_number(environment, _KUBERNETES) + 1, count, _KUBERNETES)
    raise ConvertError("nothing tells which part this is", "--part", _REMEDY)


def _of_array(environment: Mapping[str, str], count: int | None) -> Part:
    index, first = _number(environment, _SLURM), _number(environment, f"{_SLURM[:-2]}MIN", 1)
    if count is not None:
        # With the array's own count the first one is known, and otherwise it is one: --array=3,7 runs two of 16 again.
        whole = _number(environment, f"{_SLURM[:-2]}COUNT", 0) == count
        return _checked(index - (first if whole and first in (0, 1) else 1) + 1, count, _SLURM)
    size = _number(environment, f"{_SLURM[:-2]}COUNT")
    if first not in (0, 1) or _number(environment, f"{_SLURM[:-2]}MAX", first + size - 1) - first + 1 != size:
        raise ConvertError("the array names some of its tasks, and not how many there are", _SLURM, _REMEDY)
    return _checked(index - first + 1, size, _SLURM)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not re.fullmatch(r"\d{1,9}", text):
        raise ConvertError(f"{name} is {text!r}, and no number", name, _REMEDY)
    return int(text)


def _checked(index: int, count: int, where: str) -> Part:
    if not 1 <= index <= count:
        raise ConvertError(f"there is no part {index} of {count}", where, "parts are counted from 1: --part 1/16")
    return Part(index, count)
