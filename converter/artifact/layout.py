"""The files of an artifact, known to the byte before anything is encoded."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bitwright.formats.names import hidden_path


def partial_path(output: Path) -> Path:
    """Where a file grows until it is whole: beside its final place, so that a rename completes it."""
    return hidden_path(output, "partial")


class Entry(Protocol):
    """What is written in one go, and is finished or not: a tensor, or the tensors of a module."""

    @property
    def name(self) -> str: ...
    @property
    def n_bytes(self) -> int: ...


class Layout(Protocol):
    """One file, known to the byte; offsets: where the data of each entry starts, up to the next one or to the end."""

    @property
    def file_name(self) -> str: ...
    @property
    def header(self) -> bytes: ...
    @property
    def tensors(self) -> "tuple[Entry, ...]": ...
    @property
    def offsets(self) -> tuple[int, ...]: ...
    @property
    def n_bytes(self) -> int: ...


def spans(layout: Layout) -> Iterator[tuple[Entry, int, int]]:
    """Every entry of a file with the byte where its data starts, and the one where the next entry or the end does."""
    ends = [*layout.offsets[1:], layout.n_bytes]
    return zip(layout.tensors, layout.offsets, ends, strict=True)


@dataclass(frozen=True)
class Files:
    """Where an artifact goes. layouts: its files, none before there is a plan. outputs: what must not be there before;
    without layouts, anything that may be written. growing: where the files grow until they are whole. is_directory:
    whether an output is a directory, and not a file."""

    layouts: tuple[Layout, ...] = ()
    outputs: tuple[Path, ...] = ()
    growing: tuple[Path, ...] = ()
    is_directory: bool = False

    @property
    def n_bytes(self) -> int:
        """Of the files that hold weights."""
        return sum(layout.n_bytes for layout in self.layouts)
