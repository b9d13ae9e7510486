"""Records in safetensors files: arrays, and what they are as JSON in the metadata."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import rename
from bitwright.formats.files.regular_file import parse_json
from bitwright.formats.files.safetensors import read_header
from bitwright.formats.files.whole import Place, whole_file


@dataclass(frozen=True)
class RecordKind:
    """One kind of record. key: of the metadata; title: in messages; command: writes such a file anew."""

    key: str
    version: int
    title: str
    command: str

    def save(self, path: Path, header: Mapping[str, Any], arrays: dict[str, np.ndarray], place: Place = rename) -> None:
        """Write the file; it appears whole or not at all, and `place` gives it its name. The same record gives the same
        bytes."""
        data = save(arrays, {self.key: json.dumps({"version": self.version, **header}, sort_keys=True)})
        with whole_file(path, self.title, place=place) as file:
            file.write(data)

    def is_in(self, path: Path) -> bool:
        """Whether the file holds such a record, be it of this version or another."""
        if path.suffix != ".safetensors" or not path.is_file():
            return False
        try:
            return self.key in read_header(path)[1]
        except ConvertError:
            return False

    def load(self, path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The header and the arrays that were saved.

        Raises ConvertError for a file that is missing, truncated, of another version or of another kind.
        """
        where = str(path)
        if not path.exists():
            raise ConvertError("there is no such file", where, f"check the path of the {self.title}")
        try:
            tensors, metadata = read_header(path)
        except ConvertError as error:
            raise self.damaged(where, error.what) from None
        text = metadata.get(self.key)
        if not isinstance(text, str):
            raise ConvertError(
                f"this safetensors file is no {self.title}", where, f"give a file that `{self.command}` wrote"
            )
        header = self._parse(where, text)
        return header, {name: tensor.read(name).reshape(tensor.shape) for name, tensor in tensors.items()}

    def _parse(self, where: str, text: str) -> dict[str, Any]:
        try:
            header = parse_json(text, where, "its description", "")
        except ConvertError as error:
            raise self.damaged(where, error.what) from None
        if header.get("version") != self.version:
            raise ConvertError(
                f"the {self.title} is of version {header.get('version')!r}, this release reads version {self.version}",
                where,
                f"compute it again: {self.command}",
            )
        return header

    def fields(self, where: str, header: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
        """These keys of a header, each of one of its types. Raises ConvertError otherwise."""
        for key, allowed in kinds.items():
            if key not in header or type(header[key]) not in allowed:
                raise self.damaged(where, f"{key} is {header.get(key)!r}")
        return {key: header[key] for key in kinds}

    def damaged(self, where: str, problem: str) -> ConvertError:
        return ConvertError(f"the {self.title} is damaged: {problem}", where, f"compute it again: {self.command}")
