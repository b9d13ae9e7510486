"""The stage `verify` of a safetensors directory: every tensor, decoded from the files, against what was encoded."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from calibration.importance import ImportanceMatrix
from converter.checkpoint import Checkpoint
from converter.directory_artifact import DirectoryArtifact
from converter.encode_modules import KEPT_CODECS
from converter.progress import Progress
from converter.verify import TensorError
from formats.errors import ConvertError


def verify_directory(
    directory: Path,
    artifact: DirectoryArtifact,
    checkpoint: Checkpoint,
    importance: ImportanceMatrix | None,
    names: Mapping[str, tuple[str, int]],
    progress: Progress,
) -> list[TensorError]:
    """The error of every tensor. checkpoint: the weights that were encoded; names: see encode_modules.ModuleEncoder.

    Raises ConvertError for a tensor that is absent, has another shape or scales that are not finite, decodes to
    something that is not finite, differs although it is kept, or is further from the source
    than zeros; and for scales of caches that are absent or no positive number.
    """
    artifact.cache_scales()
    errors = []
    total, done = sum(int(np.prod(shape)) * 4 for _, shape in artifact.tensors.values()), 0
    for name, (format_name, shape) in artifact.tensors.items():
        kept = artifact.scheme(name) is None
        sums = np.zeros(4)  # squared error, squared weight, and both weighted
        columns = _columns(importance, names.get(name))
        for stored, source in zip(artifact.blocks(name), checkpoint.blocks(name), strict=True):
            decoded = stored.reshape(source.shape)
            if kept and not np.array_equal(decoded, _rounded(source, format_name)):
                raise _failed(name, f"is not what the source is in {format_name}", directory)
            if not np.isfinite(decoded).all():
                raise _failed(name, "decodes to values that are not finite", directory)
            sums += _sums(decoded, source, columns)
        relative, weighted = (sums[i] / sums[i + 1] if sums[i + 1] else float(sums[i] > 0) for i in (0, 2))
        if weighted > 1:
            raise _failed(name, f"is further from the source than zeros are (weighted error {weighted:.3g})", directory)
        errors.append(TensorError(name, format_name, float(relative), float(weighted)))
        done += int(np.prod(shape)) * 4
        progress("verify", done, total, "B")
    return errors


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as a kept tensor of this dtype holds them."""
    encode, decode = KEPT_CODECS[dtype]
    return decode(encode(values.reshape(-1, values.shape[-1]))).reshape(values.shape)


def _columns(importance: ImportanceMatrix | None, place: tuple[str, int] | None) -> np.ndarray | None:
    if importance is None or place is None or place[0] not in importance.names:
        return None
    return importance.columns(place[0])[place[1]]


def _sums(decoded: np.ndarray, source: np.ndarray, columns: np.ndarray | None) -> np.ndarray:
    """Squared error and squared weights, both plain and weighted by columns: float64 [4]."""
    squares = [
        np.square(of, dtype=np.float64).reshape(-1, of.shape[-1]).sum(axis=0) for of in (decoded - source, source)
    ]
    return np.array([of.sum() for of in squares] + [of.sum() if columns is None else of @ columns for of in squares])


def _failed(name: str, what: str, directory: Path) -> ConvertError:
    return ConvertError(
        f"verification failed: the tensor {name} {what}",
        str(directory),
        "convert again with --fresh; if it fails again, report it with the model's name and this message",
    )
