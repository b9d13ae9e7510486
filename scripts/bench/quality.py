"""llama.cpp's recipes beside ours at the same size: KL divergence, measured by llama.cpp on a text of its own.

For each of llama.cpp's file types the model is written several times, at the size of the recipe's own file:

recipe       llama.cpp's mix of types, as llama-quantize writes it
allocation   types chosen by measured sensitivity under the recipe's size, with the codes of ggml's C encoder
codes        the same types with our codes
weighed      the same with columns weighed by what an error in them costs, as where a conversion measures sensitivity
quick        with error feedback
best         with the longer feedback
folding      quick, and channels scaled against each other, as a conversion has it by default
sequential   the same under the artifact's own inputs
tuned        the same, and the scales of every layer tuned (64 steps)
refined      instead, with two rounds of refinement
protected    instead, with what protects super weights as far as it is measured to help

All have the same importance. Texts and measure are those of bench.kld; results go into a file of JSON lines, and the
same command continues there.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from bitwright.calibration.sensitivity.table import load_sensitivity
from bitwright.calibration.statistics.imatrix_file import load_imatrix
from bitwright.converter import convert
from bitwright.converter.job.job import Job
from bitwright.converter.preparation import prepare
from bitwright.formats.files.journal import append_line, read_lines
from bitwright.profiles.reading.schema import QuantizationProfile, load_profile, parse_profile
from scripts.bench.kld import (
    CACHE,
    CALIBRATION_SAMPLES,
    CALIBRATION_TEXTS,
    EVALUATION_TEXT,
    SEQUENCE_LENGTH,
    Score,
    Source,
    default_importance,
    ggmls_codes,
    packaged_text,
    score,
    write_profile,
    write_text,
)
from scripts.peers.mixes import FILE_TYPES, Mixes
from scripts.smollm2 import build

STEPS = (
    *("recipe", "allocation", "codes", "weighed", "quick", "best", "folding", "sequential", "tuned", "refined"),
    "protected",
)
# Options of the conversions that are one step each.
CONVERSIONS: dict[str, dict[str, Any]] = {
    "quick": {"error_feedback": "quick", "folding": False},
    "best": {"error_feedback": "best", "folding": False},
    "folding": {"error_feedback": "quick"},
    "sequential": {"error_feedback": "quick", "sequential": True},
    "tuned": {"error_feedback": "quick", "tune": 64},
    "refined": {"refine": 2, "error_feedback": "off", "folding": False},
    "protected": {"protect_super_weights": "auto", "error_feedback": "off", "folding": False},
}
CACHE_SIZE = 64 << 30
"""Bytes; the second moments of a model of 1.5 billion weights take 5 GB, which all its conversions share."""
DEFAULT_TYPES = "IQ1_S,IQ2_XXS,IQ2_M,IQ3_XXS,Q3_K_M,Q4_K_M"


@dataclass(frozen=True)
class Result:
    file_type: str
    step: str
    chunks: int
    bytes: int
    score: Score
    kld_error: float
    seconds: float

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> "Result":
        return Result(**fields | {"score": Score(**fields["score"])})


def profile_of(formats: dict[str, str], name: str) -> QuantizationProfile:
    """The profile that names the format of every tensor."""
    rules = "".join(f'[[rule]]\ntensors = ["{tensor}"]\nformat = "{f}"\n' for tensor, f in formats.items())
    return parse_profile(f'description = ""\ngood_for = ""\nbase = "F16"\n{rules}', name, "bench.quality")


class Bench:
    """One model with its importance, its sensitivity, and its own predictions of the text."""

    def __init__(self, model: Path, chunks: int, length: int, directory: Path):
        self.model, self.length, self.directory = model, length, directory
        self.imatrix = default_importance(model, sensitivity=True, length=length)
        self.sensitivity = self.imatrix.with_suffix(".sensitivity.safetensors")
        self.importance = load_imatrix(self.imatrix)
        self.costs = load_sensitivity(self.sensitivity).factors.columns
        self.source = Source(model, packaged_text(EVALUATION_TEXT), chunks, directory)
        self.mixes = Mixes(model, self.imatrix, directory)

    def steps(self, file_type: str, wanted: set[str]) -> Iterator[Result]:
        """The steps that are wanted, in order."""

        def measured(step: str, write: Callable[[], Path]) -> Result:
            began = time.monotonic()
            path = write()
            seconds, n_bytes, positions = time.monotonic() - began, path.stat().st_size, self.source.evaluate(path)
            path.unlink()
            error = float(positions[1].std(ddof=1) / np.sqrt(positions.shape[1]))
            return Result(file_type, step, len(self.source.chunks), n_bytes, score(positions), error, seconds)

        mix = self.directory / "mix.gguf"
        limit = self.mixes.write(file_type, mix).stat().st_size
        if "recipe" in wanted:
            yield measured("recipe", lambda: self.mixes.write(file_type, mix))
        if wanted & {"allocation", "codes", "weighed"}:
            chosen = self._chosen(limit)
            writers = {
                "allocation": lambda: self._by_ggml(chosen),
                "codes": lambda: self._written(profile_of(chosen, "allocated")),
                "weighed": lambda: self._written(profile_of(chosen, "allocated"), weighed=True),
            }
            for step, write in writers.items():
                if step in wanted:
                    yield measured(step, write)
        for step, changed in CONVERSIONS.items():
            if step in wanted:
                yield measured(step, partial(self._converted, limit, **changed))

    def _chosen(self, limit: int) -> dict[str, str]:
        """The format of every matrix of the best choice of this size."""
        job = Job(
            str(self.model),
            load_profile("budget"),
            imatrix=self.imatrix,
            sensitivity=self.sensitivity,
            target_size=limit,
            protect_super_weights="off",
            output=self.directory / "planned.gguf",
        )
        return {p.tensor.name: p.format for p in prepare(job).plan.tensors if len(p.tensor.shape) > 1}

    def _written(self, profile: QuantizationProfile, weighed: bool = False) -> Path:
        importance = self.importance.with_costs(self.costs if weighed else {})
        return write_profile(self.model, profile, "best", importance, self.directory / "model.gguf")

    def _by_ggml(self, formats: dict[str, str]) -> Path:
        # ggml has the second-level scale of NVFP4 only in files that others have written.
        blocks = {f for f in formats.values() if f not in ("F32", "F16", "BF16")}
        with ggmls_codes(*blocks):
            return self._written(profile_of(formats, "allocated"))

    def _converted(self, limit: int, **changed: Any) -> Path:
        """Importance and sensitivity are given: what a step takes beside its encoding is its own pass over the text."""
        shutil.rmtree(self.directory / "converted", ignore_errors=True)
        output = self.directory / "converted" / "model.gguf"
        convert(
            str(self.model),
            "budget",
            output,
            imatrix=self.imatrix,
            sensitivity=self.sensitivity,
            target_size=limit,
            calibration=str(write_text(self.directory / "calibration.txt", CALIBRATION_TEXTS)),
            samples=CALIBRATION_SAMPLES,
            sequence_length=self.length,
            cache_size=CACHE_SIZE,
            judge="off",
            quiet=True,
            **{"protect_super_weights": "off", **changed},
        )
        return output


def table(results: list[Result]) -> Iterator[str]:
    """In Markdown: sizes, divergences and their ratio to the recipe's."""
    yield "| size of | step | MB | KLD | +- | PPL | top-1 % | KLD / recipe's | s |"
    yield "|---|---|---|---|---|---|---|---|---|"
    recipes = {r.file_type: r.score.mean_kld for r in results if r.step == "recipe"}
    for r in sorted(results, key=lambda r: (FILE_TYPES.index(r.file_type), STEPS.index(r.step))):
        ratio = f"{r.score.mean_kld / recipes[r.file_type]:.3f}" if r.file_type in recipes else ""
        yield (
            f"| {r.file_type} | {r.step} | {r.bytes / 1e6:.2f} | {r.score.mean_kld:.4f} | {r.kld_error:.4f} |"
            f" {r.score.perplexity:.4g} | {100 * r.score.top1_agreement:.1f} | {ratio} | {r.seconds:.0f} |"
        )


