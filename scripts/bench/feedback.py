"""What error feedback buys and what it costs: whole models encoded with it and without, from the same calibration.

Importance and second moments are of the built-in text's first part, the divergence from the source is of its last,
which they have not seen. Of every profile the tensors are encoded with feedback and without, one after the other in
turn, and both times are of the same minutes: their ratio is of use even where other work slows the machine.

SmolLM2 as it is, not its wide twin, whose inputs have 576 directions in 768 columns: errors along the other 192 cost
nothing, which feedback uses, and no model of its own has that. Rows of 576 are in formats of small blocks, rows of 1536
(the down projections) in any.
"""

import json
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np

from bitwright.calibration.control import PassControl
from bitwright.calibration.evaluation.quality import Baseline
from bitwright.calibration.passes.importance_pass import stream_importance
from bitwright.calibration.statistics.imatrix_file import load_imatrix, save_imatrix
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.text.corpus import EMBEDDED, load_corpus
from bitwright.converter.artifact.feedback import Feedback
from bitwright.converter.gguf.encode import Encoder
from bitwright.converter.job.progress import Progress
from bitwright.converter.measure.calibrate import observed_names
from bitwright.converter.measure.running import load_tokenizer
from bitwright.converter.model.model_map import describe
from bitwright.converter.model.stored_rows import restore
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.choices import Effort, FeedbackLevel
from bitwright.formats.registry import get_format
from bitwright.profiles.planning.assign import assign
from bitwright.profiles.reading.schema import load_profile
from bitwright.profiles.vocabulary import ModelMap
from scripts.smollm2 import build

CACHE = Path(".cache/bench-feedback")


@dataclass(frozen=True)
class Row:
    """A profile, without and with feedback. kld_ratio_error: standard error over the positions of the text."""

    profile: str
    kept: int
    matrices: int
    output_error_ratio: float
    kld: tuple[float, float]
    kld_ratio_error: float
    perplexity: tuple[float, float]
    seconds: tuple[float, float]


@dataclass(frozen=True)
class Encoded:
    """Weights under the checkpoint's names."""

    weights: dict[str, np.ndarray]

    @property
    def tensors(self) -> Collection[str]:
        return self.weights

    def read(self, name: str) -> np.ndarray:
        return self.weights[name]


class Bench:
    def __init__(self, model: Path, samples: int, length: int, evaluation_samples: int, threads: int | None):
        self.checkpoint: Checkpoint = open_checkpoint(str(model))
        self.model_map: ModelMap = describe(self.checkpoint)
        self.threads, self.progress = threads, Progress(quiet=True)
        tokenizer = load_tokenizer(self.checkpoint.location)
        directory = CACHE / f"{model.name}-{samples}x{length}"
        self.moments = directory / "moments"
        self.importance = self._calibrated(directory, tokenizer, samples, length)
        text = load_corpus(EMBEDDED, tokenizer, evaluation_samples, 512, split="test")
        self.baseline = Baseline(self._streamable(), text, PassControl(directory / f"source-{evaluation_samples}"))

    def _streamable(self) -> StreamableModel:
        return StreamableModel(self.checkpoint, self.checkpoint.location, threads=self.threads)

    def _calibrated(self, directory: Path, tokenizer: object, samples: int, length: int) -> ImportanceMatrix:
        path = directory / "imatrix.gguf"
        if not path.exists():
            importance = stream_importance(
                self._streamable(),
                observed_names(self.model_map),
                load_corpus(EMBEDDED, tokenizer, samples, length),
                PassControl(directory / "calibration"),
                self.moments,
            )
            save_imatrix(path, importance)
        return load_imatrix(path)

    def row(self, profile: str, level: FeedbackLevel, effort: Effort) -> Row:
        plan = assign(load_profile(profile).by_rules(), self.model_map, effort=effort)
        weights: tuple[dict[str, np.ndarray], ...] = ({}, {})
        seconds, threads = [0.0, 0.0], self.threads or 1
        with (
            Encoder(self.checkpoint, plan, self.importance, threads) as plain,
            Encoder(self.checkpoint, plan, self.importance, threads, Feedback(self.moments, level, effort)) as fed,
        ):
            for planned in plan.tensors:
                if planned.tensor.origin == "scale":
                    continue
                for i, encoder in enumerate((plain, fed)):
                    start = time.perf_counter()
                    rows = encoder.decoded(planned.tensor.name)
                    seconds[i] += time.perf_counter() - start
                    weights[i].update(restore(planned.tensor, rows))
            outcomes = [outcome for found in fed.outcomes.values() for outcome in found]
        measured = [o for o in outcomes if o.plain_error is not None and o.feedback_error is not None]
        ratios = [min(1.0, (o.feedback_error or 0) / (o.plain_error or 1)) for o in measured]
        names = [f"{profile}-{level}-{effort}-{way}" for way in ("plain", "fed")]
        scores = [self.baseline.stream_scores(Encoded(w), name) for name, w in zip(names, weights, strict=True)]
        without, with_it = (float(s[2].mean()) for s in scores)
        ratio = with_it / without
        return Row(
            profile,
            sum(outcome.kept for outcome in outcomes),
            len(outcomes),
            float(np.mean(ratios)),
            (without, with_it),
            float((scores[1][2] - ratio * scores[0][2]).std() / np.sqrt(scores[0].shape[1]) / without),
            (float(np.exp(scores[0][1].mean())), float(np.exp(scores[1][1].mean()))),
            (seconds[0], seconds[1]),
        )


