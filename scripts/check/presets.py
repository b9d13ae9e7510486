"""Convert a real model with every preset, and print what each makes of it, beside llama.cpp's mixes.

    python -m scripts.check.presets --imatrix .cache/smollm2-wide.gguf --sensitivity TABLE [--preset NAME ...] [MODEL]

Every artifact is written, decoded and verified, its predictions are held against the source's on text that the
calibration has not seen, and it is deleted. llama.cpp's mixes, as its llama-quantize writes them with the same
importance, are measured alike; between their sizes the logarithm of the divergence is interpolated. What the intent of
a preset costs is its predicted divergence beside that of the best choice of the same bytes (`budget`). What is done is
kept in a file of JSON lines and not run again. A GGUF is made as by default, with error feedback and folding, but for
what protects super weights, whose search takes longer than all the rest.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import click
import numpy as np

from bitwright.calibration.control import PassControl
from bitwright.calibration.evaluation.quality import Baseline
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.text.corpus import load_corpus
from bitwright.converter import convert
from bitwright.converter.job.build import build_job
from bitwright.converter.job.work_directory import default_work_dir
from bitwright.converter.judge.open import open_artifact
from bitwright.converter.measure.running import load_tokenizer
from bitwright.converter.model.model_map import describe
from bitwright.converter.preparation import prepare
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.files.journal import append_line, read_lines
from bitwright.profiles.reading.schema import load_profile, preset_names
from scripts.peers.mixes import Mixes
from scripts.smollm2 import build

WORK = Path(".cache/check-presets")
SEQUENCE_LENGTH = 512
CALIBRATION = {"samples": 128, "sequence_length": 256}
# Bits per weight for the preset that asks for a target.
BUDGETS = (2.5, 3.5, 4.5)

MIXES = "IQ1_M,IQ2_XXS,IQ2_M,IQ3_XXS,Q3_K_M,Q4_K_M,Q5_K_M"

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
        self.baseline = Baseline(
            StreamableModel(self.checkpoint, model), corpus, PassControl(WORK / f"quality-{model.name}-{samples}")
        )

    def run(self, preset: str, bpw: float | None) -> dict[str, Any]:
        """Size, quality and seconds of one preset."""
        directory = WORK / preset
        shutil.rmtree(directory, ignore_errors=True)
        profile = load_profile(preset)
        output = directory / ("model.gguf" if profile.target == "gguf" else "model")
        options: dict[str, Any] = {"cache": WORK / "cache", **CALIBRATION}
        if profile.target == "gguf":
            options |= {"error_feedback": "quick", "protect_super_weights": "off", **self.options}
        report = convert(str(self.model), preset, output, target_bpw=bpw, judge="off", quiet=True, **options)
        plan = json.loads((default_work_dir(output) / "plan.json").read_text())
        measured = self._measured(output, report["plan_sha256"])
        shutil.rmtree(directory)
        return {
            "preset": preset,
            "target_bpw": bpw,
            "plan_sha256": report["plan_sha256"],
            "bytes": report["artifact"]["bytes"],
            "bits_per_weight": plan["bits_per_weight"],
            "predicted_kld": plan["predicted_kld"],
            "budget_kld": self._of_the_budget(plan["bits_per_weight"]) if profile.target == "gguf" else None,
            "seconds": report["seconds"],
            **measured,
        }

    def mix(self, mixes: Mixes, file_type: str) -> dict[str, Any]:
        """The same of llama.cpp's mix of this name."""
        output = mixes.write(file_type, WORK / f"{file_type}.gguf")
        n_bytes, measured = output.stat().st_size, self._measured(output, file_type)
        output.unlink()
        return {"preset": file_type, "target_bpw": None, "bytes": n_bytes, "mix": True, **measured}

    def _of_the_budget(self, bpw: float) -> float | None:
        """The predicted divergence of the best choice of so many bits a weight, where a table is at hand."""
        if not self.options.get("sensitivity"):
            return None
        options = {**self.options, "target_bpw": bpw, "output": WORK / "planned.gguf"}
        return prepare(build_job(str(self.model), "budget", **options)).plan.predicted_kld

    def _measured(self, artifact: Path, name: str) -> dict[str, Any]:
        opened = open_artifact(artifact, self.model_map).candidate()
        source, candidate, kld, agree = self.baseline.stream_scores(opened.weights, name, arithmetic=opened.arithmetic)[
            :4
        ]
        return {
            "mean_kld": float(kld.mean()),
            "source_perplexity": float(np.exp(source.mean())),
            "perplexity": float(np.exp(candidate.mean())),
            "top1_agreement": float(agree.mean()),
            "corpus": self.baseline.corpus.name,
            "tokens": len(kld),
        }


