"""What the artifact is, before it is written: its name, its key-values with the recipe inside, its exact layout."""

from dataclasses import replace
from typing import Any

from gguf import GGML_QUANT_VERSION, Keys
from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue

from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.converter.artifact.feedback import wants_feedback
from bitwright.converter.artifact.naming import file_type
from bitwright.converter.artifact.run import Run
from bitwright.converter.gguf.folding.record import KEY as FOLDING_KEY
from bitwright.converter.job.job import Job
from bitwright.converter.job.recipe import PROTECTION_RESERVE, importance_name, recipe
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.files.gguf import GgufLayout, TensorEntry, lay_out
from bitwright.formats.registry import FORMATS, get_format
from bitwright.profiles.planning.fallbacks import fitting_format
from bitwright.profiles.planning.labels import mix_of
from bitwright.profiles.planning.plan import Plan
from bitwright.profiles.vocabulary import ModelMap


def artifact_metadata(
    job: Job, checkpoint: Checkpoint, model_map: ModelMap, plan: Plan, importance: ImportanceMatrix | None
) -> dict[str, GGUFValue]:
    """The model's key-values, then how it was quantized: llama.cpp's own keys, and the recipe under `bitwright.`.

    importance: what the encoders use, or the identity it will have; only its identity and entry count are read, so the
    result has the same length before and after the calibration. Nothing here depends on paths, dates or threads.
    """

    def string(value: str) -> GGUFValue:
        return GGUFValue(value, GGUFValueType.STRING)

    metadata = dict(model_map.metadata)
    metadata[Keys.General.FILE_TYPE] = GGUFValue(file_type(mix_of(plan)).value, GGUFValueType.UINT32)
    metadata[Keys.General.QUANTIZATION_VERSION] = GGUFValue(GGML_QUANT_VERSION, GGUFValueType.UINT32)
    metadata[Keys.General.QUANTIZED_BY] = string("bitwright")
    if importance is not None:
        metadata["quantize.imatrix.file"] = string(importance_name(job))
        metadata["quantize.imatrix.dataset"] = string(importance.corpus or "unknown")
        for key, n in (("entries_count", len(importance.sums)), ("chunks_count", importance.samples or 0)):
            metadata[f"quantize.imatrix.{key}"] = GGUFValue(n, GGUFValueType.INT32)
    for key, value in recipe(job, checkpoint, plan, importance).items():
        metadata[f"bitwright.{key}"] = GGUFValue(value, _kind(value))
    if plan.folding:
        metadata[FOLDING_KEY] = string(plan.folding)
    return metadata


def _kind(value: str | int | float) -> GGUFValueType:
    if isinstance(value, str):
        return GGUFValueType.STRING
    if isinstance(value, float):
        return GGUFValueType.FLOAT64
    return GGUFValueType.UINT32 if value < 1 << 32 else GGUFValueType.UINT64


def artifact_layout(file: str, metadata: dict[str, GGUFValue], plan: Plan, shard_bytes: int | None) -> list[GgufLayout]:
    """The files to write, to the byte."""
    entries = [
        TensorEntry(p.tensor.name, p.tensor.shape, get_format(p.format).ggml_type, p.n_bytes) for p in plan.tensors
    ]
    return lay_out(file, metadata, entries, shard_bytes)


def gguf_layouts(run: Run, plan: Plan, importance: ImportanceMatrix | None) -> list[GgufLayout]:
    """The files of the run's artifact, to the byte. importance: as of artifact_metadata."""
    metadata = artifact_metadata(run.job, run.checkpoint, run.model_map, plan, importance)
    return artifact_layout(run.output.name, metadata, plan, run.job.shard_bytes)


def counted_bytes(run: Run, plan: Plan, importance: ImportanceMatrix | None, folding: str) -> int:
    """What a budget counts a plan with: its files, as error feedback and folded factors are recorded in them, and room
    for the record of super weights. folding: a record as long as it will be."""
    reserve = 0 if run.job.protection.super_weights == "off" else PROTECTION_RESERVE
    fed = replace(plan, error_feedback=run.job.feedback, folding=folding)
    return sum(layout.n_bytes for layout in gguf_layouts(run, fed, importance)) + reserve


def as_encoded(job: Job, plan: Plan, folding: str) -> Plan:
    """The plan with the job's error feedback, where the format of a matrix takes any, and with room for folded factors,
    where a matrix is encoded under importance. folding: as of counted_bytes."""
    takes = any(map(wants_feedback, plan.tensors))
    return replace(
        plan, error_feedback=job.feedback if takes else None, folding=folding if plan.uses_importance else ""
    )


def uniform_sizes(model_map: ModelMap) -> list[dict[str, Any]]:
    """Bytes of tensor data of the model in each format throughout, and the share of quantized weights that fit it.

    What does not fit becomes what a plan would make of it; what is never quantized stays in F32,
    and what is of unknown use as it is.
    """
    rows = []
    for wanted in FORMATS.values():
        n_bytes = n_fitting = n_weights = 0
        for tensor in model_map.tensors:
            chosen = FORMATS[tensor.kept or "F32"]
            if tensor.quantizable:
                chosen = fitting_format(wanted, tensor.n_columns)
            n_bytes += tensor.n_rows * chosen.row_bytes(tensor.n_columns)
            if tensor.quantizable:
                n_weights += tensor.n_weights
                n_fitting += tensor.n_weights if chosen is wanted else 0
        rows.append({"format": wanted.name, "bytes": n_bytes, "fits": n_fitting / n_weights if n_weights else 0.0})
    return rows
