"""Convert a model into schemes that vLLM computes on a CPU, run each in a real engine, and hold its perplexity beside
our own evaluation of the same directory on the same tokens.

    make .venv-vllm/.ready && .venv/bin/python -m scripts.check.vllm --model .cache/smollm2

On a CPU without VNNI instructions the engine's INT8 products saturate pairs at 16 bits: its perplexity is then above
ours, which is computed by exact integers. Exits with 1 where a directory does not load, writes nothing, predicts no
numbers, or is further off than that explains.
"""

import math
import sys
import tempfile
from pathlib import Path

import click

from bitwright import converter
from bitwright.calibration.control import PassControl
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.text.corpus import load_corpus
from bitwright.converter.judge.engines.ask import load_in_engine
from bitwright.converter.judge.open import open_artifact
from bitwright.converter.measure.running import load_tokenizer
from bitwright.converter.model.model_map import describe
from bitwright.converter.report.text import table
from bitwright.converter.source.open import open_checkpoint

SCHEMES = ("W8A8", "W8A8_STATIC", "FP8")
# How far from ours an engine's perplexity may be, as a share of the source's.
TOLERANCE = 0.05


def write_profile(path: Path, scheme: str, smooth: bool) -> str:
    head = 'description = "d"\ngood_for = "g"\ntarget = "safetensors"\n'
    path.write_text(f'{head}base = "{scheme}"\n[activations]\nsmooth = {str(smooth).lower()}\n')
    return str(path)


def write_directory(model: Path, scratch: Path, scheme: str, calibration_length: int) -> Path:
    """A directory of the model in this scheme; integers with SmoothQuant."""
    converter.convert(
        str(model),
        profile=write_profile(scratch / f"{scheme}.toml", scheme, smooth=scheme.startswith("W8A8")),
        output=scratch / scheme,
        calibration="embedded",
        sequence_length=calibration_length,
        samples=128,
        judge="off",
    )
    return scratch / scheme


@click.command()
@click.argument("directories", nargs=-1, type=click.Path(path_type=Path))
@click.option("--model", type=click.Path(path_type=Path), default=Path(".cache/smollm2"), show_default=True)
@click.option("--python", type=click.Path(path_type=Path), default=Path(".venv-vllm/bin/python"), show_default=True)
@click.option("--samples", default=8, show_default=True, help="Sequences to score.")
@click.option("--sequence-length", default=128, show_default=True)
@click.option("--calibration-length", default=48, show_default=True, help="Tokens in a calibration sequence.")
@click.option("--schemes", default=",".join(SCHEMES), show_default=True)
def main(
    directories: tuple[Path, ...],
    model: Path,
    python: Path,
    samples: int,
    sequence_length: int,
    calibration_length: int,
    schemes: str,
) -> None:
    """Check these DIRECTORIES of the model, or without any what is written of it in the schemes."""
    from bitwright.calibration.evaluation.quality import stream_quality

    checkpoint = open_checkpoint(str(model))
    model_map = describe(checkpoint)
    corpus = load_corpus("embedded", load_tokenizer(model), samples, sequence_length, split="test")
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        written = (write_directory(model, scratch, scheme, calibration_length) for scheme in schemes.split(","))
        for directory in directories or written:
            candidate = open_artifact(directory, model_map).candidate()
            report = stream_quality(
                StreamableModel(checkpoint, model),
                candidate.weights,
                corpus,
                PassControl(scratch / "quality"),
                arithmetic=candidate.arithmetic,
            )
            engine = load_in_engine(directory, "vllm", python, tokens=corpus.tokens.tolist())
            assert engine.perplexity is not None
            # A perplexity beyond all numbers is None here and infinite there.
            source, ours = (math.inf if p is None else p for p in (report.source_perplexity, report.perplexity))
            close = abs(engine.perplexity - ours) <= TOLERANCE * source and math.isfinite(ours)
            failed |= not close or not engine.text.strip()
            figures = (source, ours, engine.perplexity)
            rows.append([directory.name, *(f"{figure:.3f}" for figure in figures), repr(engine.text[:40])])
            click.echo("  ".join(rows[-1]), err=True)
    click.echo(table(["directory", "source", "directory, by us", "by vLLM", "it writes"], rows))
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