def beside(result: dict[str, Any], mixes: list[dict[str, Any]]) -> str:
    """The divergence over that of llama.cpp's mixes at the same size; nothing outside of their sizes."""
    ordered = sorted(mixes, key=lambda mix: mix["bytes"])
    if not ordered or not ordered[0]["bytes"] <= result["bytes"] <= ordered[-1]["bytes"]:
        return ""
    sizes, losses = [mix["bytes"] for mix in ordered], [np.log(mix["mean_kld"]) for mix in ordered]
    return f"{result['mean_kld'] / np.exp(np.interp(result['bytes'], sizes, losses)):.2f}"


def intent(result: dict[str, Any]) -> str:
    """What the preset's floors cost: predicted divergence over the budget's."""
    predicted, best = result.get("predicted_kld"), result.get("budget_kld")
    return f"{predicted / best:.2f}" if predicted and best else ""


def line(result: dict[str, Any], mixes: list[dict[str, Any]]) -> str:
    name = result["preset"] + ("" if result["target_bpw"] is None else f" --target-bpw {result['target_bpw']}")
    return (
        f"| `{name}` | {result['bytes'] / 1e6:.1f} | {result['bits_per_weight']:.2f} | {result['mean_kld']:.4f} |"
        f" {result['perplexity']:.4g} | {100 * result['top1_agreement']:.1f} |"
        f" {beside(result, mixes)} | {intent(result)} |"
    )


@click.command(help=__doc__)
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("--imatrix", type=click.Path(exists=True, path_type=Path), help="Instead of computing the importance.")
@click.option("--sensitivity", type=click.Path(exists=True, path_type=Path), help="Instead of measuring it.")
@click.option("--preset", "presets", multiple=True, help="Only these.")
@click.option(
    "--samples", default=16, show_default=True, help=f"Sequences of {SEQUENCE_LENGTH} tokens to measure with."
)
@click.option("--mixes", default=MIXES, show_default=True, help="llama.cpp's file types to stand beside; may be empty.")
def main(model: Path | None, presets: tuple[str, ...], samples: int, mixes: str, **options: Path | None) -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    bench = Bench(model or build(Path(".cache/smollm2-wide"), wide=True), samples, options)
    results = WORK / f"results-{bench.model.name}-{samples}.jsonl"
    finished = {(result["preset"], result["target_bpw"]): result for result in read_lines(results)}
    names = [name for name in mixes.split(",") if name]
    if missing := [name for name in names if (name, None) not in finished]:
        peer = Mixes(bench.model, bench.options["imatrix"], WORK)
        for name in missing:
            finished[name, None] = bench.mix(peer, name)
            append_line(results, finished[name, None])
        peer.close()
    measured_mixes = [finished[name, None] for name in names]
    for mix in measured_mixes:
        kld, size = mix["mean_kld"], mix["bytes"]
        click.echo(
            f"llama.cpp's {mix['preset']}: {size / 1e6:.1f} MB, mean KLD {kld:.4f}, perplexity {mix['perplexity']:.4g}"
        )
    click.echo("| preset | MB | bits per weight | mean KLD | perplexity | top-1 % | / llama.cpp | / budget |")
    click.echo("|---|---|---|---|---|---|---|---|")
    for preset, bpw in runs(presets):
        if (preset, bpw) not in finished:
            finished[preset, bpw] = bench.run(preset, bpw)
            append_line(results, finished[preset, bpw])
        click.echo(line(finished[preset, bpw], measured_mixes))
    if finished:
        result = next(iter(finished.values()))
        click.echo(
            f"source: perplexity {result['source_perplexity']:.4g}; {result['tokens']} tokens of {result['corpus']}"
        )


if __name__ == "__main__":
    main()
