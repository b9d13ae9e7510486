"""The large arrays of a part: files one after the other in one file beside the part's own, which lists them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

from bitwright.formats.errors import ConvertError
from bitwright.formats.files.regular_file import open_regular
from bitwright.formats.files.whole import whole_file

_CHUNK_BYTES = 1 << 24
_SUFFIX, _SUFFIX_OF_PARTS = ".data", ".safetensors"


class Member(NamedTuple):
    offset: int
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class Bundle:
    """path: of the file. members: by name."""

    path: Path
    members: Mapping[str, Member]

    def check(self) -> None:
        """Raises ConvertError where the file is missing or of another size; its content is looked at when it is
        read."""
        n_bytes = sum(member.n_bytes for member in self.members.values())
        if self.members and not (self.path.is_file() and self.path.stat().st_size == n_bytes):
            raise self.damaged(f"it is not the {n_bytes} bytes that were written")

    def open(self, name: str) -> BinaryIO:
        """What one of the files held, in memory. Raises ConvertError where it is not what was written."""
        member = self.members[name]
        with open_regular(self.path) as file:
            file.seek(member.offset)
            content = file.read(member.n_bytes)
        if hashlib.sha256(content).hexdigest() != member.sha256:
            raise self.damaged(f"{name} in it is not what was written")
        return BytesIO(content)

    def damaged(self, problem: str) -> ConvertError:
        return ConvertError(
            f"the part's data are damaged: {problem}",
            str(self.path),
            "remove the part's file, and run the command of the part again",
        )


def data_of(part: Path) -> Path:
    """Beside a part's own file. Raises ConvertError for one whose name is not as those of parts are."""
    if part.suffix != _SUFFIX_OF_PARTS:
        raise ConvertError(
            f"the file of a part with data beside it ends in {_SUFFIX_OF_PARTS}", str(part), "name another --output"
        )
    return part.with_suffix(_SUFFIX)


def part_of(data: Path) -> Path:
    """The part's own file."""
    return data.with_suffix(_SUFFIX_OF_PARTS)


def write_bundle(path: Path, files: Mapping[str, Path]) -> Bundle:
    """Copy the files, by name, into one, which appears whole or not at all. Raises ConvertError."""
    members, offset = {}, 0
    with whole_file(path, "data of a part") as bundle:
        for name in sorted(files):
            digest, n_bytes = hashlib.sha256(), 0
            with files[name].open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    bundle.write(chunk)
                    digest.update(chunk)
                    n_bytes += len(chunk)
            members[name] = Member(offset, n_bytes, digest.hexdigest())
            offset += n_bytes
    return Bundle(path, members)
