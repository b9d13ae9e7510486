"""What a command may replace or delete: what it wrote itself, what it was told to replace, and never what it reads.

Every command that writes a file asks here. A whole file takes its name without replacing anything; where something has
that name already, and may be replaced, it is moved aside, looked at once more, and only then removed.
"""

import fcntl
import filecmp
import json
import os
import stat
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from bitwright.converter.artifact.directory_record import RECIPE_NAME, listed_files, read_recipe
from bitwright.converter.artifact.layout import Files, partial_path
from bitwright.converter.artifact.run import Run
from bitwright.converter.source.checkpoint import metadata_files
from bitwright.formats.errors import ConvertError, TryAgain
from bitwright.formats.files.disk import NO_LOCKS, remove, remove_directory, remove_tree, rename, take_name
from bitwright.formats.files.whole import whole_file
from bitwright.formats.names import LONGEST_NAME, hidden_path, is_text, printable
from bitwright.profiles.sizes import size_text


class Replaceable:
    """What a job may replace at its outputs: by path what was there when --fresh was given, and what it has put there
    itself. Anything that has been changed or exchanged since is somebody else's.

    store: where the work directory remembers it, so that a run after an interruption may, too; None for a command
    without a work directory.
    """

    def __init__(self, store: Path | None = None):
        self._store = store
        self._identities: dict[str, list[str]] = {}
        if store is not None and store.exists():
            with suppress(ValueError, TypeError, AttributeError):  # a damaged record allows nothing
                stored = json.loads(store.read_bytes())
                self._identities = {path: list(map(str, identities)) for path, identities in stored.items()}

    def allow(self, paths: Iterable[Path]) -> None:
        """What is at these paths now may be replaced."""
        self._remember({path: identity for path in paths if (identity := _identity(path)) is not None})

    def allows(self, path: Path, at: Path | None = None) -> bool:
        """Whether what is at this path, or has been moved from it to another, may be replaced."""
        identity = _identity(path if at is None else at)
        return identity is not None and identity in self._identities.get(str(path.absolute()), ())

    def grows(self, partial: Path) -> None:
        """The file or directory here is this job's, and grows until it is whole."""
        if (identity := _growing_identity(partial)) not in self._identities.get(str(partial.absolute()), ()):
            self._remember({partial: identity})

    @property
    def grown(self) -> list[Path]:
        """Where this job has let something grow."""
        return [Path(path) for path, known in self._identities.items() if any(i.startswith(_GROWING) for i in known)]

    def check_growing(self, partial: Path, begins_as_ours: bool) -> None:
        """Refuse what is where an artifact grows and is not of this job, unless nothing is in it: another job may
        continue it. begins_as_ours: what this work directory knows to have been here begins as its artifact does, and
        was copied or brought back since. Raises ConvertError."""
        if not os.path.lexists(partial) or _is_empty(partial):
            return
        recorded = self._identities.get(str(partial.absolute()), ())
        if _is_directory(partial) or (partial.is_file() and not partial.is_symlink()):
            if _growing_identity(partial) in recorded or (begins_as_ours and partial in self.grown):
                return
            if partial.is_file() and not partial.stat().st_size:
                return
        raise ConvertError(
            f"an unfinished artifact, or a file of that name, is in the way and not of this work directory:"
            f" {_what(partial)}",
            str(partial),
            "another job may continue it: run that one's own command again, name another --output, or remove it",
        )

    def put(self, new: Path, path: Path) -> None:
        """Give a new file its name, as put_in_place does; the job may replace it later on."""
        if (identity := _identity(new)) is not None:
            self._remember({path: identity})
        put_in_place(new, path, self)

    def _remember(self, identities: dict[Path, str]) -> None:
        for path, identity in identities.items():
            self._identities.setdefault(str(path.absolute()), []).append(identity)
        if self._store is not None and identities:
            with whole_file(self._store, "record of what may be replaced") as file:
                file.write(json.dumps(self._identities, indent=1).encode())


_GROWING = "growing-"


def _growing_identity(partial: Path) -> str:
    """What stays the same of a file or directory while it grows."""
    return f"{_GROWING}{partial.lstat().st_ino}"


def _identity(path: Path) -> str | None:
    """What tells a file from any other that may come in its place, and stays with it when it is renamed; of a directory
    that of its recipe. None where nothing is."""
    try:
        status = (path / RECIPE_NAME if _is_directory(path) else path).lstat()
    except OSError:
        return None
    return f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_empty(directory: Path) -> bool:
    return _is_directory(directory) and next(directory.iterdir(), None) is None


# Before the work


def inputs_of(run: Run) -> list[Path]:
    """The files and directories that a run reads."""
    job, checkpoint, location = run.job, run.checkpoint, run.checkpoint.location
    weights = {stored.file for tensor in checkpoint.tensors.values() for stored in tensor.stored}
    small = metadata_files(location) if location.is_dir() else []
    text = Path(job.calibration).expanduser() if job.calibration is not None else None
    named = [
        path for path in (job.imatrix, job.sensitivity, job.statistics, text) if path is not None and path.exists()
    ]
    return [location, *small, *checkpoint.beside, *sorted(weights), *named]


