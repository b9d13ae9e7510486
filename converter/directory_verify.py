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
        decoded, source = artifact.read(name), checkpoint.read(name).reshape(shape)
        if artifact.scheme(name) is None and not np.array_equal(decoded, _rounded(source, format_name)):
            raise _failed(name, f"is not what the source is in {format_name}", directory)
        if not np.isfinite(decoded).all():
            raise _failed(name, "decodes to values that are not finite", directory)
        errors.append(_error(name, format_name, decoded, source, _columns(importance, names.get(name)), directory))
        done += decoded.nbytes
        progress("verify", done, total, "B")
    return errors


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as a kept tensor of this dtype holds them."""
    encode, decode = KEPT_CODECS[dtype]
    columns = values.shape[-1] if values.ndim else 1
    return decode(encode(np.ascontiguousarray(values).reshape(-1, columns))).reshape(values.shape)


def _columns(importance: ImportanceMatrix | None, place: tuple[str, int] | None) -> np.ndarray | None:
    if importance is None or place is None or place[0] not in importance.names:
        return None
    return importance.columns(place[0])[place[1]]


def _error(
    name: str,
    format_name: str,
    decoded: np.ndarray,
    source: np.ndarray,
    columns: np.ndarray | None,
    directory: Path,
) -> TensorError:
    decoded = decoded.reshape(-1, decoded.shape[-1] if decoded.ndim else 1)
    source = source.reshape(decoded.shape)
    squared_error = np.square(decoded - source, dtype=np.float64).sum(axis=0)
    squared_weight = np.square(source, dtype=np.float64).sum(axis=0)
    weights = np.ones(decoded.shape[1]) if columns is None else columns
    sums = [squared_error.sum(), squared_weight.sum(), squared_error @ weights, squared_weight @ weights]
    relative, weighted = (sums[i] / sums[i + 1] if sums[i + 1] else float(sums[i] > 0) for i in (0, 2))
    if weighted > 1:
        raise _failed(name, f"is further from the source than zeros are (weighted error {weighted:.3g})", directory)
    return TensorError(name, format_name, float(relative), float(weighted))


def _failed(name: str, what: str, directory: Path) -> ConvertError:
    return ConvertError(
        f"verification failed: the tensor {name} {what}",
        str(directory),
        "convert again with --fresh; if it fails again, report it with the model's name and this message",
    )
