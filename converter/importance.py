"""The command `convert imatrix`: an importance matrix of its own, or one file format turned into the other."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from gguf import Keys

from calibration.activation_file import save_activations
from calibration.control import ShouldStop
from calibration.imatrix_file import load_imatrix, save_imatrix
from calibration.sensitivity import load_sensitivity, save_sensitivity
from converter import DEFAULT_PROFILE
from converter.analyse import measure_sensitivity
from converter.calibrate import calibrate
from converter.checkpoint import Checkpoint
from converter.job import (
    REPLACEABLE,
    Job,
    WorkDirectory,
    calibration_file_sha256,
    default_work_dir,
    stops_cleanly,
    tool_identity,
)
from converter.model_map import describe
from converter.options import build_job
from converter.ownership import (
    Replaceable,
    bring_back,
    check_free,
    check_places,
    check_replaceable,
    inputs_of,
    locked_output,
)
from converter.preflight import check_samples
from converter.progress import Progress
from converter.sensitivity import CANDIDATE_FORMATS
from converter.smooth import observe
from converter.source import open_checkpoint
from converter.super_weights import known_super_weights
from formats.errors import ConvertError
from formats.gguf_file import read_gguf


def is_imatrix(path: Path) -> bool:
    """Whether the file is an importance matrix: a .dat, or a GGUF that says so."""
    if path.suffix == ".dat":
        return path.is_file()
    if path.suffix != ".gguf" or not path.is_file():
        return False
    return read_gguf(path).value(Keys.General.TYPE, str) == "imatrix"


def write_importance(
    model: str,
    output: Path,
    progress: Progress,
    should_stop: ShouldStop,
    *,
    super_weights: bool = False,
    sensitivity: bool = False,
    activations: bool = False,
    fresh: bool = False,
    **options: Any,
) -> list[Path]:
    """Write the importance matrix of a model, or a matrix that exists in the format of the output's suffix; returns the
    files that were written.

    super_weights: look for them too, and keep with the matrix what was found. sensitivity: measure what every format
    costs every tensor too, and write it beside the output, with the suffix .sensitivity.safetensors. activations: write
    statistics of the matrices' inputs instead. fresh: start over in a work directory that holds other work, and replace
    what has the output's name. options: fields of converter.job.Job.
    Raises ConvertError; the same call continues an interrupted computation.
    """
    if activations:
        _check_activations(model, output, super_weights or sensitivity)
    if super_weights and output.suffix == ".dat":
        raise ConvertError("a .dat file cannot hold super weights", str(output), "name a file that ends in .gguf")
    written = [output, *([output.with_suffix(".sensitivity.safetensors")] if sensitivity else [])]
    if is_imatrix(Path(model)):
        _convert_file(Path(model), output, progress, super_weights or sensitivity, fresh)
        return [output]
    work_dir = options.pop("work_dir", None) or default_work_dir(output)
    job = build_job(model, DEFAULT_PROFILE, output=output, work_dir=work_dir, **options)
    check_samples(job.samples, job.sequence_length)
    checkpoint = open_checkpoint(model, metadata_only=True)
    model_map = describe(checkpoint)
    check_places(inputs_of(job, checkpoint), written, work_dir)
    work = WorkDirectory(work_dir)
    with work.locked(), locked_output(output), stops_cleanly(work_dir, job.command):
        checkpoint = checkpoint.with_weights()
        replaceable = _claim(work, job, checkpoint, written, fresh)
        if activations:
            statistics = observe(job, checkpoint, model_map, work_dir, progress, should_stop)
            save_activations(output, statistics, replaceable.put)
            return written
        importance = calibrate(job, checkpoint, model_map, work_dir, progress, should_stop)
        if sensitivity:
            measured = measure_sensitivity(
                job, checkpoint, model_map, importance, CANDIDATE_FORMATS, work_dir, progress, should_stop
            )
            save_sensitivity(written[1], load_sensitivity(measured), replaceable.put)
        if super_weights:
            found = known_super_weights(job, checkpoint, model_map, None, work_dir, progress, should_stop)
            importance = replace(importance, super_weights=found)
        save_imatrix(output, importance, replaceable.put)
        return written


def _claim(work: WorkDirectory, job: Job, checkpoint: Checkpoint, written: list[Path], fresh: bool) -> Replaceable:
    """Take the work directory for this computation; what may be replaced of the files that it writes."""
    if fresh:
        for path in written:
            bring_back(path, Replaceable(work.path / REPLACEABLE))
            check_replaceable(path, directory=False)
        work.clear()
    replaceable = Replaceable(work.path / REPLACEABLE)
    if not fresh:
        check_free(written, replaceable)
    fingerprint = {
        "tool": tool_identity(),
        "model": checkpoint.model_id,
        "files": [list(entry) for entry in checkpoint.files()],
        "calibration": job.calibration,
        "calibration_file": calibration_file_sha256(job),
        "samples": job.samples,
        "sequence_length": job.sequence_length,
        "seed": job.seed,
        "chat": job.chat,
        "device": job.device,
        "calibration_dtype": job.calibration_dtype,
    }
    work.claim(fingerprint, fresh)
    if fresh:
        replaceable.allow(written)
    return replaceable


def _check_activations(model: str, output: Path, more: bool) -> None:
    if output.suffix != ".safetensors":
        raise ConvertError(
            "activation statistics are kept in a safetensors file", str(output), "name one that ends in .safetensors"
        )
    if more:
        raise ConvertError(
            "super weights and sensitivity go with the importance matrix, not with activation statistics",
            "--activations",
            "run the command once with --activations, and once with the others",
        )
    if is_imatrix(Path(model)):
        raise ConvertError(
            "activation statistics are of a model, and this is a file of importance", model, "give the model"
        )


def _convert_file(path: Path, output: Path, progress: Progress, more: bool, fresh: bool) -> None:
    if more:
        raise ConvertError(
            "super weights and sensitivity are found in a model, and this is a file of importance",
            str(path),
            "give the model",
        )
    check_places([path], [output])
    replaceable = Replaceable()
    if fresh:
        check_replaceable(output, directory=False)
        replaceable.allow([output])
    importance = load_imatrix(path)
    if importance.super_weights is not None and output.suffix == ".dat":
        progress.say("a .dat file cannot hold super weights: what is known of them stays behind")
    save_imatrix(output, importance, replaceable.put)
