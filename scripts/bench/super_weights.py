"""What protecting super weights is worth: perplexity and KL divergence with and without importance, in several formats.

Two models. "real" is the wide SmolLM2 as it is. "planted" computes the same function, but its super weights are single
scalars, and outliers: the residual channel that they write to is a channel of its own, and their columns are multiplied
by 8, which the rows of the up projection make up for. In both, one part of the model is encoded in one format, `down`
for the down projections or `layers` for all matrices of the layers, while the rest stays as it is; and the super
weights that the search has found are protected in one way: not at all, raised to Q6_K with their tensor, pinned within
5 %, or rescaled.

Results go into a file of JSON lines in the cache, one for each number of samples and effort, and the same command
continues there. The text to measure on comes with the
package dataset-build, and is of the split that calibration does not see.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import numpy as np

from bitwright.calibration.control import PassControl, never
from bitwright.calibration.evaluation.quality import Baseline
from bitwright.calibration.statistics.imatrix_file import load_imatrix
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.calibration.statistics.super_weights import SuperWeightReport
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.text.corpus import load_corpus
from bitwright.converter.artifact.run import Run
from bitwright.converter.gguf.encode import Encoder
from bitwright.converter.gguf.protect import Protector, Trials, apply
from bitwright.converter.imatrix import write_importance
from bitwright.converter.job.job import Job
from bitwright.converter.job.progress import Progress
from bitwright.converter.measure.running import load_tokenizer
from bitwright.converter.model.model_map import describe
from bitwright.converter.model.stored_rows import restore
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.choices import Effort
from bitwright.formats.files.journal import append_line, read_lines
from bitwright.profiles.choices import Mode
from bitwright.profiles.planning.assign import assign
from bitwright.profiles.reading.schema import parse_profile
from bitwright.profiles.vocabulary import ModelMap
from scripts import smollm2

CACHE = Path(".cache/bench-super-weights")
FORMATS = ("IQ1_S", "IQ2_XXS", "Q2_K", "TQ2_0", "Q4_0")
WAYS: tuple[Mode, ...] = ("off", "raise", "pin", "rescale")
SCOPES = {"down": '"mlp_down"', "layers": '"attention_*", "mlp_*"'}
# The narrow model's super weights: the channel of the residual stream, and (layer, neuron).
PLANTED_CHANNEL, PLANTED_NEURONS, PLANTED_FACTOR = 507, ((2, 90), (11, 1229), (28, 678)), 8.0


@dataclass(frozen=True)
class Result:
    """One cell of the table. covered: super weights that come out within the tolerance, of `confirmed`."""

    model: str
    scope: str
    format: str
    imatrix: bool
    way: str
    perplexity: float
    source_perplexity: float
    kld: float
    kld_error: float
    bits_per_weight: float
    covered: int
    confirmed: int


def planted_model() -> Path:
    """The wide SmolLM2 with its super weights made single scalars, eight times as large."""

    def change(narrow: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        weights = smollm2.widen(narrow, aligned=(PLANTED_CHANNEL,))
        for layer, neuron in PLANTED_NEURONS:
            stem = f"model.layers.{layer}.mlp."
            weights[f"{stem}up_proj.weight"][neuron] /= PLANTED_FACTOR
            weights[f"{stem}down_proj.weight"][:, neuron] *= PLANTED_FACTOR
        return weights

    return smollm2.save(CACHE / "planted", change, wide=True)


def importance_of(model: Path, name: str) -> ImportanceMatrix:
    """The model's importance with its super weights, computed once."""
    path = CACHE / f"{name}.gguf"
    if not path.exists():
        write_importance(
            str(model), path, Progress(), never, super_weights=True, calibration="embedded", samples=128, chat=False
        )
    return load_imatrix(path)


def uniform(importance: ImportanceMatrix) -> ImportanceMatrix:
    """Importance that says nothing, for formats that cannot be encoded without any."""
    return replace(
        importance,
        sums={name: np.ones_like(sums) for name, sums in importance.sums.items()},
        counts={name: np.ones_like(counts) for name, counts in importance.counts.items()},
    )


class Planned:
    """A checkpoint as a plan would encode it, tensor by tensor when it is asked for: a source of weights."""

    def __init__(self, model_map: ModelMap, encoder: Encoder):
        self._encoder = encoder
        self.tensors = {name: spec for spec in model_map.tensors for name in spec.sources}

    def read(self, name: str) -> np.ndarray:
        spec = self.tensors[name]
        return restore(spec, self._encoder.decoded(spec.name))[name]


