"""The command `bitwright workflow`: the workflow that comes with the tool, written out to be changed and run."""

from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import make_directory
from bitwright.formats.files.whole import whole_file

CONFIG = "config.yaml"
"""What a user changes of it."""


def write_workflow(directory: Path, model: str | None = None) -> list[Path]:
    """Write the Snakefile, its configuration, profiles for executors, and the script for Slurm alone; returns the
    files.

    model: of the job in the configuration. A file that is there already and the same stays. Raises ConvertError,
    before anything is written, for one that is there and not the same.
    """
    contents = {directory / name: content for name, content in _shipped(files(__package__) / "workflow")}
    if model is not None:
        config = contents[directory / CONFIG].decode()
        contents[directory / CONFIG] = config.replace("model: org/model\n", f"model: {_quoted(model)}\n").encode()
    for path, content in contents.items():
        if path.exists() and not (path.is_file() and path.read_bytes() == content):
            raise ConvertError(
                "there is another file of that name already, and it may have been changed on purpose",
                str(path),
                "name another directory, or move this one away",
            )
    for path, content in contents.items():
        make_directory(path.parent, "name another directory")
        with whole_file(path, "workflow") as file:
            file.write(content)
    return list(contents)


def _shipped(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    """Path in the folder, and content, of every file."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _shipped(entry, f"{prefix}{entry.name}/")
        else:
            yield f"{prefix}{entry.name}", entry.read_bytes()


def _quoted(text: str) -> str:
    """As a string of YAML."""
    return "'" + text.replace("'", "''") + "'"
