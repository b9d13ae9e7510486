"""What would stop the job later, found in the first seconds: before any download of weights and any long work."""

import os
import shutil
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from bitwright.calibration.control import work_bytes
from bitwright.calibration.sensitivity.fisher import gradient_work_bytes
from bitwright.calibration.statistics.second_moments import moment_bytes
from bitwright.converter.artifact.feedback import moment_widths
from bitwright.converter.artifact.layout import Files
from bitwright.converter.artifact.run import Run
from bitwright.converter.job.job import SAMPLES_RANGE
from bitwright.converter.measure.evidence import ANALYSIS_SAMPLES, ANALYSIS_SEQUENCE_LENGTH
from bitwright.converter.measure.obstacles import Need, check_runs
from bitwright.converter.measure.statistics_directory import gives_importance
from bitwright.converter.model.stored_rows import read_rows
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.blocks.ternary import lossless_rows
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import make_directory
from bitwright.formats.registry import get_format
from bitwright.profiles.planning.plan import Plan
from bitwright.profiles.sizes import size_text

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


def preflight(run: Run, files: Files, collects_moments: bool, needs: Collection[Need]) -> None:
    """Raises ConvertError for the first thing that would stop the job. Architecture, tokenizer and profile have been
    checked by then: there would be no model map and no plan otherwise. collects_moments: second moments of the inputs
    are collected. needs: what the model is run for."""
    check_runs(run.checkpoint, needs, run.model_map.predicts_tokens)
    _check_writable(run.output.parent, "--output")
    _check_writable(run.work_dir, "--work-dir")
    needed = demand(run, files, collects_moments, bool(needs))
    _check_space(needed.disk)
    _check_memory(needed.memory, bool(_widths(run, collects_moments)))
    if needs:
        _check_device_memory(run, _widths(run, collects_moments), needs)


def ternary_warning(checkpoint: Checkpoint, plan: Plan) -> str | None:
    """What to tell when much of a model that was not trained ternary goes into ternary formats; None otherwise.

    A few rows of each such tensor are encoded to see what is lost: rows that are ternary already lose nothing.
    """
    damaged, errors = 0, []
    for planned in plan.tensors:
        if planned.format not in _TERNARY:
            continue
        rows = read_rows(checkpoint, planned.tensor, 0, min(_SAMPLED_ROWS, planned.tensor.n_rows))
        block_format = get_format(planned.format)
        if not lossless_rows(rows, block_format.block_size).all():
            damaged += planned.tensor.n_weights
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


@dataclass(frozen=True)
class Demand:
    """What a job takes at most. memory: bytes of the layer stream, or of what runs the model. disk: (for what, where,
    bytes) each; what an earlier run has written of the artifact already counts as there."""

    memory: int
    disk: tuple[tuple[str, Path, int], ...]

    @property
    def disk_bytes(self) -> int:
        return sum(n_bytes for _, _, n_bytes in self.disk)


def demand(run: Run, files: Files, collects_moments: bool, runs: bool) -> Demand:
    """collects_moments: as of preflight. runs: whether the model is run."""
    widths = _widths(run, collects_moments)
    return Demand(_memory(run, widths, runs), _disk(run, files, widths, runs))


def _widths(run: Run, collects_moments: bool) -> list[list[int]]:
    """Of the inputs whose second moments are kept, by layer."""
    in_sequence = run.job.in_sequence and run.job.feedback is not None
    return [*moment_widths(run.model_map).values()] if collects_moments or in_sequence else []