class Bench:
    """One model, its text, and what is known of its super weights."""

    def __init__(self, name: str, directory: Path, samples: int, effort: Effort, work_dir: Path):
        self.name, self.effort, self.work_dir = name, effort, work_dir
        self.checkpoint: Checkpoint = open_checkpoint(str(directory))
        self.model_map = describe(self.checkpoint)
        self.importance = importance_of(directory, name)
        report = self.importance.super_weights
        assert report is not None
        self.report: SuperWeightReport = report
        corpus = load_corpus("embedded", load_tokenizer(directory), samples, 512, split="test")
        model = StreamableModel(self.checkpoint, directory, name)
        self.baseline = Baseline(model, corpus, PassControl(work_dir, Progress()), keep=True)

    def measure(self, scope: str, format_name: str, with_imatrix: bool, way: Mode) -> Result:
        importance = self.importance if with_imatrix else uniform(self.importance)
        rule = f'[[rule]]\nroles = [{SCOPES[scope]}]\nformat = "{format_name}"'
        profile = parse_profile(
            f'description = "d"\ngood_for = "g"\nbase = "F32"\n{rule}',
            "bench",
            "bench",
        )
        plan = assign(profile, self.model_map, effort=self.effort)
        job = Job(str(self.checkpoint.location), profile, protect_super_weights=way)
        run = Run(job, self.work_dir, self.work_dir, self.checkpoint, self.model_map, Progress(), never)
        model_map, tolerance = self.model_map, job.protection.tolerance
        measuring = Trials(self.baseline, self.checkpoint, self.model_map)
        for decision in Protector(run, plan, importance).decide(self.report.weights, lambda: measuring):
            plan, model_map = apply(decision, self.report.weights, tolerance, plan, model_map)
        with Encoder(self.checkpoint, plan, importance, job.n_threads) as encoder:
            candidate = Planned(model_map, encoder)
            scores = self.baseline.stream_scores(candidate)
            covered = self._covered(candidate, model_map, tolerance)
        encoded = [p for p in plan.tensors if p.tensor.name in self._names(scope)]
        return Result(
            self.name,
            scope,
            format_name,
            with_imatrix,
            way,
            float(np.exp(scores[1].mean())),
            float(np.exp(scores[0].mean())),
            float(scores[2].mean()),
            float(scores[2].std(ddof=1) / np.sqrt(scores.shape[1])),
            8 * sum(p.n_bytes for p in encoded) / sum(p.tensor.n_weights for p in encoded),
            covered,
            len(self.report.weights),
        )

    def _names(self, scope: str) -> set[str]:
        layers = [t for t in self.model_map.tensors if t.layer is not None and t.quantizable]
        return {t.name for t in layers if scope == "layers" or t.name.endswith("ffn_down.weight")}

    def _covered(self, candidate: Planned, model_map: ModelMap, tolerance: float) -> int:
        n_covered = 0
        for weight in self.report.weights:
            spec = model_map.tensor(weight.tensor)
            factor = np.prod([r.factor for r in spec.rescaled if r.index == weight.column])
            value = candidate.read(spec.sources[0])[weight.row, weight.column] / factor
            n_covered += int(abs(value - weight.value) <= tolerance * abs(weight.value))
        return n_covered


def lines(results: list[Result]) -> Iterator[str]:
    """A table in Markdown, one row for each model, scope, format and importance."""
    yield "| model | encoded | format | imatrix | none: PPL, KLD | raise | pin | rescale |"
    yield "|---|---|---|---|---|---|---|---|"
    by_row: dict[tuple, dict[str, Result]] = {}
    for r in results:
        by_row.setdefault((r.model, r.scope, r.format, r.imatrix), {})[r.way] = r
    for (model, scope, format_name, imatrix), cells in by_row.items():
        none = cells.get("off")
        texts = [f"{none.perplexity:.2f}, {none.kld:.4f} ({none.covered}/{none.confirmed})" if none else ""]
        for way in WAYS[1:]:
            cell = cells.get(way)
            if cell is None or none is None:
                texts.append("")
                continue
            better = 100 * (cell.perplexity / none.perplexity - 1)
            texts.append(f"{better:+.1f} %, {cell.kld:.4f} ({cell.covered}/{cell.confirmed})")
        yield f"| {model} | {scope} | {format_name} | {'yes' if imatrix else 'no'} | {' | '.join(texts)} |"


@click.command(help=__doc__)
@click.option("--models", default="real,planted", show_default=True)
@click.option("--scopes", default="down,layers", show_default=True)
@click.option("--formats", default=",".join(FORMATS), show_default=True)
@click.option("--samples", default=8, show_default=True, help="Of 512 tokens; the second half of each is scored.")
@click.option("--effort", default="fast", show_default=True, type=click.Choice(["best", "fast"]))
def main(models: str, scopes: str, formats: str, samples: int, effort: Effort) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    json_path = CACHE / f"results-{samples}-{effort}.jsonl"
    results = [Result(**entry) for entry in read_lines(json_path)]
    known = {(r.model, r.scope, r.format, r.imatrix, r.way) for r in results}
    for name in models.split(","):
        directory = smollm2.build(Path(".cache/smollm2-wide"), wide=True) if name == "real" else planted_model()
        with tempfile.TemporaryDirectory(dir=CACHE) as work_dir:
            bench = Bench(name, directory, samples, effort, Path(work_dir))
            for scope in scopes.split(","):
                for format_name in formats.split(","):
                    for imatrix in (True, False):
                        for way in WAYS:
                            if (name, scope, format_name, imatrix, way) in known:
                                continue
                            results.append(bench.measure(scope, format_name, imatrix, way))
                            append_line(json_path, asdict(results[-1]))
    print("\n".join(lines(results)))


if __name__ == "__main__":
    main()
