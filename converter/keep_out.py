"""Super weights in a safetensors directory: matrices that hold them are kept out of quantization, if that is asked for.

The other ways of profiles.protection are not for schemes: nothing in their bytes is pinned, and smoothing scales
channels already. At 4 bits and more super weights come out right by themselves wherever importance is known, so nobody
looks unless asked.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from calibration.control import ShouldStop
from calibration.importance import ImportanceMatrix
from calibration.super_weights import SuperWeightReport
from converter.checkpoint import Checkpoint
from converter.directory_artifact import DirectoryArtifact
from converter.job import Job
from converter.modules import stored_dtypes
from converter.progress import Progress
from converter.super_weights import coverage, known_super_weights
from converter.target import Prepared
from formats.errors import ConvertError
from profiles.modules import given_schemes
from profiles.precision import UNQUANTIZED
from profiles.vocabulary import ModelMap


class KeptOut(NamedTuple):
    """report: what is known of super weights, None where nobody looked. decisions: of tensors, for report.json."""

    prepared: Prepared
    report: SuperWeightReport | None
    decisions: list[dict[str, Any]]


def refuse_other_ways(job: Job) -> None:
    """Raises ConvertError for a protection that directories do not have."""
    mode = job.protection.super_weights
    if mode not in ("auto", "off", "exclude"):
        raise ConvertError(
            f"{mode} protects super weights in a GGUF, and the profile {job.profile.name!r} makes a directory",
            "--protect-super-weights",
            "use exclude, which keeps the matrices that hold them in 16 bits",
        )


def keeps_out(job: Job) -> bool:
    return job.protection.super_weights == "exclude"


def keep_out(
    prepared: Prepared,
    importance: ImportanceMatrix | None,
    work_dir: Path,
    progress: Progress,
    should_stop: ShouldStop,
) -> KeptOut:
    """The job with a plan that keeps the matrices of super weights in the checkpoint's 16 bits, with all that are
    multiplied as one with them. What was found stays in the work directory.

    Raises ConvertError for a report of another model.
    """
    if not keeps_out(prepared.job):
        return KeptOut(prepared, None, [])
    job, checkpoint, model_map = prepared.job, prepared.checkpoint, prepared.model_map
    report = known_super_weights(job, checkpoint, model_map, importance, work_dir, progress, should_stop)
    places: dict[str, list[str]] = {}
    for weight in report.weights:
        source, row = stored_place(model_map, checkpoint, weight.tensor, weight.matrix, weight.row)
        places.setdefault(source, []).append(f"{row},{weight.column}")
    why = {name: f"super weight {'; '.join(of)} kept out of quantization" for name, of in places.items()}
    plan = given_schemes(
        prepared.plan, {name: (UNQUANTIZED, text) for name, text in why.items()}, stored_dtypes(checkpoint)
    )
    decisions = [{"tensor": name, "action": "exclude", "why": text} for name, text in why.items()]
    return KeptOut(replace(prepared, plan=plan), report, decisions)


def stored_place(model_map: ModelMap, checkpoint: Checkpoint, tensor: str, matrix: int, row: int) -> tuple[str, int]:
    """Where a row of a GGUF tensor's matrix is stored: the checkpoint's tensor, and the row in it."""
    spec = model_map.tensor(tensor)
    rows = spec.n_rows // spec.n_matrices
    row += matrix * rows
    for source in spec.sources:
        if row < checkpoint.tensors[source].n_rows:
            return source, row
        row -= checkpoint.tensors[source].n_rows
    raise IndexError(f"row {row} of {tensor}")


def directory_coverage(
    report: SuperWeightReport | None,
    artifact: DirectoryArtifact,
    checkpoint: Checkpoint,
    model_map: ModelMap,
    tolerance: float,
) -> dict[str, Any] | None:
    """How many super weights come out of the directory within the tolerance of what was encoded, smoothed or not."""
    if report is None:
        return None
    rows = []
    for weight in report.weights:
        source, row = stored_place(model_map, checkpoint, weight.tensor, weight.matrix, weight.row)
        value = float(checkpoint.read(source, row, row + 1)[0, weight.column])
        decoded = float(
            np.reshape(artifact.read(source), (-1, checkpoint.tensors[source].n_columns))[row, weight.column]
        )
        place = {"tensor": source, "matrix": weight.matrix, "row": row, "column": weight.column, "value": value}
        rows.append((place, decoded))
    return coverage(rows, tolerance)