def _memory(run: Run, widths: list[list[int]], runs: bool) -> int:
    """Of the layer stream, by far the largest: one layer computes in float32 while the next one loads. A GGUF is read
    by transformers as a whole."""
    weights: Counter[int | None] = Counter()
    for tensor in run.model_map.tensors:
        weights[tensor.layer] += tensor.n_weights
    # Tuned, a layer is there in its two parts as well, with the gradients of each thread's sample.
    copies = 2 if not run.job.tune else 7 + run.job.n_threads
    streamed = copies * max((n for layer, n in weights.items() if layer is not None), default=0)
    resident = 0 if not runs else streamed if run.checkpoint.location.is_dir() else sum(weights.values())
    # Square matrices of a layer's inputs: three sums that are still to be added up, what each thread has just made, and
    # what waits for its turn.
    squares = max((sum(n * n for n in layer) for layer in widths), default=0) * (4 + run.job.n_threads)
    return 4 * (resident + squares)


def _check_device_memory(run: Run, widths: list[list[int]], needs: Collection[Need]) -> None:
    """A GPU's memory: one layer has to fit beside the sums of its inputs, and the output head by itself, of the source
    and of the artifact at once. Where there is no room for the next layer it waits."""
    from bitwright.calibration.stream.build import choose_device, choose_dtype
    from bitwright.calibration.stream.device.memory import free_bytes

    device = choose_device(run.job.device)
    free = free_bytes(device)
    if free is None:
        return
    calibrated = choose_dtype(run.job.calibration_dtype, device).itemsize
    layers: Counter[int] = Counter()
    for tensor in run.model_map.tensors:
        if tensor.layer is not None:
            layers[tensor.layer] += tensor.n_weights
    layer = max(layers.values(), default=0)
    head = max((t.n_weights for t in run.model_map.tensors if t.layer is None), default=0)
    # Three sums of a layer that are still to be added up, those of a micro-batch and their product, float32.
    squares = 5 * 4 * max((sum(n * n for n in layer) for layer in widths), default=0)
    needed = calibrated * max(layer, head) + squares
    if Need.QUALITY in needs:  # in float32
        needed = max(needed, 4 * layer, 2 * 4 * head)
    if needed > free:
        raise ConvertError(
            f"{size_text(free)} of the {device.type} device's memory are free, and running this model a layer at a time"
            f" takes {size_text(needed)}",
            "--device",
            "end other programs on the GPU, or compute with --device cpu",
        )


def _disk(run: Run, files: Files, widths: list[list[int]], runs: bool) -> tuple[tuple[str, Path, int], ...]:
    job, model_map = run.job, run.model_map
    written = sum(path.stat().st_size for path in files.growing if path.exists())
    # Before there is a plan, the artifact is as large as its budget says.
    budget = job.profile.budget
    expected = files.n_bytes or (budget.size if budget is not None else None) or 0
    width = int(run.checkpoint.config.get("hidden_size", 0))
    calibrates = not gives_importance(job) or bool(widths)
    states = work_bytes(job.samples, job.sequence_length, width) if calibrates else 0
    if job.profile.needs_sensitivity and job.sensitivity is None:
        states += gradient_work_bytes(ANALYSIS_SAMPLES, ANALYSIS_SEQUENCE_LENGTH, width, model_map.n_layers)
    restored = 0 if run.checkpoint.location.is_dir() or not runs else 4 * sum(t.n_weights for t in model_map.tensors)
    moments = sum(map(moment_bytes, widths))
    if job.in_sequence and widths:  # those of one layer at a time; the encoded layers wait until all are there
        moments = max(map(moment_bytes, widths)) + expected
    return (
        ("the artifact", run.output.parent, expected - written),
        ("the work directory", run.work_dir, states + restored + moments + _SMALL_FILES),
    )


def _check_memory(needed: int, collects_moments: bool) -> None:
    available = psutil.virtual_memory().available
    if needed > available:
        raise ConvertError(
            f"{size_text(available)} of memory are available, and running this model takes {size_text(needed)}",
            "the calibration and the quality report",
            "use a machine with more, or run no model here: --imatrix FILE --judge off"
            + (", or add --no-error-feedback" if collects_moments else ""),
        )


def _check_space(needs: Sequence[tuple[str, Path, int]]) -> None:
    """Disk space by stage."""
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
