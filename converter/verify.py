"""The stage `verify`: every tensor of the artifact, decoded by the `gguf` package, against the checkpoint.

The decoder is not ours on purpose: a mistake that encoder and decoder share would go unseen.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from gguf import Keys

from calibration.importance import ImportanceMatrix
from converter.checkpoint import Checkpoint
from converter.model_map import read_rows, restore, row_spans
from converter.progress import Progress
from converter.recipe import RESCALED_KEY
from converter.rescaling import rescale_importance
from formats.errors import ConvertError
from formats.gguf_file import EncodedTensor, read_gguf
from profiles.vocabulary import ModelMap, Rescaled, TensorSpec

_CHUNK_WEIGHTS = 1 << 22
_LOSSLESS = ("F32",)
_MOST_SHARDS = 99999  # their numbers have five digits


@dataclass(frozen=True)
class TensorError:
    """A tensor's error: mean squared error over mean squared weight, and the same weighted by importance."""

    tensor: str
    format: str
    relative_error: float
    weighted_error: float

    def to_dict(self) -> dict:
        return asdict(self)


def artifact_tensors(paths: list[Path]) -> dict[str, EncodedTensor]:
    """The tensors of an artifact's files by name, second-level scales joined to the tensor they belong to.

    Raises ConvertError for a damaged file or a tensor held twice.
    """
    tensors: dict[str, EncodedTensor] = {}
    for path in paths:
        for tensor in read_gguf(path).tensors:
            if tensor.name in tensors:
                raise ConvertError(f"the tensor {tensor.name!r} is there twice", str(path), "write the artifact again")
            tensors[tensor.name] = tensor
    for name in [name for name in tensors if name.endswith(".scale")]:
        weight = f"{name.removesuffix('.scale')}.weight"
        if weight in tensors:
            scales = tensors.pop(name).decode(0, 1)[0]
            tensors[weight] = replace(tensors[weight], scales=tuple(scales.tolist()))
    return tensors