@click.command(help=__doc__)
@click.option("--model", type=click.Path(path_type=Path), help="A checkpoint directory.  [default: the wide SmolLM2]")
@click.option("--types", default=DEFAULT_TYPES, show_default=True, help="llama.cpp's file types, with commas between.")
@click.option("--steps", default=",".join(STEPS), show_default=True)
@click.option("--chunks", default=16, show_default=True, type=click.IntRange(1), help="Chunks of 512 tokens.")
@click.option(
    "--sequence-length",
    default=SEQUENCE_LENGTH,
    show_default=True,
    help="Tokens in each of the samples of calibration.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    help="Results; what is there is not measured again.  [default: in the cache, by the model's name]",
)
def main(model: Path | None, types: str, steps: str, chunks: int, sequence_length: int, json_path: Path | None) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    model = model or build(Path(".cache/smollm2-wide"), wide=True)
    json_path = json_path or CACHE / f"quality-{model.name}.jsonl"
    results = [Result.from_dict(entry) for entry in read_lines(json_path) if entry["chunks"] == chunks]
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        bench = None
        for file_type in types.split(","):
            wanted = set(steps.split(",")) - {r.step for r in results if r.file_type == file_type}
            if not wanted:
                continue
            bench = bench or Bench(model, chunks, sequence_length, Path(directory))
            for result in bench.steps(file_type, wanted):
                results.append(result)
                append_line(json_path, asdict(result))
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
