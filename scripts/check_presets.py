"""Convert a real model with every preset, and print what each makes of it.

    python -m scripts.check_presets --imatrix .cache/smollm2-wide.gguf --sensitivity TABLE [--preset NAME ...] [MODEL]

Every artifact is written, decoded and verified, its predictions are held against the source's on text that the
calibration has not seen, and it is deleted. Presets that are done are kept in a file of JSON lines and not run again.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import click
import numpy as np

from calibration.corpus import load_corpus
from calibration.quality import Baseline
from converter import convert
from converter.calibrate import load_tokenizer
from converter.job import default_work_dir
from converter.model_map import describe
from converter.quality import open_candidate
from converter.source import open_checkpoint
from formats.journal import append_line, read_lines
from profiles.schema import load_profile, preset_names
from scripts.smollm2 import build

WORK = Path(".cache/check-presets")
SEQUENCE_LENGTH = 512
# A directory wants more of its inputs than an importance matrix has.
DIRECTORY_CALIBRATION = {"samples": 128, "sequence_length": 256}
# Bits per weight for the preset that asks for a target.
BUDGETS = (2.5, 3.5, 4.5)

Run = tuple[str, float | None]


def runs(presets: tuple[str, ...]) -> list[Run]:
    """The presets to run, with the target of those that need one."""
    names = presets or preset_names()
    return [(name, bpw) for name in names for bpw in (BUDGETS if load_profile(name).base is None else (None,))]


class Bench:
    """One model, and the predictions of its own weights, computed once."""

    def __init__(self, model: Path, samples: int, options: dict[str, Any]):
        self.model, self.options = model, options
        self.checkpoint = open_checkpoint(str(model))
        self.model_map = describe(self.checkpoint)
        corpus = load_corpus(None, load_tokenizer(model), samples, SEQUENCE_LENGTH, 0, split="test")
        self.baseline = Baseline(self.checkpoint, model, corpus, work_dir=WORK / f"quality-{samples}")

    def run(self, preset: str, bpw: float | None) -> dict[str, Any]:
        """Size, quality and seconds of one preset."""
        directory = WORK / preset
        shutil.rmtree(directory, ignore_errors=True)
        profile = load_profile(preset)
        output = directory / ("model.gguf" if profile.target == "gguf" else "model")
        options = self.options if profile.target == "gguf" else DIRECTORY_CALIBRATION
        report = convert(str(self.model), preset, output, target_bpw=bpw, quality=False, quiet=True, **options)
        plan = json.loads((default_work_dir(output) / "plan.json").read_text())
        opened = open_candidate(output, self.model_map)
        scores = self.baseline.scores(opened.weights, report["plan_sha256"], arithmetic=opened.arithmetic)
        source, candidate, kld, agree = scores[:4]
        shutil.rmtree(directory)
        return {
            "preset": preset,
            "target_bpw": bpw,
            "plan_sha256": report["plan_sha256"],
            "bytes": report["artifact"]["bytes"],
            "bits_per_weight": plan["bits_per_weight"],
            "predicted_kld": plan["predicted_kld"],
            "mean_kld": float(kld.mean()),
            "source_perplexity": float(np.exp(source.mean())),
            "perplexity": float(np.exp(candidate.mean())),
            "top1_agreement": float(agree.mean()),
            "corpus": self.baseline.corpus.name,
            "tokens": len(kld),
            "seconds": report["seconds"],
        }


def line(result: dict[str, Any]) -> str:
    name = result["preset"] + ("" if result["target_bpw"] is None else f" --target-bpw {result['target_bpw']}")
    return (
        f"| `{name}` | {result['bytes'] / 1e6:.1f} | {result['bits_per_weight']:.2f} | {result['mean_kld']:.4f} |"
        f" {result['perplexity']:.4g} | {100 * result['top1_agreement']:.1f} |"
    )


@click.command(help=__doc__)
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("--imatrix", type=click.Path(exists=True, path_type=Path), help="Instead of computing the importance.")
@click.option("--sensitivity", type=click.Path(exists=True, path_type=Path), help="Instead of measuring it.")
@click.option("--preset", "presets", multiple=True, help="Only these.")
@click.option(
    "--samples", default=16, show_default=True, help=f"Sequences of {SEQUENCE_LENGTH} tokens to measure with."
)
def main(model: Path | None, presets: tuple[str, ...], samples: int, **options: Path | None) -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    bench = Bench(model or build(Path(".cache/smollm2-wide"), wide=True), samples, options)
    results = WORK / f"results-{bench.model.name}-{samples}.jsonl"
    finished = {(result["preset"], result["target_bpw"]): result for result in read_lines(results)}
    click.echo("| preset | MB | bits per weight | mean KLD | perplexity | top-1 % |\n|---|---|---|---|---|---|")
    for preset, bpw in runs(presets):
        if (preset, bpw) not in finished:
            finished[preset, bpw] = bench.run(preset, bpw)
            append_line(results, finished[preset, bpw])
        click.echo(line(finished[preset, bpw]))
    if finished:
        result = next(iter(finished.values()))
        click.echo(
            f"source: perplexity {result['source_perplexity']:.4g}; {result['tokens']} tokens of {result['corpus']}"
        )


if __name__ == "__main__":
    main()