def warm(formats: Collection[str]) -> None:
    """Compile what is measured."""
    from bitwright.formats.feedback.choose import feed_back
    from bitwright.formats.feedback.moment_factor import factorize, unit_of

    rows = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    for block_format in map(get_format, formats):
        if block_format.blocks is not None:
            factor = factorize(np.eye(256, dtype=np.float32), unit_of(block_format))
            feed_back(block_format, rows, block_format.encode(rows, factor.importance), factor)


@click.command(help=__doc__)
@click.option("--model", type=click.Path(path_type=Path), help="[default: SmolLM2]")
@click.option("--profile", "profiles", multiple=True, default=("balanced-4bit", "two-bit"), show_default=True)
@click.option("--level", type=click.Choice(["quick", "best"]), default="quick", show_default=True)
@click.option("--effort", type=click.Choice(["best", "fast"]), default="best", show_default=True)
@click.option("--samples", default=128, show_default=True, help="Of the calibration.")
@click.option("--length", default=512, show_default=True, help="Tokens of each.")
@click.option("--evaluation-samples", default=8, show_default=True, help="Of 512 tokens, half of which are scored.")
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    model: Path | None,
    profiles: tuple[str, ...],
    level: FeedbackLevel,
    effort: Effort,
    samples: int,
    length: int,
    evaluation_samples: int,
    threads: int,
    as_json: bool,
) -> None:
    bench = Bench(model or build(Path(".cache/smollm2")), samples, length, evaluation_samples, threads)
    if not as_json:
        click.echo("profile             kept      output error   KLD without      with     ratio         encoding time")
    for profile in profiles:
        warm({planned.format for planned in assign(load_profile(profile).by_rules(), bench.model_map).tensors})
        row = bench.row(profile, level, effort)
        if as_json:
            click.echo(json.dumps(asdict(row)))
            continue
        ratio = row.kld[1] / row.kld[0]
        click.echo(
            f"{row.profile:<16} {row.kept:4}/{row.matrices:<4} {row.output_error_ratio:12.3f} {row.kld[0]:14.4f}"
            f" {row.kld[1]:9.4f} {ratio:8.3f} ± {row.kld_ratio_error:.3f} {row.seconds[1] / row.seconds[0]:10.2f}x"
        )


if __name__ == "__main__":
    main()