def artifact_files(path: Path) -> list[Path]:
    """All files of the artifact that begins with this one: itself, or every shard. A missing shard is an error."""
    count = read_gguf(path).value(Keys.Split.LLM_KV_SPLIT_COUNT, int) or 1
    if count == 1:
        return [path]
    if not 1 < count <= _MOST_SHARDS:
        raise ConvertError(f"the file names itself one of {count} shards", str(path), "write the artifact again")
    stem = path.name.removesuffix(f"-00001-of-{count:05d}.gguf")
    paths = [path.with_name(f"{stem}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    for shard in paths:
        if not shard.exists():
            raise ConvertError(
                "a shard of the artifact is missing", str(shard), "name the first shard, beside all others"
            )
    return paths


def as_stored(model_map: ModelMap, paths: list[Path]) -> ModelMap:
    """The map with those rows and columns rescaled of which the artifact says so.

    Raises ConvertError for a damaged record.
    """
    record = read_gguf(paths[0]).value(f"bitwright.{RESCALED_KEY}", str)
    if record is None:
        return model_map
    try:
        recorded = json.loads(record)
        tensors = [replace(t, rescaled=_rescaled(t, recorded.get(t.name, []))) for t in model_map.tensors]
    except (ValueError, TypeError, AttributeError) as error:
        raise ConvertError(
            f"the artifact's record of rescaled rows is damaged ({error})", str(paths[0]), "write the artifact again"
        ) from None
    return replace(model_map, tensors=tuple(tensors))


def _rescaled(spec: TensorSpec, recorded: list) -> tuple[Rescaled, ...]:
    """Raises ValueError or TypeError for what is outside of the tensor."""
    found = tuple(Rescaled(axis, int(matrix), int(index), float(factor)) for axis, matrix, index, factor in recorded)
    sizes = {"row": spec.n_rows // spec.n_matrices, "column": spec.n_columns}
    for part in found:
        inside = 0 <= part.matrix < spec.n_matrices and 0 <= part.index < sizes.get(part.axis, 0)
        if not inside or not np.isfinite(part.factor) or part.factor == 0:
            raise ValueError(f"{spec.name} has no {part.axis} {part.index}, or a factor of {part.factor}")
    return found


def verify(
    paths: list[Path],
    checkpoint: Checkpoint,
    model_map: ModelMap,
    importance: ImportanceMatrix | None,
    progress: Progress,
) -> list[TensorError]:
    """The error of every tensor. Raises ConvertError for a tensor that is absent, has another shape, decodes to
    something that is not finite, differs although its format is lossless, or is further from the source than zeros."""
    stored = artifact_tensors(paths)
    errors = []
    done, total = 0, sum(tensor.n_weights for tensor in model_map.tensors) * 4
    for spec in model_map.tensors:
        check_stored(stored, spec, paths)
        errors.append(_tensor_error(stored[spec.name], spec, checkpoint, importance, paths))
        done += spec.n_weights * 4
        progress("verify", done, total, "B")
    for name in stored.keys() - {spec.name for spec in model_map.tensors}:
        raise ConvertError(f"the artifact has a tensor that the model has not: {name}", str(paths[0]), "write it again")
    return errors


def check_stored(stored: dict[str, EncodedTensor], spec: TensorSpec, paths: list[Path]) -> None:
    """Refuse an artifact in which the tensor is absent or has another shape, or scales that the runtime leaves out."""
    if spec.name not in stored or stored[spec.name].shape != spec.shape:
        found = list(stored[spec.name].shape) if spec.name in stored else "nothing"
        raise ConvertError(
            f"the artifact is of another model: {spec.name} should be {list(spec.shape)}, and there is {found}",
            ", ".join(map(str, paths)),
            "name the model that this artifact was made from",
        )
    if stored[spec.name].scales and not spec.scale_applied:
        raise ConvertError(
            f"{spec.name} has second-level scales, which llama.cpp does not apply there: it computes another model",
            ", ".join(map(str, paths)),
            "convert the model again",
        )


def _tensor_error(
    tensor: EncodedTensor,
    spec: TensorSpec,
    checkpoint: Checkpoint,
    importance: ImportanceMatrix | None,
    paths: list[Path],
) -> TensorError:
    columns = None
    if importance is not None and spec.name in importance.names:
        columns = rescale_importance(spec.rescaled, importance.columns(spec.name))
    sums = np.zeros(4)  # squared error, squared weight, and both weighted
    for matrix, start, stop in row_spans(spec, _CHUNK_WEIGHTS):
        source = read_rows(checkpoint, spec, start, stop)
        decoded = tensor.decode(start, stop)
        if not np.isfinite(decoded).all():
            raise _failed(spec, "decodes to values that are not finite", paths)
        if tensor.ggml_type.name in _LOSSLESS and not np.array_equal(decoded, source):
            raise _failed(spec, f"differs from the source although {tensor.ggml_type.name} is lossless", paths)
        squared_error = np.square(decoded - source, dtype=np.float64).sum(axis=0)
        squared_weight = np.square(source, dtype=np.float64).sum(axis=0)
        weights = np.ones(spec.n_columns) if columns is None else columns[matrix]
        sums += [squared_error.sum(), squared_weight.sum(), squared_error @ weights, squared_weight @ weights]
    relative, weighted = (sums[i] / sums[i + 1] if sums[i + 1] else float(sums[i] > 0) for i in (0, 2))
    if weighted > 1:
        raise _failed(spec, f"is further from the source than zeros are (weighted error {weighted:.3g})", paths)
    return TensorError(spec.name, tensor.ggml_type.name, float(relative), float(weighted))


def _failed(spec: TensorSpec, what: str, paths: list[Path]) -> ConvertError:
    return ConvertError(
        f"verification failed: the tensor {spec.name} {what}",
        ", ".join(map(str, paths)),
        "convert again with --fresh; if it fails again, report it with the model's name and this message",
    )


class DecodedArtifact:
    """An artifact's weights under the checkpoint's names, as the source of a layer stream.

    stored: the artifact's own tensors, by name.
    Raises ConvertError when a tensor of the model is absent from the artifact or has another shape.
    """

    def __init__(self, paths: list[Path], model_map: ModelMap):
        self.stored = artifact_tensors(paths)
        for spec in model_map.tensors:
            check_stored(self.stored, spec, paths)
        self.tensors = {
            source: (spec, matrix) for spec in model_map.tensors for matrix, source in enumerate(spec.sources)
        }

    def read(self, name: str) -> np.ndarray:
        """The checkpoint's tensor of that name, decoded: float32 in its own shape."""
        spec, matrix = self.tensors[name]
        rows = spec.n_rows // spec.n_matrices
        decoded = self.stored[spec.name].decode(matrix * rows, (matrix + 1) * rows)
        one = replace(spec, shape=spec.shape[-2:], sources=(name,))
        return restore(one, decoded)[name]