def check_places(inputs: Collection[Path], outputs: Collection[Path], work_dir: Path | None = None) -> None:
    """Refuse a path that is no UTF-8, an output that is an input or would hold one, and a work directory that holds
    either: what is in it may be deleted. Raises ConvertError."""
    for path in (*inputs, *outputs, *([work_dir] if work_dir is not None else [])):
        if not is_text(str(path)):
            raise ConvertError(
                "the path is no UTF-8, in which the report and the recipe name it", printable(str(path)), "rename it"
            )
    read, written = [(path, path.resolve()) for path in inputs], [(path, path.resolve()) for path in outputs]
    on_disk = {(status.st_dev, status.st_ino): path for path, _ in read if (status := _stat(path)) is not None}
    for output, place in written:
        if (length := len(os.fsencode(output.name))) > LONGEST_NAME:
            raise ConvertError(
                f"the file's name would have {length} bytes, and file systems take {LONGEST_NAME}",
                str(output),
                "choose a shorter one with --output",
            )
        status = _stat(output)
        same = on_disk.get((status.st_dev, status.st_ino)) if status is not None else None
        same = same or next((path for path, resolved in read if resolved.is_relative_to(place)), None)
        if same is not None:
            raise ConvertError(f"the output would replace what is read: {same}", str(output), "name another output")
    if work_dir is None:
        return
    work_place = work_dir.resolve()
    for path, place in [*read, *written]:
        if place.is_relative_to(work_place):
            raise ConvertError(
                f"the work directory holds {path}, and --fresh deletes what is in a work directory",
                str(work_dir),
                "name a directory of its own with --work-dir, or move that file out of it",
            )
    if any(work_place.is_relative_to(place) for _, place in written):
        raise ConvertError(
            "the work directory lies in the output, which appears as a whole and is replaced as a whole",
            str(work_dir),
            "name a directory beside it with --work-dir",
        )


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def check_replaceable(path: Path, directory: bool) -> None:
    """Refuse what not even --fresh replaces: a directory where a file is to be and the other way round, a directory
    that this tool did not write, and one in which somebody has put files. Raises ConvertError."""
    if not os.path.lexists(path) or (directory and _is_empty(path)):
        return
    remedy = "name another one with --output, or remove it yourself"
    if not directory:
        if not (path.is_file() or path.is_symlink()):
            raise ConvertError(f"the output exists and is no file: {_what(path)}", str(path), remedy)
        return
    if not _is_directory(path):
        raise ConvertError(f"the output exists and is no directory: {_what(path)}", str(path), remedy)
    if not (path / RECIPE_NAME).is_file():
        raise ConvertError(
            f"the output exists and has no {RECIPE_NAME}: it was not written by this tool, and is not replaced",
            str(path),
            remedy,
        )
    if foreign := foreign_entries(path):
        raise ConvertError(
            f"the output has files that this tool did not write, and is not replaced: {_list(foreign)}",
            str(path),
            "move them out of it, or name another one with --output",
        )


def check_free(paths: Iterable[Path], replaceable: Replaceable, directory: bool = False) -> None:
    """Refuse outputs where something is that the job neither wrote nor may replace. Raises ConvertError."""
    for path in paths:
        if os.path.lexists(path) and not (directory and _is_empty(path)) and not replaceable.allows(path):
            raise occupied(path)


def check_places_free(files: Files, replaceable: Replaceable) -> None:
    """The same for an artifact that is not begun yet, and for where it will grow."""
    check_free(files.outputs, replaceable, files.is_directory)
    for path in map(partial_path, files.outputs):
        replaceable.check_growing(path, begins_as_ours=True)  # what it begins with is looked at when it is written


def forget_outputs(outputs: Collection[Path], directory: bool, replaceable: Replaceable) -> None:
    """--fresh: remove what has grown for these outputs. What is there already stays until there is something in its
    place. Raises ConvertError, before anything is removed, for what is not this tool's."""
    grown = {*replaceable.grown, *map(partial_path, outputs)}
    for path in grown:
        replaceable.check_growing(path, begins_as_ours=False)
    for path in outputs:
        bring_back(path, replaceable)
        check_replaceable(path, directory)
    for path in grown:
        remove_tree(path) if path.is_dir() else remove(path)


def occupied(
    path: Path, remedy: str = "name another one with --output, or replace this one with --fresh"
) -> ConvertError:
    return ConvertError(f"the output exists and is not of this job: {_what(path)}", str(path), remedy)


def _what(path: Path) -> str:
    if path.is_symlink():
        return f"a link to {os.readlink(path)}"
    if path.is_dir():
        return "a directory that this tool wrote" if (path / RECIPE_NAME).is_file() else "a directory"
    if not path.is_file():
        return "no regular file"
    with path.open("rb") as file:
        kind = "a GGUF" if file.read(4) == b"GGUF" else "a file"
    changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
    return f"{kind} of {size_text(path.stat().st_size)}, last changed at {changed}"


