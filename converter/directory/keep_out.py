"""Super weights in a safetensors directory: matrices that hold them are kept out of quantization, if that is asked for.

The other ways of profiles.planning.protect are not for schemes: nothing in their bytes is pinned, and smoothing scales
channels already. At 4 bits and more super weights come out right by themselves wherever importance is known, so nobody
looks unless asked.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from bitwright.calibration.statistics.super_weights import SuperWeight, SuperWeightReport
from bitwright.converter.artifact.run import Run
from bitwright.converter.artifact.super_weights import DecodedWeight, coverage
from bitwright.converter.artifact.target import Prepared
from bitwright.converter.directory.artifact import DirectoryArtifact
from bitwright.converter.job.job import Job
from bitwright.converter.measure.super_weights import given_or_streamed_super_weights
from bitwright.converter.model.module_map import stored_dtypes
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.profiles.planning.plan_modules import ModulePlan, given_schemes
from bitwright.profiles.planning.precision import UNQUANTIZED
from bitwright.profiles.vocabulary import ModelMap


class KeptOut(NamedTuple):
    """report: what is known of super weights, None where nobody looked. decisions: of tensors, for report.json."""

    prepared: Prepared[ModulePlan]
    report: SuperWeightReport | None
    decisions: tuple[dict[str, Any], ...]


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


def keep_out(prepared: Prepared[ModulePlan]) -> KeptOut:
    """The job with a plan that keeps the matrices of super weights in the checkpoint's 16 bits, with all that are
    multiplied as one with them. What was found stays in the work directory.

    Raises ConvertError for a report of another model.
    """
    run = prepared.run
    if not keeps_out(run.job):
        return KeptOut(prepared, None, ())
    report = given_or_streamed_super_weights(run, prepared.importance)
    places: dict[str, list[str]] = {}
    for weight in report.weights:
        source, row = stored_place(run.model_map, run.checkpoint, weight)
        places.setdefault(source, []).append(f"{row},{weight.column}")
    why = {name: f"super weight {'; '.join(where)} kept out of quantization" for name, where in places.items()}
    changes = {name: (UNQUANTIZED, text) for name, text in why.items()}
    plan = given_schemes(prepared.plan, changes, stored_dtypes(run.checkpoint))
    decisions = tuple({"tensor": name, "action": "exclude", "why": text} for name, text in why.items())
    return KeptOut(replace(prepared, plan=plan), report, decisions)


def stored_place(model_map: ModelMap, checkpoint: Checkpoint, weight: SuperWeight) -> tuple[str, int]:
    """Where a super weight is stored: the checkpoint's tensor, and the row in it."""
    spec = model_map.tensor(weight.tensor)
    row = weight.row + weight.matrix * (spec.n_rows // spec.n_matrices)
    for source in spec.sources:
        if row < checkpoint.tensors[source].n_rows:
            return source, row
        row -= checkpoint.tensors[source].n_rows
    raise IndexError(f"row {row} of {weight.tensor}")


def directory_coverage(
    report: SuperWeightReport | None, artifact: DirectoryArtifact, run: Run
) -> dict[str, Any] | None:
    """How many super weights come out of the directory within the tolerance of what was encoded, smoothed or not."""
    checkpoint = run.checkpoint

    def decode(weight: SuperWeight) -> DecodedWeight:
        source, row = stored_place(run.model_map, checkpoint, weight)
        value = float(checkpoint.read(source, row, row + 1)[0, weight.column])
        rows = np.reshape(artifact.read(source), (-1, checkpoint.tensors[source].n_columns))
        return DecodedWeight(source, weight.matrix, row, weight.column, value, float(rows[row, weight.column]))

    return coverage(report, decode, run.job.protection.tolerance)
