"""The command `bitwright imatrix`: an importance matrix of its own, or one file format turned into the other."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from bitwright.calibration.control import ShouldStop
from bitwright.calibration.sensitivity.table import save_sensitivity
from bitwright.calibration.statistics.activation_file import save_activations
from bitwright.calibration.statistics.imatrix_file import is_imatrix, load_imatrix, save_imatrix
from bitwright.converter.artifact.naming import default_imatrix_name
from bitwright.converter.artifact.ownership import (
    Replaceable,
    bring_back,
    check_free,
    check_places,
    check_replaceable,
    inputs_of,
    locked_output,
)
from bitwright.converter.artifact.run import Run
from bitwright.converter.job.build import build_job
from bitwright.converter.job.defaults import DEFAULT_PROFILE
from bitwright.converter.job.identity import job_fingerprint
from bitwright.converter.job.progress import Progress
from bitwright.converter.job.work_directory import REPLACEABLE, WorkDirectory, default_work_dir, stops_cleanly
from bitwright.converter.measure.activations import streamed_activations
from bitwright.converter.measure.calibrate import MOMENTS, streamed_importance
from bitwright.converter.measure.dtype import with_decided_dtype
from bitwright.converter.measure.evidence import streamed_sensitivity
from bitwright.converter.measure.sensitivity import CANDIDATE_FORMATS
from bitwright.converter.measure.super_weights import given_or_streamed_super_weights
from bitwright.converter.model.model_map import describe
from bitwright.converter.preflight import check_samples
from bitwright.converter.record.log import LOG_FILE
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import remove_tree


def write_importance(
    model: str,
    output: Path | None,
    progress: Progress,
    should_stop: ShouldStop,
    *,
    super_weights: bool = False,
    sensitivity: bool = False,
    activations: bool = False,
    moments: bool = False,
    fresh: bool = False,
    **options: Any,
) -> list[Path]:
    """Write the importance matrix of a model, or a matrix that exists in the format of the output's suffix; returns the
    files that were written.

    output: None for MODEL.imatrix.gguf in the current directory. super_weights: look for them too, and keep with the
    matrix what was found. sensitivity: measure what every format costs every tensor too, and write it beside the
    output, with the suffix .sensitivity.safetensors. activations: write statistics of the matrices' inputs instead.
    moments: collect second moments in the same pass, which stay in the cache.
    fresh: start over in a work directory that holds other work, and replace what has the output's name. options: fields
    of converter.job.job.Job.
    Raises ConvertError; the same call continues an interrupted computation.
    """
    if activations:
        _check_activations(model, output, super_weights or sensitivity)
    if super_weights and output is not None and output.suffix == ".dat":
        raise ConvertError("a .dat file cannot hold super weights", str(output), "name a file that ends in .gguf")
    if is_imatrix(Path(model)):
        if output is None:
            raise ConvertError(
                "the other format is that of the output's suffix", model, "add --output FILE.dat or .gguf"
            )
        _convert_file(Path(model), output, progress, super_weights or sensitivity, fresh)
        return [output]
    job = build_job(model, DEFAULT_PROFILE, output=output, **options)
    check_samples(job.samples, job.sequence_length)
    checkpoint = open_checkpoint(model, metadata_only=True, from_quantized=job.from_quantized, base=job.base)
    model_map = describe(checkpoint)
    output = output or Path(default_imatrix_name(checkpoint, model_map))
    written = [output, *([output.with_suffix(".sensitivity.safetensors")] if sensitivity else [])]
    work_dir = job.work_dir or default_work_dir(output)
    job = replace(job, output=output, work_dir=work_dir)
    run = Run(job, output, work_dir, checkpoint, model_map, progress, should_stop)
    check_places(inputs_of(run), written, work_dir)
    work = WorkDirectory(work_dir)
    with work.locked(), locked_output(output):
        checkpoint = checkpoint.with_weights()
        run = with_decided_dtype(replace(run, checkpoint=checkpoint), {} if fresh else work.description())
        replaceable = _claim(work, run, written, fresh)
        with progress.logged(work_dir / LOG_FILE), stops_cleanly(work_dir, job.command):
            if activations:
                with progress.stage("activations"):
                    save_activations(output, streamed_activations(run), replaceable.put)
                return written
            with progress.stage("calibrate"):
                importance = streamed_importance(run, work_dir / MOMENTS if moments else None)
                remove_tree(work_dir / MOMENTS)
            if sensitivity:
                with progress.stage("analyse"):
                    table = streamed_sensitivity(run, importance, CANDIDATE_FORMATS)
                    save_sensitivity(written[1], table, replaceable.put)
            if super_weights:
                with progress.stage("super weights"):
                    importance = replace(importance, super_weights=given_or_streamed_super_weights(run, None))
            save_imatrix(output, importance, replaceable.put)
    return written


def _claim(work: WorkDirectory, run: Run, written: list[Path], fresh: bool) -> Replaceable:
    """Take the work directory for this computation; what may be replaced of the files that it writes."""
    if fresh:
        for path in written:
            bring_back(path, Replaceable(work.path / REPLACEABLE))
            check_replaceable(path, directory=False)
        work.clear()
    replaceable = Replaceable(work.path / REPLACEABLE)
    if not fresh:
        check_free(written, replaceable)
    work.claim(job_fingerprint(run.job, run.checkpoint, "imatrix"), fresh)
    if fresh:
        replaceable.allow(written)
    return replaceable


def _check_activations(model: str, output: Path | None, more: bool) -> None:
    if output is None or output.suffix != ".safetensors":
        raise ConvertError(
            "activation statistics are kept in a safetensors file",
            "--activations" if output is None else str(output),
            "name one that ends in .safetensors: --output FILE.safetensors",
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
