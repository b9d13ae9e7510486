"""What a part of an encoding leaves: a file with the data of its tensors, and a manifest that says whose they are.

3.json    the manifest: part, fingerprint, name and size of every tensor with the SHA-256 of its data; written last
3.piece   a header, then the data of these tensors without gaps, in the order of the plan
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.converter.machines.part import Part
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.regular_file import open_regular, read_json
from bitwright.formats.files.whole import whole_file
from bitwright.profiles.planning.plan import PlannedTensor

_KIND, _VERSION = "bitwright piece", 1
_MAGIC = b"BITWRIGHT PIECE\n"
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class PieceEntry:
    """The data of one tensor, or of the tensors of one module. remarks: what its encoder has said of it."""

    name: str
    n_bytes: int
    sha256: str = ""
    remarks: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Piece:
    """A piece as a file that is known to the byte before anything is encoded, see artifact.layout.Layout.

    fingerprint: what has to be the same of all parts, as plain JSON data. tensors: in the order of the plan.
    """

    path: Path
    part: Part
    fingerprint: Mapping[str, Any]
    tensors: tuple[PieceEntry, ...]

    @property
    def file_name(self) -> str:
        """While it grows."""
        return "piece"

    @cached_property
    def header(self) -> bytes:
        """It tells what grows apart from the piece of another plan, another part or another machine."""
        names = [(entry.name, entry.n_bytes) for entry in self.tensors]
        return _MAGIC + hashlib.sha256(_json([str(self.part), self.fingerprint, names])).digest()

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        return tuple(accumulate((entry.n_bytes for entry in self.tensors), initial=len(self.header)))[:-1]

    @property
    def n_bytes(self) -> int:
        return len(self.header) + sum(entry.n_bytes for entry in self.tensors)

    def read(self, name: str) -> Iterator[np.ndarray]:
        """The data of a tensor in order, uint8. Raises ConvertError, at the end, where they are not what they were."""
        (i,) = [i for i, entry in enumerate(self.tensors) if entry.name == name]
        left, digest = self.tensors[i].n_bytes, hashlib.sha256()
        with open_regular(data_path(self.path)) as file:
            file.seek(self.offsets[i])
            while left and (data := file.read(min(left, _CHUNK_BYTES))):
                left -= len(data)
                digest.update(data)
                yield np.frombuffer(data, np.uint8)
        if digest.hexdigest() != self.tensors[i].sha256:
            raise damaged(data_path(self.path), f"the data of {name} are not what was written")


def data_path(manifest: Path) -> Path:
    return manifest.with_suffix(".piece")


def piece_of(path: Path, part: Part, fingerprint: Mapping[str, Any], rows: Sequence[PlannedTensor]) -> Piece:
    """The piece that is to have these rows of a plan. path: of its manifest."""
    return Piece(path, part, fingerprint, tuple(PieceEntry(row.tensor.name, row.n_bytes) for row in rows))


def save_manifest(piece: Piece) -> None:
    """Write it whole, or not at all. Raises ConvertError."""
    content = {
        "kind": _KIND,
        "version": _VERSION,
        "part": [piece.part.index, piece.part.count],
        "fingerprint": dict(piece.fingerprint),
        "tensors": [[entry.name, entry.n_bytes, entry.sha256, entry.remarks or {}] for entry in piece.tensors],
    }
    with whole_file(piece.path, "manifest") as file:
        file.write(json.dumps({**content, "check": _check(content)}, indent=1).encode())


def load_manifest(path: Path) -> Piece:
    """The piece that a manifest is of. Raises ConvertError for a file that is missing, cut short or no manifest, and
    for data beside it that are missing or of another size."""
    remedy = "name the manifests that `bitwright encode --part` has written"
    if not path.exists():
        raise ConvertError("there is no such manifest", str(path), remedy)
    try:
        content = read_json(path, remedy=remedy)
    except ConvertError as error:
        raise damaged(path, error.what) from None
    if content.get("kind") != _KIND:
        raise ConvertError("this is no manifest of a piece", str(path), remedy)
    check = content.pop("check", None)
    if content.get("version") != _VERSION or check != _check(content):
        raise damaged(path, "its content is not what was written")
    entries = tuple(PieceEntry(*entry) for entry in content["tensors"])
    piece = Piece(path, Part(*content["part"]), content["fingerprint"], entries)
    data = data_path(path)
    if not data.is_file():
        raise damaged(data, "the data are missing")
    with open_regular(data) as file:
        header = file.read(len(piece.header))
    if header != piece.header or data.stat().st_size != piece.n_bytes:
        raise damaged(data, f"it is not the {piece.n_bytes} bytes that its manifest says")
    return piece


def damaged(path: Path, problem: str) -> ConvertError:
    return ConvertError(f"the part is damaged: {problem}", str(path), "remove its manifest and encode the part again")


def _check(content: Mapping[str, Any]) -> str:
    return blake2b(_json(content), digest_size=16).hexdigest()


def _json(data: object) -> bytes:
    return json.dumps(data, sort_keys=True).encode()
