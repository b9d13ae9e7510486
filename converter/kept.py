"""Results of stages that stay in the work directory: computed once, and used as long as they are what was written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from converter.progress import Progress
from formats.files import remove_tree
from formats.seals import is_sound, sealed
from formats.whole_file import whole_file

T = TypeVar("T")


def kept(
    path: Path,
    what: str,
    progress: Progress,
    compute: Callable[[], T],
    save: Callable[[Path, T], None],
    load: Callable[[Path], T],
    scratch: Path | None = None,
) -> T:
    """What the file holds; where there is none, or it has changed since it was written, it is computed first.

    what: of the file, for people. scratch: a directory that the computation leaves, which goes when the file is there.
    """
    if not is_kept(path, what, progress):
        result = compute()
        with sealed(path) as draft:
            save(draft, result)
    if scratch is not None:
        remove_tree(scratch)
    return load(path)


def kept_json(
    path: Path, what: str, progress: Progress, compute: Callable[[], Any], scratch: Path | None = None
) -> Any:
    """The same for plain data."""

    def save(draft: Path, data: Any) -> None:
        with whole_file(draft, what) as file:
            file.write(json.dumps(data, indent=1).encode())

    def load(whole: Path) -> Any:
        return json.loads(whole.read_bytes())

    return kept(path, what, progress, compute, save, load, scratch)


def is_kept(path: Path, what: str, progress: Progress) -> bool:
    """Whether an earlier run has left this result; of one that has changed since the user is told."""
    sound = is_sound(path)
    if not sound:
        tell_damage(path, what, progress)
    return sound


def tell_damage(path: Path, what: str, progress: Progress) -> None:
    """Of a result that is not sound, if it is there at all."""
    if path.exists():
        progress.say(f"{path}: the {what} is not what was written there, and is made again")
