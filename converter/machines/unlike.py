"""Parts brought together: those that do not go together or are missing are named, with the commands that make them."""

import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bitwright.converter.machines.part import Part
from bitwright.formats.errors import ConvertError

_SHOWN = 8
"""Parts whose files and commands an error shows."""
_LONGEST = 60
# Options that say which part a command makes, each with a value.
_OF_A_PART = ("--part", "--output", "-o")

Command = Callable[[Part], str]
"""What makes a part, as one types it."""


class SharedText(Protocol):
    """What a machine has made of its samples of a text. command: the words that did it."""

    @property
    def part(self) -> Part: ...
    @property
    def fingerprint(self) -> Mapping[str, Any]: ...
    @property
    def command(self) -> Sequence[str]: ...


S = TypeVar("S", bound=SharedText)


def gathered(paths: Collection[Path], load: Callable[[Path], S], made_by: str) -> list[S]:
    """All parts of a text, in their order. made_by: the command, in words. Raises ConvertError for parts that are
    missing, damaged or do not go together, with the commands that make them."""
    found: dict[Path, S] = {}
    faults = []
    for path in paths:
        try:
            found[path] = load(path)
        except ConvertError as error:
            faults.append(f"{error.what} ({error.where})")
    if not found:
        raise ConvertError("; ".join(faults) or "no part is given", "--merge", f"name {made_by} has written")
    first, known = next(iter(found.items()))

    def command(part: Part) -> str:
        return command_of(known.command, part, renamed(first, known.part, part))

    check_alike({path: (made.part, made.fingerprint) for path, made in found.items()}, command)
    by_part = {made.part: made for made in found.values()}
    if lacking := missing(by_part, faults, str(first), command):
        raise lacking
    return [by_part[part] for part in sorted(by_part)]


def check_alike(parts: Mapping[Path, tuple[Part, Mapping[str, Any]]], command: Command) -> None:
    """Refuse parts whose fingerprints differ: of other work, of another version, or of machines that do not compute the
    same to the bit; the fewer ones are named. parts: by their files. Raises ConvertError."""
    counts = {part.count for part, _ in parts.values()}
    if len(counts) > 1:
        raise ConvertError(
            f"the work was cut into different numbers of parts: {', '.join(map(str, sorted(counts)))}",
            _list(parts),
            "give the files of one number of parts",
        )
    alike: dict[str, list[Path]] = defaultdict(list)
    for path, (_, fingerprint) in parts.items():
        alike[repr(sorted(fingerprint.items()))].append(path)
    if len(alike) == 1:
        return
    most, *others = sorted(alike.values(), key=len, reverse=True)
    odd = [path for group in others for path in group]
    first, other = parts[most[0]][1], parts[odd[0]][1]
    keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
    values = "; ".join(
        f"{key} is {_text(other.get(key))} there and {_text(first.get(key))} in the others" for key in keys
    )
    numbers = sorted(parts[path][0] for path in odd)
    raise ConvertError(
        f"what part {', '.join(map(str, numbers))} was made of, or with, is not the others': {values}",
        _list(odd),
        f"remove it, and make it as the others, on a machine of their kind:{_commands(numbers, command)}",
    )


def missing(parts: Collection[Part], faults: Collection[str], where: str, command: Command) -> ConvertError | None:
    """The error for parts that are missing, None where all are there. parts: those that are there, one at least.
    faults: what is known of the others, in words."""
    count = next(iter(parts)).count
    lacking = [part for part in (Part(i, count) for i in range(1, count + 1)) if part not in parts]
    if not lacking:
        return None
    numbers = ", ".join(str(part.index) for part in lacking)
    what = f"part {numbers} of {count} is missing" if len(lacking) == 1 else f"parts {numbers} of {count} are missing"
    return ConvertError("; ".join([what, *faults]), where, f"make what is missing:{_commands(lacking, command)}")


def renamed(path: Path, part: Part, other: Part) -> Path:
    """The file of another part, called as this part's is."""
    number = rf"(?<!\d)0*{part.index}(?!\d)"
    found = re.search(number, path.name)
    if found is None:
        return path.with_name(f"{path.stem}-{other.index}-of-{other.count}{path.suffix}")
    return path.with_name(re.sub(number, f"{other.index:0{len(found[0])}d}", path.name, count=1))


def command_of(words: Sequence[str], part: Part, output: Path) -> str:
    """What makes another part than the command of these words did, and where, as one types it."""
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and not word.startswith(("--part=", "--output=")) and word not in _OF_A_PART:
            kept.append(word)
        skip = word in _OF_A_PART
    return shlex.join([*kept, "--part", str(part), "--output", str(output)])


def _commands(parts: Collection[Part], command: Command) -> str:
    lines = [command(part) for part in list(parts)[:_SHOWN]]
    more = [f"and so on for {len(parts) - _SHOWN} more"] if len(parts) > _SHOWN else []
    return "".join(f"\n    {line}" for line in [*lines, *more])


def _list(paths: Collection[Path]) -> str:
    return ", ".join(map(str, list(paths)[:_SHOWN])) + (" and more" if len(paths) > _SHOWN else "")


def _text(value: object) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
