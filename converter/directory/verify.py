"""The stage `verify` of a safetensors directory: every tensor, decoded from the files, against what was encoded."""

from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np

from bitwright.calibration.control import OnProgress
from bitwright.calibration.places import MatrixNames
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.converter.artifact.tensor_errors import (
    DecodedTensor,
    Part,
    TensorError,
    measure_errors,
    verification_failed,
)
from bitwright.converter.directory.artifact import DirectoryArtifact
from bitwright.converter.directory.encode import column_importance
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.registry import get_format


def verify_directory(
    directory: Path,
    artifact: DirectoryArtifact,
    checkpoint: Checkpoint,
    importance: ImportanceMatrix | None,
    names: MatrixNames,
    progress: OnProgress,
    threads: int = 1,
) -> list[TensorError]:
    """The error of every tensor, on so many threads. checkpoint: the weights that were encoded; names: see
    encode.ModuleEncoder.

    Raises ConvertError for a tensor that is absent, has another shape or scales that are not finite, decodes to
    something that is not finite, differs although it is kept, or is further from the source
    than zeros; and for scales of caches that are absent or no positive number.
    """
    artifact.cache_scales()

    def parts(name: str, format_name: str) -> Iterator[Part]:
        kept = artifact.scheme(name) is None
        columns = column_importance(importance, names.get(name))
        for stored, source in zip(artifact.blocks(name), checkpoint.blocks(name), strict=True):
            decoded = stored.reshape(source.shape)
            if kept and not np.array_equal(decoded, _rounded(source, format_name)):
                raise verification_failed(name, f"is not what the source is in {format_name}", str(directory))
            yield Part(decoded, source, columns)

    tensors = [
        DecodedTensor(name, format_name, prod(shape), parts(name, format_name))
        for name, (format_name, shape) in artifact.tensors.items()
    ]
    return measure_errors(tensors, str(directory), progress, threads)


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as a kept tensor of this dtype holds them."""
    kept = get_format(dtype)
    return kept.decode(kept.encode(values.reshape(-1, values.shape[-1]))).reshape(values.shape)
