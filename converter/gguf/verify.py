"""The stage `verify`: every tensor of the artifact, decoded by the `gguf` package, against the checkpoint.

The decoder is not ours on purpose: a mistake that encoder and decoder share would go unseen.
"""

import json
import re
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import Keys

from bitwright.calibration.control import OnProgress
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.converter.artifact.candidate import Candidate
from bitwright.converter.artifact.tensor_errors import (
    DecodedTensor,
    Part,
    TensorError,
    measure_errors,
    verification_failed,
)
from bitwright.converter.gguf.folding.record import KEY as FOLDING_KEY
from bitwright.converter.gguf.folding.record import folder_of
from bitwright.converter.job.recipe import RESCALED_KEY
from bitwright.converter.model.rescaled import rescale_importance
from bitwright.converter.model.stored_rows import CHUNK_WEIGHTS, read_rows, restore_part, row_spans, source_shape
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.gguf import EncodedTensor, GgufFile, read_gguf
from bitwright.formats.quantized.ggml_rows import GgmlRows
from bitwright.formats.schemes import row_chunks
from bitwright.profiles.vocabulary import ModelMap, Rescaled, TensorSpec

_LOSSLESS = ("F32",)
_MOST_SHARDS = 99999  # their numbers have five digits


def artifact_tensors(paths: list[Path], own: Collection[str] = ()) -> dict[str, EncodedTensor]:
    """The tensors of an artifact's files by name, second-level scales joined to the tensor they belong to. own: names
    of the model's own tensors, of which one may be called a scale, too.

    Raises ConvertError for a damaged file or a tensor held twice.
    """
    tensors: dict[str, EncodedTensor] = {}
    for path in paths:
        for tensor in read_gguf(path).tensors:
            if tensor.name in tensors:
                raise ConvertError(f"the tensor {tensor.name!r} is there twice", str(path), "write the artifact again")
            tensors[tensor.name] = tensor
    for name in [name for name in tensors if name.endswith(".scale") and name not in own]:
        weight = f"{name.removesuffix('.scale')}.weight"
        if weight in tensors:
            scales = tensors.pop(name).decode(0, 1)[0]
            tensors[weight] = replace(tensors[weight], scales=tuple(scales.tolist()))
    return tensors


def artifact_files(path: Path) -> list[Path]:
    """All files of the artifact that this is, or is a shard of. A missing shard is an error."""
    return files_of(read_gguf(path))


