"""What would stop the job later, found in the first seconds: before any download of weights and any long work."""

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import psutil

from calibration.fisher import gradient_work_bytes
from calibration.importance import work_bytes
from calibration.second_moments import moment_bytes
from converter.analyse import ANALYSIS_SAMPLES, ANALYSIS_SEQUENCE_LENGTH
from converter.checkpoint import Checkpoint
from converter.feedback import moment_widths
from converter.job import SAMPLES_RANGE, Job
from converter.model_map import read_rows
from converter.progress import size_text
from converter.target import Layout
from formats.errors import ConvertError
from formats.files import make_directory
from formats.registry import get_format
from formats.ternary import lossless_rows
from profiles.plan import Plan
from profiles.vocabulary import ModelMap

_TERNARY = ("TQ1_0", "TQ2_0", "Q2_0", "Q1_0")
_SAMPLED_ROWS = 16
# The share of a model's weights from which on losing them is losing the model.
_MUCH = 0.2

# Statistics, journals and reports beside the larger things that are counted one by one.
_SMALL_FILES = 64 << 20


def check_samples(samples: int, sequence_length: int) -> None:
    low, high = SAMPLES_RANGE
    if not low <= samples <= high:
        raise ConvertError(
            f"{samples} calibration samples are outside of {low} to {high}",
            "--samples",
            f"fewer than {low} leave columns unseen, more than {high} change nothing measurable",
        )
    if sequence_length < 2:
        raise ConvertError(f"a sequence of {sequence_length} tokens predicts nothing", "--sequence-length", "use 512")


def refuse_activation_options(job: Job) -> None:
    """Raises ConvertError for options of activations where they are not quantized: in a GGUF."""
    options = {"--alpha": job.alpha, "--activation-scales": job.activation_scales}
    given = ", ".join(option for option, value in options.items() if value is not None)
    if given and job.profile.target == "gguf":
        raise ConvertError(
            f"the profile {job.profile.name!r} writes a GGUF, whose activations nothing quantizes beforehand",
            given,
            "leave it out, or name a profile for a safetensors directory, see `convert profiles list`",
        )


def preflight(
    job: Job,
    checkpoint: Checkpoint,
    model_map: ModelMap,
    layouts: list[Layout],
    partial_files: list[Path],
    feeds_back: bool,
) -> None:
    """Raises ConvertError for the first thing that would stop the job. Architecture, tokenizer and profile have been
    checked by then: there would be no model map and no plan otherwise. feeds_back: second moments are collected."""
    assert job.output is not None and job.work_dir is not None
    _check_writable(job.output.parent, "--output")
    _check_writable(job.work_dir, "--work-dir")
    widths = [*moment_widths(model_map).values()] if feeds_back else []
    _check_space(job, checkpoint, model_map, layouts, partial_files, widths)
    _check_memory(job, checkpoint, model_map, widths)


def ternary_warning(checkpoint: Checkpoint, plan: Plan) -> str | None:
    """What to tell when much of a model that was not trained ternary goes into ternary formats; None otherwise.

    A few rows of each such tensor are encoded to see what is lost: rows that are ternary already lose nothing.
    """
    damaged, errors = 0, []
    for planned in plan.tensors:
        if planned.format not in _TERNARY:
            continue
        rows = read_rows(checkpoint, planned.tensor, 0, min(_SAMPLED_ROWS, planned.tensor.n_rows))
        if not lossless_rows(rows).all():
            damaged += planned.tensor.n_weights
            block_format = get_format(planned.format)
            decoded = block_format.decode(block_format.encode(rows, None, plan.effort))
            errors.append(float(np.square(decoded - rows).sum() / max(np.square(rows).sum(), 1e-30)))
    if damaged < _MUCH * plan.n_weights:
        return None
    return (
        f"{damaged / plan.n_weights:.0%} of the weights go into ternary formats, and they are not ternary: about"
        f" {np.mean(errors):.0%} of their energy will be lost, which no ordinary model survives; these formats are for"
        " models trained that way. --profile mlp-low-precision keeps this one usable"
    )


def _check_writable(directory: Path, option: str) -> None:
    existing = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConvertError("the directory cannot be written", str(existing), f"name another place with {option}")
    make_directory(directory, f"use {option}")


def _check_memory(job: Job, checkpoint: Checkpoint, model_map: ModelMap, widths: list[list[int]]) -> None:
    """Memory of the layer stream, by far the largest: one layer computes in float32 while the next one loads. A GGUF is
    read by transformers as a whole. widths: of a layer's inputs whose second moments are kept."""
    weights: Counter[int | None] = Counter()
    for tensor in model_map.tensors:
        weights[tensor.layer] += tensor.n_weights
    streamed = 2 * max((n for layer, n in weights.items() if layer is not None), default=0)
    measures = job.profile.needs_sensitivity and job.sensitivity is None
    runs = job.quality or job.imatrix is None or measures or bool(widths)
    resident = 0 if not runs else streamed if checkpoint.location.is_dir() else sum(weights.values())
    # Square matrices of a layer's inputs: the sums, and what each thread has just added up.
    squares = max((sum(n * n for n in layer) for layer in widths), default=0) * (1 + job.n_threads)
    needed, available = 4 * (resident + squares), psutil.virtual_memory().available
    if needed > available:
        raise ConvertError(
            f"{size_text(available)} of memory are available, and running this model takes {size_text(needed)}",
            "the calibration and the quality report",
            "use a machine with more, or run no model here: --imatrix FILE --no-quality"
            + (", or leave out --error-feedback" if widths else ""),
        )


def _check_space(
    job: Job,
    checkpoint: Checkpoint,
    model_map: ModelMap,
    layouts: list[Layout],
    partial_files: list[Path],
    widths: list[list[int]],
) -> None:
    """Disk space by stage; what an earlier run has written of the artifact already counts as there."""
    assert job.output is not None and job.work_dir is not None
    written = sum(path.stat().st_size for path in partial_files if path.exists())
    # Before there is a plan, the artifact is as large as its budget says.
    budget = job.profile.budget
    expected = sum(layout.n_bytes for layout in layouts) or (budget.size if budget is not None else None) or 0
    needs = [("the artifact", job.output.parent, expected - written)]
    width = int(checkpoint.config.get("hidden_size", 0))
    calibrates = job.imatrix is None or bool(widths)
    states = work_bytes(job.samples, job.sequence_length, width) if calibrates else 0
    if job.profile.needs_sensitivity and job.sensitivity is None:
        states += gradient_work_bytes(ANALYSIS_SAMPLES, ANALYSIS_SEQUENCE_LENGTH, width, model_map.n_layers)
    restored = 0 if checkpoint.location.is_dir() else 4 * sum(t.n_weights for t in model_map.tensors)
    moments = sum(map(moment_bytes, widths))
    needs.append(("the work directory", job.work_dir, states + restored + moments + _SMALL_FILES))
    by_device: dict[int, list[tuple[str, Path, int]]] = {}
    for need in needs:
        by_device.setdefault(os.stat(need[1]).st_dev, []).append(need)
    for entries in by_device.values():
        needed = sum(n_bytes for _, _, n_bytes in entries)
        free = shutil.disk_usage(entries[0][1]).free
        if needed > free:
            parts = ", ".join(f"{size_text(n_bytes)} for {what}" for what, _, n_bytes in entries)
            raise ConvertError(
                f"the disk has {size_text(free)} free, and this job needs {size_text(needed)} ({parts})",
                str(entries[0][1]),
                "make room, or use another disk with --output and --work-dir",
            )
