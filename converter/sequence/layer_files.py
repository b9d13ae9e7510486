"""The encoded layers in a work directory, a sealed file each, until they are in the artifact."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import make_directory, remove
from bitwright.formats.files.seals import is_sound, write_sealed

# What the journal will keep of a layer's tensors, in the layer's file: the name of no tensor.
_REMARKS = "remarks of the encoder"


@dataclass(frozen=True)
class LayerFiles:
    """Files of a directory by the order of the layers: the data of each tensor, uint8, and what the encoder remarks."""

    directory: Path

    @property
    def paths(self) -> list[Path]:
        return sorted(self.directory.glob("[0-9]*.npz"))

    def keep(self, n_layers: int) -> None:
        """Leave the layers that a pass counts on; without one of them it has to start over. Raises ConvertError."""
        make_directory(self.directory)
        paths = self.paths
        if len(paths) < n_layers or not all(map(is_sound, paths[:n_layers])):
            raise ConvertError(
                "a layer that was encoded before is missing, or has changed since",
                str(self.directory),
                "start over with --fresh",
            )
        for path in paths[n_layers:]:  # written before a kill, and not counted
            remove(path)

    def append(self, data: Mapping[str, np.ndarray], remarks: Mapping[str, dict[str, object]]) -> None:
        """Keep one more layer, by tensor."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **{_REMARKS: np.array(json.dumps(remarks))}, **data)
        write_sealed(self.directory / f"{len(self.paths):04d}.npz", "encoded layer", buffer.getvalue())

    def places(self) -> dict[str, Path]:
        """Tensor -> the file that its data are in."""
        places: dict[str, Path] = {}
        for path in self.paths:
            with np.load(path, allow_pickle=False) as stored:
                places |= {name: path for name in stored.files if name != _REMARKS}
        return places

    def remarks(self) -> dict[str, dict[str, object]]:
        """Of every tensor."""
        remarks: dict[str, dict[str, object]] = {}
        for path in self.paths:
            with np.load(path, allow_pickle=False) as stored:
                remarks |= json.loads(str(stored[_REMARKS]))
        return remarks


def data_of(path: Path, tensor: str) -> np.ndarray:
    """uint8 [n_bytes]."""
    with np.load(path, allow_pickle=False) as stored:
        data: np.ndarray = stored[tensor]
    return data