def files_of(file: GgufFile) -> list[Path]:
    """The same of a file that has been read."""
    path = file.path
    count = file.value(Keys.Split.LLM_KV_SPLIT_COUNT, int) or 1
    if count == 1:
        return [path]
    if not 1 < count <= _MOST_SHARDS:
        raise ConvertError(f"the file names itself one of {count} shards", str(path), "write the artifact again")
    stem = re.sub(rf"-\d{{5}}-of-{count:05d}$", "", path.stem)
    paths = [path.with_name(f"{stem}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    for shard in paths:
        if not shard.exists():
            raise ConvertError(
                "a shard of the artifact is missing", str(shard), "put it back beside the others, under its own name"
            )
    return paths


def as_stored(checkpoint: Checkpoint, model_map: ModelMap, paths: list[Path]) -> tuple[Checkpoint, ModelMap]:
    """The checkpoint folded as the artifact says, and the map with those rows and columns rescaled of which it says so.

    Raises ConvertError for a damaged record.
    """
    file = read_gguf(paths[0])
    if (folding := file.value(FOLDING_KEY, str)) is not None:
        checkpoint = folder_of(checkpoint, model_map, folding, str(paths[0])).view()
    record = file.value(f"bitwright.{RESCALED_KEY}", str)
    if record is None:
        return checkpoint, model_map
    try:
        recorded = json.loads(record)
        tensors = [replace(t, rescaled=_rescaled(t, recorded.get(t.name, []))) for t in model_map.tensors]
    except (ValueError, TypeError, AttributeError) as error:
        raise ConvertError(
            f"the artifact's record of rescaled rows is damaged ({error})", str(paths[0]), "write the artifact again"
        ) from None
    return checkpoint, replace(model_map, tensors=tuple(tensors))


def _rescaled(spec: TensorSpec, recorded: list[Any]) -> tuple[Rescaled, ...]:
    """Raises ValueError or TypeError for what is outside of the tensor."""
    parts = tuple(Rescaled(axis, int(matrix), int(index), float(factor)) for axis, matrix, index, factor in recorded)
    sizes = {"row": spec.n_rows // spec.n_matrices, "column": spec.n_columns}
    for part in parts:
        inside = 0 <= part.matrix < spec.n_matrices and 0 <= part.index < sizes.get(part.axis, 0)
        if not inside or not np.isfinite(part.factor) or part.factor == 0:
            raise ValueError(f"{spec.name} has no {part.axis} {part.index}, or a factor of {part.factor}")
    return parts


def verify(
    paths: list[Path],
    checkpoint: Checkpoint,
    model_map: ModelMap,
    importance: ImportanceMatrix | None,
    progress: OnProgress,
    threads: int = 1,
) -> list[TensorError]:
    """The error of every tensor, on so many threads.

    Raises ConvertError for a tensor that is absent, has another shape, decodes to something that is not finite, differs
    although its format is lossless, or is further from the source than zeros."""
    stored = artifact_tensors(paths, {spec.name for spec in model_map.tensors})
    for spec in model_map.tensors:
        check_stored(stored, spec, paths)
    where = ", ".join(map(str, paths))

    def parts(spec: TensorSpec) -> Iterator[Part]:
        tensor, columns = stored[spec.name], None
        if importance is not None and spec.name in importance.names:
            columns = rescale_importance(spec.rescaled, importance.columns(spec.name))
        for matrix, start, stop in row_spans(spec, CHUNK_WEIGHTS):
            source, decoded = read_rows(checkpoint, spec, start, stop), tensor.decode(start, stop)
            finite = np.isfinite(decoded).all()  # what is not is told by measure_errors
            if tensor.ggml_type.name in _LOSSLESS and finite and not np.array_equal(decoded, source):
                what = f"differs from the source although {tensor.ggml_type.name} is lossless"
                raise verification_failed(spec.name, what, where)
            yield Part(decoded, source, None if columns is None else columns[matrix])

    tensors = [
        DecodedTensor(spec.name, stored[spec.name].ggml_type.name, spec.n_weights, parts(spec))
        for spec in model_map.tensors
    ]
    errors = measure_errors(tensors, where, progress, threads)
    for name in stored.keys() - {spec.name for spec in model_map.tensors}:
        raise ConvertError(f"the artifact has a tensor that the model has not: {name}", str(paths[0]), "write it again")
    return errors


def check_stored(stored: dict[str, EncodedTensor], spec: TensorSpec, paths: list[Path]) -> None:
    """Refuse an artifact in which the tensor is absent or has another shape, or scales that the runtime leaves out."""
    if spec.name not in stored or stored[spec.name].shape != spec.shape:
        shape = list(stored[spec.name].shape) if spec.name in stored else "nothing"
        raise ConvertError(
            f"the artifact is of another model: {spec.name} should be {list(spec.shape)}, and there is {shape}",
            ", ".join(map(str, paths)),
            "name the model that this artifact was made from",
        )
    if stored[spec.name].scales and not spec.scale_applied:
        raise ConvertError(
            f"{spec.name} has second-level scales, which llama.cpp does not apply there: it computes another model",
            ", ".join(map(str, paths)),
            "convert the model again",
        )


def gguf_candidate(paths: list[Path], model_map: ModelMap, threads: int) -> Candidate:
    """A GGUF as something to run. paths: all shards, the first one first. model_map: of the checkpoint that runs.
    threads: that decode it."""
    return Candidate(DecodedArtifact(paths, model_map, threads), artifact=paths[0])


class DecodedArtifact:
    """An artifact's weights under the checkpoint's names, as the source of a layer stream. Our own decoders read them,
    on so many threads; that they read what the runtime does, the stage `agreement` shows.

    stored: the artifact's own tensors, by name.
    Raises ConvertError when a tensor of the model is absent from the artifact or has another shape.
    """

    def __init__(self, paths: list[Path], model_map: ModelMap, threads: int = 1):
        self.threads = threads
        self.stored = artifact_tensors(paths, {spec.name for spec in model_map.tensors})
        for spec in model_map.tensors:
            check_stored(self.stored, spec, paths)
        self.tensors: dict[str, list[tuple[TensorSpec, int]]] = {}
        for spec in model_map.tensors:
            for i, source in enumerate(spec.sources):
                self.tensors.setdefault(source, []).append((spec, i))

    def read(self, name: str) -> np.ndarray:
        """The checkpoint's tensor of that name, decoded: float32 in its own shape. What no tensor of the artifact has
        of it is NaN."""
        whole = np.full(source_shape(self.tensors[name][0][0]), np.nan, np.float32)
        for spec, i in self.tensors[name]:
            n_rows = spec.n_rows // len(spec.sources)
            restore_part(spec, self._decode(spec, i * n_rows, (i + 1) * n_rows), whole)
        return whole

    def _decode(self, spec: TensorSpec, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of the tensor: float32 [stop - start, n_columns]."""
        stored, rows = GgmlRows(self.stored[spec.name]), np.empty((stop - start, spec.n_columns), np.float32)

        def decode(span: tuple[int, int]) -> None:
            first, last = span
            rows[first:last] = stored.rows(spec.name, start + first, start + last)

        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(decode, row_chunks.row_spans(stop - start, spec.n_columns, CHUNK_WEIGHTS)))
        return rows
