"""Where a part is worked on: a directory that one process holds, and in which the same part, begun again, continues."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitwright.converter.job.progress import Progress
from bitwright.converter.job.work_directory import WorkDirectory, default_work_dir, stops_cleanly
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import make_directory, remove_tree


@contextmanager
def part_directory(
    output: Path, scratch: Path | None, fingerprint: Mapping[str, Any], progress: Progress, command: str
) -> Iterator[Path]:
    """The work directory of a part, gone when the block ends well.

    output: of the part. scratch: a directory on a disk of this machine, in which it is to be; None for beside the
    output. fingerprint: of the part, "tool" first; what another one has begun there is given up. command: what
    continues the part. Raises ConvertError where another process works on the part, Stopped for Interrupted.
    """
    make_directory(output.parent, "name another file with --output")
    directory = work_path(output, scratch)
    work = WorkDirectory(directory)
    with work.locked(), stops_cleanly(directory, command):
        try:
            work.claim(dict(fingerprint))
        except ConvertError as error:
            progress.say(f"{directory}: the part starts over: {error.what}")
            work.clear()
            work.claim(dict(fingerprint), fresh=True)
        yield directory
    remove_tree(directory)


def work_path(output: Path, scratch: Path | None) -> Path:
    return default_work_dir(output if scratch is None else scratch / output.name)
