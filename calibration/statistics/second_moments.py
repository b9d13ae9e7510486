"""The second moments of the inputs of every layer, X' X over calibration text: what error feedback needs.

Matrices that are fed the same inputs share them: query, key and value, gate and up. So do the experts of a layer as far
as they are fed what the router sees, which is told from the width; all their rows are summed. The down projections of
experts each have inputs of their own, and moments of their own where those of a layer's experts together fit in
EXPERT_BYTES; otherwise they have none.

Two samples of 32 are held out: their rows are not summed, but a share of them is kept, so that it can be seen whether
feedback lowers the error on inputs that it did not see. Of a long text not every row is summed: sixteen times as many
as there are columns tell the moments well enough.

A layer's moments leave the memory with the layer, into a directory:

    NAME.npz     upper: float32 [n (n + 1) / 2], the rows of the upper triangle; held_out: float32 [n_rows, n]
    index.json   written last, sealed: for each GGUF tensor and matrix the NAME of its moments, or null

Those of a part of the text, which are still to be added to those of the others, see quarter_sums.py:

    NAME.npz     upper GROUP: as above, of the groups from that one on; held_out: all rows
"""

import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import make_directory
from bitwright.formats.files.seals import is_sound, write_sealed
from bitwright.formats.files.whole import whole_file

INDEX_NAME = "index.json"
EXPERT_BYTES = 2 << 30
HELD_OUT_ROWS = 256
"""Rows that are kept of what is held out, at the most."""
# So many times as many rows as columns are enough.
_ROWS_A_COLUMN = 16

_REMEDY = "free some space, give another --work-dir, or add --no-error-feedback"
_UPPER, _HELD_OUT = "upper", "held_out"


class MomentsLost(ConvertError):
    """Second moments that were there are gone or damaged; another pass over the text brings them back."""

    def __init__(self, path: Path, why: str):
        remedy = "start again with --fresh; of statistics that were given, merge the parts again"
        super().__init__(f"the second moments cannot be read ({why})", str(path), remedy)


class Moments(NamedTuple):
    """matrix: float32 [n, n], the sum of x x'; held_out: float32 [n_rows, n], inputs that are not in it."""

    matrix: np.ndarray
    held_out: np.ndarray


def row_share(n_tokens: int, n_columns: int) -> int:
    """One row of so many is summed, of a text of so many tokens."""
    return max(1, n_tokens // (_ROWS_A_COLUMN * n_columns))


def held_out_share(n_tokens: int) -> int:
    """One row of so many of the samples that are held out is kept, of a text of so many tokens."""
    return max(1, n_tokens // (16 * HELD_OUT_ROWS))


def thinned(held_out: np.ndarray) -> np.ndarray:
    """HELD_OUT_ROWS of the rows, float32 [n_rows, n], from all over the text, or all where there are no more."""
    n_rows = len(held_out)
    return held_out if n_rows <= HELD_OUT_ROWS else held_out[np.arange(HELD_OUT_ROWS) * n_rows // HELD_OUT_ROWS]


def pack(matrix: np.ndarray) -> np.ndarray:
    """The rows of the upper triangle of [n, n], one after the other."""
    return np.concatenate([matrix[i, i:] for i in range(len(matrix))])


def unpack(upper: np.ndarray) -> np.ndarray:
    """The inverse of pack, for a symmetric matrix."""
    n = (int(np.sqrt(8 * upper.size + 1)) - 1) // 2
    matrix, start = np.empty((n, n), upper.dtype), 0
    for i in range(n):
        matrix[i, i:] = matrix[i:, i] = upper[start : start + n - i]
        start += n - i
    return matrix


def moment_bytes(widths: Iterable[int]) -> int:
    """Disk space of the moments of inputs of these widths, without what is held out."""
    return sum(n * (n + 1) // 2 * 4 for n in widths)


@dataclass(frozen=True)
class SecondMoments:
    """The moments in a directory. groups: GGUF tensor -> for each of its matrices the name of its moments, or None."""

    directory: Path
    groups: Mapping[str, tuple[str | None, ...]]

    def group(self, tensor: str, matrix: int) -> str | None:
        """The name of a matrix's moments; those that share a name share the moments."""
        matrices = self.groups.get(tensor, ())
        return matrices[matrix] if matrix < len(matrices) else None

    def load(self, group: str) -> Moments:
        """Raises MomentsLost for a file that is missing or damaged, by the checksums that npz files have."""
        path = moments_path(self.directory, group)
        try:
            with np.load(path, allow_pickle=False) as stored:
                return Moments(unpack(stored[_UPPER]), stored[_HELD_OUT])
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise MomentsLost(path, str(error)) from error


def open_moments(directory: Path) -> SecondMoments:
    """The moments of a pass that has ended; raises MomentsLost where there are none, or their index has changed."""
    path = directory / INDEX_NAME
    if not is_sound(path):
        raise MomentsLost(path, "their index is not what was written")
    index = json.loads(path.read_bytes())
    return SecondMoments(directory, {name: tuple(groups) for name, groups in index.items()})


def write_moments(directory: Path, group: str, matrix: np.ndarray, held_out: np.ndarray) -> None:
    """matrix: float32 [n, n], symmetric; held_out: float32 [n_rows, n]."""
    write_packed(directory, group, pack(matrix), held_out)


def write_packed(directory: Path, group: str, upper: np.ndarray, held_out: np.ndarray) -> None:
    """The same of what `pack` gives."""
    _write(directory, group, {_UPPER: upper, _HELD_OUT: held_out})


def write_partial(directory: Path, group: str, matrices: Mapping[int, np.ndarray], held_out: np.ndarray) -> None:
    """The moments of a part of a text. matrices: first group that a sum is of -> float32 [n, n]; held_out: all rows
    that were held out, float32 [n_rows, n]."""
    uppers = {f"{_UPPER} {first}": pack(matrix) for first, matrix in matrices.items()}
    _write(directory, group, uppers | {_HELD_OUT: held_out})


def read_partial(file: BinaryIO) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """What write_partial wrote, its matrices packed."""
    with np.load(file, allow_pickle=False) as stored:
        uppers = {int(name.removeprefix(_UPPER)): stored[name] for name in stored.files if name != _HELD_OUT}
        return uppers, stored[_HELD_OUT]


def _write(directory: Path, group: str, arrays: Mapping[str, np.ndarray]) -> None:
    make_directory(directory)
    with whole_file(moments_path(directory, group), "file of second moments", _REMEDY) as file:
        np.savez(file, allow_pickle=False, **arrays)


def moments_path(directory: Path, group: str) -> Path:
    return directory / f"{group}.npz"


def write_index(directory: Path, groups: Mapping[str, Sequence[str | None]]) -> None:
    """Says whose the moments in the directory are: groups as of SecondMoments. Written last, when all moments are."""
    make_directory(directory)
    write_sealed(directory / INDEX_NAME, "index of second moments", json.dumps(groups).encode())