def _list(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def locked_output(path: Path) -> Iterator[None]:
    """Hold the output for this process, in whatever work directory it works; another process is refused. A killed one
    holds nothing. Raises ConvertError."""
    lock = hidden_path(path, "lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        _check_lock(lock)
        descriptor = _lock(lock)
    except BlockingIOError:
        raise TryAgain(
            "another process is writing this output", str(path), "wait for it to end, or name another one with --output"
        ) from None
    except OSError as error:
        raise ConvertError(
            f"the output cannot be locked: {error}", str(path), "name another one with --output"
        ) from None
    try:
        yield
    finally:
        if _is_open(lock, descriptor) and not os.fstat(descriptor).st_size:
            lock.unlink(missing_ok=True)
        os.close(descriptor)


def _check_lock(lock: Path) -> None:
    """A lock is an empty file. Raises ConvertError for anything else of its name."""
    with suppress(FileNotFoundError):
        status = lock.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size:
            raise ConvertError(
                f"the lock of the output would take the place of {_what(lock)}, which this tool did not write",
                str(lock),
                "move it out of the way, or name another output with --output",
            )


def _lock(lock: Path) -> int:
    """The open file of the lock. One that another process has removed meanwhile locks nothing, and another is made.

    Where a file system has no locks nothing is held: then what was written is found out to be another's at the end."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_open(lock, descriptor):
                return descriptor
        except OSError as error:
            if error.errno in NO_LOCKS:
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_open(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


# When a file is whole


def put_in_place(new: Path, path: Path, replaceable: Replaceable) -> None:
    """Give a new file, or directory, its name. Something that has this name is replaced where it may be, and stays
    otherwise; the same bytes as those of the new file are as good as new.

    A run that was killed in here is completed by the same call, or by remove_replaced. Raises ConvertError for
    something that stays, and OSError.
    """
    if not _took_name(new, path):
        if path.is_file() and same_file(path, new):
            remove(new)
        else:
            _move_aside(path, replaceable)
            if not _took_name(new, path):
                raise occupied(path)
    remove_replaced(path, replaceable)


def same_file(one: Path, other: Path) -> bool:
    """Whether both names are of one file, or of the same bytes: a kill between taking a name and giving up the other
    leaves both."""
    return one.samefile(other) or filecmp.cmp(one, other, shallow=False)


def _took_name(new: Path, path: Path) -> bool:
    try:
        take_name(new, path)
    except OSError:
        if os.path.lexists(path):
            return False
        raise
    return True


def _move_aside(path: Path, replaceable: Replaceable) -> None:
    aside = hidden_path(path, "replaced")
    if not replaceable.allows(path):
        raise occupied(path)
    remove_replaced(path, replaceable)
    if os.path.lexists(aside):
        raise ConvertError(
            f"an earlier run has moved away what was at the output, and nothing tells whose it is: {_what(aside)}",
            str(aside),
            "give it another name, or remove it, then run the same command again",
        )
    rename(path, aside)
    if not replaceable.allows(path, aside) or (_is_directory(aside) and foreign_entries(aside)):
        take_name(aside, path)  # it came between the look and the renaming
        raise occupied(path)


def remove_replaced(path: Path, replaceable: Replaceable) -> None:
    """Remove what has been moved aside for the file or directory of this name, and may be replaced."""
    aside = hidden_path(path, "replaced")
    if _is_empty(aside):
        remove_directory(aside)
    elif replaceable.allows(path, aside):
        if _is_directory(aside):
            remove_artifact(aside)
        else:
            remove(aside)


def bring_back(path: Path, replaceable: Replaceable) -> None:
    """Undo what a run that was killed has moved aside, before its record of that is deleted: where nothing has come in
    its place it is there again."""
    aside = hidden_path(path, "replaced")
    if replaceable.allows(path, aside) and not os.path.lexists(path):
        take_name(aside, path)
    remove_replaced(path, replaceable)


def foreign_entries(directory: Path) -> list[str]:
    """What is in a directory that this tool wrote, and is none of the files that its recipe lists; a folder without any
    of them counts as one. Raises ConvertError for a damaged recipe."""
    listed = listed_files(read_recipe(directory))
    folders = {parent.as_posix() for name in listed for parent in PurePosixPath(name).parents}
    foreign, pending = [], [directory]
    while pending:
        for path in pending.pop().iterdir():
            name = path.relative_to(directory).as_posix()
            if _is_directory(path) and name in folders:
                pending.append(path)
            elif name != RECIPE_NAME and (name not in listed or _is_directory(path)):
                foreign.append(name)
    return sorted(foreign)


def remove_artifact(directory: Path) -> None:
    """Remove the files of a directory that this tool wrote, and the directory unless it has others. The recipe, by
    which it knows them, goes last."""
    foreign = {directory / name for name in foreign_entries(directory)}
    _remove_but(directory, {*foreign, directory / RECIPE_NAME})
    if not foreign:
        remove(directory / RECIPE_NAME)
        remove_directory(directory)


def _remove_but(directory: Path, kept: set[Path]) -> None:
    """Everything in the directory but these, and the folders that are empty then."""
    for path in list(directory.iterdir()):
        if path in kept:
            continue
        if not _is_directory(path):
            remove(path)
            continue
        _remove_but(path, kept)
        if _is_empty(path):
            remove_directory(path)
