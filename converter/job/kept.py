"""Results of stages that stay in the work directory: computed once, and used as long as they are what was written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from bitwright.converter.job.progress import Progress
from bitwright.formats.files.disk import remove_tree
from bitwright.formats.files.seals import is_sound, sealed
from bitwright.formats.files.whole import whole_file

T = TypeVar("T")


def kept(
    path: Path,
    what: str,
    progress: Progress,
    compute: Callable[[], T],
    save: Callable[[Path, T], None],
    load: Callable[[Path], T],
    scratch: Path | None = None,
    answers: Callable[[T], bool] = lambda _: True,
) -> T:
    """What the file holds; where there is none, or it has changed since it was written, it is computed first.

    what: of the file, for people. scratch: a directory that the computation leaves, which goes when the file is there.
    answers: whether a result that was kept answers what is asked now; one that does not is computed again.
    """
    result = load(path) if is_kept(path, what, progress) else None
    if result is None or not answers(result):
        computed = compute()
        with sealed(path) as draft:
            save(draft, computed)
        result = load(path)
    if scratch is not None:
        remove_tree(scratch)
    return result


def kept_json(
    path: Path,
    what: str,
    progress: Progress,
    compute: Callable[[], dict[str, Any]],
    scratch: Path | None = None,
    answers: Callable[[dict[str, Any]], bool] = lambda _: True,
) -> dict[str, Any]:
    """The same for plain data."""

    def save(draft: Path, data: dict[str, Any]) -> None:
        with whole_file(draft, what) as file:
            file.write(json.dumps(data, indent=1).encode())

    def load(whole: Path) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(whole.read_bytes())
        return data

    return kept(path, what, progress, compute, save, load, scratch, answers)


def is_kept(path: Path, what: str, progress: Progress) -> bool:
    """Whether an earlier run has left this result unchanged; tells the user of one that has changed since."""
    sound = is_sound(path)
    if not sound:
        tell_damage(path, what, progress)
    return sound


def tell_damage(path: Path, what: str, progress: Progress) -> None:
    """Tell the user of a result that is there and not sound."""
    if path.exists():
        progress.say(f"{path}: the {what} is not what was written there, and is made again")
