"""Time and peak memory of SmoothQuant W8A8, whole commands: ours and llm-compressor's in alternation.

    make .venv-llmcompressor/.ready
    .venv/bin/python -m scripts.bench.smoothquant --model .cache/smollm2-wide

Both calibrate on the same samples with alpha 0.5 and write a directory; ours decodes and verifies every tensor of it
too. Peak memory is the operating system's figure for the process. Each calibrates in some dtypes; what all take is held
against what the first of ours takes.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import click

from bitwright.calibration.text.corpus import load_corpus
from bitwright.converter.measure.running import load_tokenizer
from bitwright.converter.report.text import table


@dataclass(frozen=True)
class Measured:
    seconds: float
    peak_bytes: int


def run(command: list[str], given: str = "") -> Measured:
    """A process from start to end, with `given` on its standard input."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as stdin, tempfile.TemporaryFile("w+") as stderr:
        stdin.write(given)
        stdin.seek(0)
        process = subprocess.Popen(command, stdin=stdin, stdout=subprocess.DEVNULL, stderr=stderr)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            stderr.seek(0)
            raise SystemExit(f"{command[0]} failed:\n{stderr.read()[-2000:]}")
    return Measured(time.perf_counter() - start, usage.ru_maxrss * 1024)


@click.command(help=__doc__)
@click.option("--model", type=click.Path(path_type=Path), default=Path(".cache/smollm2-wide"), show_default=True)
@click.option("--peer", type=click.Path(path_type=Path), default=Path(".venv-llmcompressor/bin/python"))
@click.option("--dtypes", default="float32", show_default=True, help="Of ours: --calibration-dtype.")
@click.option("--peer-dtypes", default="float32,bfloat16", show_default=True, help="Of llm-compressor's model.")
@click.option("--samples", default=128, show_default=True)
@click.option("--sequence-length", default=256, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(
    model: Path, peer: Path, dtypes: str, peer_dtypes: str, samples: int, sequence_length: int, rounds: int
) -> None:
    tokens = load_corpus("embedded", load_tokenizer(model), samples, sequence_length).tokens.tolist()
    measured: dict[tuple[str, str], list[Measured]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "out"
        ours = [
            sys.executable,
            "-m",
            "bitwright.converter",
            "--profile",
            "smoothquant-w8a8",
            "--calibration",
            "embedded",
        ]
        ours += ["--no-chat", "--samples", str(samples), "--sequence-length", str(sequence_length), "--judge", "off"]
        job = {"model": str(model.absolute()), "output": str(output), "scheme": "W8A8", "alpha": 0.5, "tokens": tokens}
        script = str(Path(__file__).parents[1] / "peers" / "llmcompressor_directory.py")
        commands = {}
        for dtype in dtypes.split(","):
            options = ["--calibration-dtype", dtype, "--output", str(output)]
            commands["Bitwright", dtype] = ([*ours, *options, str(model)], "")
        for dtype in peer_dtypes.split(","):
            commands["llm-compressor", dtype] = ([str(peer), script], json.dumps(job | {"dtype": dtype}))
        for _ in range(rounds):
            for name, (command, given) in commands.items():
                for path in Path(scratch).iterdir():
                    shutil.rmtree(path)
                measured.setdefault(name, []).append(run(command, given))
                last = measured[name][-1]
                click.echo(f"{', '.join(name)}: {last.seconds:.1f} s, {last.peak_bytes / 2**20:.0f} MiB", err=True)
    medians = {name: (median(m.seconds for m in of), median(m.peak_bytes for m in of)) for name, of in measured.items()}
    rows, (ours_seconds, ours_peak) = [], next(iter(medians.values()))
    for (tool, dtype), (seconds, peak) in medians.items():
        faster, memory = f"{seconds / ours_seconds:.1f}x", f"{ours_peak / peak:.2f}"
        rows.append([tool, dtype, f"{seconds:.1f}", faster, f"{peak / 2**20:.0f}", memory])
    click.echo(table(["written by", "in", "seconds", "ours is faster", "peak MiB", "ours of its memory"], rows))


if __name__ == "__main__":
    main()
