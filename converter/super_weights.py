"""The stage `super weights`: looks for them in a checkpoint, and remembers what was found."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calibration.control import ShouldStop
from calibration.corpus import Corpus, load_corpus
from calibration.fisher import FisherFactors
from calibration.importance import ImportanceMatrix
from calibration.super_weights import SuperWeightReport
from converter.analyse import measured_factors
from converter.calibrate import calibration_text, load_tokenizer, runnable
from converter.checkpoint import Checkpoint
from converter.job import Job
from converter.kept import is_kept
from converter.model_map import read_rows
from converter.progress import Progress
from converter.report import table
from converter.verify import artifact_tensors
from formats.errors import ConvertError
from formats.seals import write_sealed
from profiles.vocabulary import DOWN_ROLES, ModelMap

RESULT = "super_weights.json"

# Samples of the calibration text that are looked at beside the fixed prompts, and the text on which removals are
# measured: a thousand positions tell 0.01 nats from nothing.
_LOOKED_AT = 8
_MEASURED_SAMPLES, _MEASURED_LENGTH = 8, 256


def look_for_super_weights(
    job: Job,
    checkpoint: Checkpoint,
    model_map: ModelMap,
    work_dir: Path,
    progress: Progress,
    should_stop: ShouldStop,
    factors: FisherFactors | None = None,
) -> SuperWeightReport:
    """What the job's model has of super weights, by spikes and, where the Fisher factors are known, by gradients. It
    stays in the work directory and is not looked for again by the same criteria."""
    result = work_dir / RESULT
    known = is_kept(result, "record of super weights", progress)
    if not known or (factors is not None and "gradients" not in load_super_weights(result).criteria):
        from calibration.spikes import PROMPT_LENGTH, DownProjection, prompt_tokens
        from calibration.super_weight_search import find_super_weights

        running, running_map = runnable(checkpoint, model_map, work_dir)
        tokenizer = load_tokenizer(running.location)
        samples = calibration_text(job, tokenizer, model_map, _LOOKED_AT, PROMPT_LENGTH + 1)
        report = find_super_weights(
            running,
            running.location,
            [
                DownProjection(source, tensor.layer, tensor.name, matrix)
                for tensor in running_map.tensors
                if tensor.role in DOWN_ROLES and tensor.layer is not None
                for matrix, source in enumerate(tensor.sources)
            ],
            prompt_tokens(tokenizer, samples.tokens, samples.tokens.shape[1] - 1),
            measuring_text(job, tokenizer),
            factors=factors,
            model=checkpoint.model_id,
            revision=checkpoint.revision,
            work_dir=work_dir / "super-weights",
            device=job.device,
            threads=job.n_threads,
            progress=progress,
            should_stop=should_stop,
        )
        write_sealed(result, "record of super weights", report.to_json().encode())
    return load_super_weights(result)


def load_super_weights(path: Path) -> SuperWeightReport:
    """What an earlier search has left."""
    return SuperWeightReport.from_json(path.read_text(encoding="utf-8"), str(path))


def known_super_weights(
    job: Job,
    checkpoint: Checkpoint,
    model_map: ModelMap,
    importance: ImportanceMatrix | None,
    work_dir: Path,
    progress: Progress,
    should_stop: ShouldStop,
) -> SuperWeightReport:
    """What the importance says of them, or else what a search finds. Raises ConvertError for a report of another
    model."""
    if importance is not None and importance.super_weights is not None:
        check_super_weights(importance.super_weights, checkpoint, model_map)
        return importance.super_weights
    factors = measured_factors(job, work_dir)
    return look_for_super_weights(job, checkpoint, model_map, work_dir, progress, should_stop, factors)


def measuring_text(job: Job, tokenizer: Any) -> Corpus:
    """The text on which it is measured what super weights and their protection are worth."""
    length = min(_MEASURED_LENGTH, job.sequence_length)
    return load_corpus(job.calibration, tokenizer, _MEASURED_SAMPLES, length, job.seed, split="test")


def check_super_weights(report: SuperWeightReport, checkpoint: Checkpoint, model_map: ModelMap) -> None:
    """Refuse a report of another model: its weights are not where the report says.

    Raises ConvertError naming the first that contradicts.
    """
    specs = {tensor.name: tensor for tensor in model_map.tensors if tensor.role in DOWN_ROLES}
    for weight in report.weights:
        spec, has = specs.get(weight.tensor), None
        if spec is not None:
            n_rows = spec.n_rows // spec.n_matrices
            if weight.matrix < spec.n_matrices and weight.row < n_rows and weight.column < spec.n_columns:
                row = weight.matrix * n_rows + weight.row
                has = float(read_rows(checkpoint, spec, row, row + 1)[0, weight.column])
        if has != weight.value:
            raise ConvertError(
                f"the super weights are of another model: {weight.tensor}[{weight.row},{weight.column}] is"
                f" {weight.value:g} there and {'absent' if has is None else f'{has:g}'} here",
                report.where,
                "look for them in this model: convert imatrix --super-weights MODEL",
            )


def super_weight_coverage(
    report: SuperWeightReport | None, paths: list[Path], model_map: ModelMap, tolerance: float
) -> dict[str, Any] | None:
    """How many confirmed super weights come out of the artifact, decoded by the `gguf` package, within the tolerance:
    plain data; None where nobody has looked for them.

    A weight of a rescaled column counts as the network uses it, its factor made up for.
    """
    if report is None:
        return None
    stored, rows = artifact_tensors(paths), []
    for weight in report.weights:
        spec = model_map.tensor(weight.tensor)
        row = weight.matrix * (spec.n_rows // spec.n_matrices) + weight.row
        back = 1 / math.prod(
            part.factor
            for part in spec.rescaled
            if part.axis == "column" and (part.matrix, part.index) == (weight.matrix, weight.column)
        )
        decoded = float(stored[weight.tensor].decode(row, row + 1)[0, weight.column]) * back
        place = {key: getattr(weight, key) for key in ("tensor", "matrix", "row", "column", "value")}
        rows.append((place, decoded))
    return coverage(rows, tolerance)


def coverage(decoded: Sequence[tuple[dict[str, Any], float]], tolerance: float) -> dict[str, Any]:
    """Plain data of super weights, each with its place and value, and what it is decoded to."""
    rows = []
    for place, value in decoded:
        error = abs(value - place["value"]) / abs(place["value"])
        rows.append({**place, "decoded": value, "relative_error": error, "within": error <= tolerance})
    return {
        "confirmed": len(rows),
        "within": sum(row["within"] for row in rows),
        "tolerance": tolerance,
        "weights": rows,
    }


def super_weight_lines(report: dict[str, Any] | None) -> list[str]:
    """What was found, for people; report: SuperWeightReport.to_json as plain data."""
    if report is None:
        return ["super weights: nobody has looked; `convert imatrix --super-weights MODEL` does"]
    looked = (
        f"looked {report['looks']} times at {report['prompts']} sequences of {report['prompt_length']} tokens, for"
        f" weights whose row and column spike to {report['spike_ratio']:g} times the median"
    )
    measured = ""
    if report["perplexity"] is not None:
        measured = (
            f"removals measured on {report['samples']} x {report['sequence_length']} tokens of {report['corpus']},"
            f" perplexity {report['perplexity']:.3f}; confirmed from {report['least_divergence']:g} nats on"
        )
    if not report["weights"]:
        lines = [f"super weights: none; {len(report['rejected'])} candidates", looked]
        spikes = [
            [str(s["layer"]), f"{s['row']} x{s['row_ratio']:.1f}", f"{s['column']} x{s['column_ratio']:.1f}"]
            for s in report["largest_spikes"]
        ]
        return [*lines, *filter(None, [measured]), "", table(["layer", "largest row", "largest column"], spikes)]
    rows = [_weight_row(weight, "yes") for weight in report["weights"]]
    rows += [_weight_row(weight, "no") for weight in report["rejected"]]
    header = ["tensor", "expert", "row", "column", "value", "without: KLD", "loss", "row x", "column x", "confirmed"]
    lines = [f"super weights: {len(report['weights'])}", looked, measured, "", table(header, rows)]
    for found in report["joint_sets"]:
        places = ", ".join(f"{m['tensor']}[{m['row']},{m['column']}]" for m in found["members"])
        lines.append(f"together ({found['why']}): KLD {found['divergence_when_removed']:.4f} without {places}")
    if report["untried"]:
        lines.append(f"{report['untried']} weaker candidates were not tried")
    return lines


def _weight_row(weight: dict[str, Any], confirmed: str) -> list[str]:
    return [
        weight["tensor"],
        *(str(weight[key]) for key in ("matrix", "row", "column")),
        f"{weight['value']:.4g}",
        f"{weight['divergence_when_removed']:.4f}",
        f"{weight['loss_when_removed']:+.4f}",
        f"{weight['row_ratio']:.0f}",
        f"{weight['column_ratio']:.0f}",
        confirmed,
    ]
