"""Time of a plan, and peak memory and throughput of encoding the first layers, of checkpoints of frontier shapes
(scripts/frontier_models.py): DeepSeek-V3 in FP8 blocks and gpt-oss-120b in MXFP4. They are files of holes, so that all
weights are zero; an encoder of 8 bits takes as long for any others. Every command runs in a process of its own.
"""

import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click

from bitwright.profiles.sizes import size_text
from scripts.frontier_models import CONFIGS, write_frontier_model
from scripts.smollm2 import build

# The first layers with every kind of layer that the model has.
FIRST_LAYERS = {"deepseek-v3": 4, "gpt-oss-120b": 2}


def run(*arguments: str | Path) -> tuple[str, float]:
    """Standard output of `convert`, and the seconds it took."""
    start = time.monotonic()
    command = [sys.executable, "-m", "bitwright.converter", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout, time.monotonic() - start


@click.command(help=__doc__)
@click.option("--profile", default="uniform-8bit", show_default=True)
@click.option("--repeat", default=3, show_default=True, help="Plans of every model.")
@click.option("--model", "names", multiple=True, type=click.Choice(list(CONFIGS)), default=list(CONFIGS))
@click.option("--directory", default=".cache/bench-frontier", type=click.Path(path_type=Path), show_default=True)
def main(profile: str, repeat: int, names: tuple[str, ...], directory: Path) -> None:
    tokenizer = build(Path(".cache/smollm2"))
    for name in names:
        shutil.rmtree(directory, ignore_errors=True)
        try:
            whole, first = directory / name, directory / f"{name}-first"
            write_frontier_model(name, whole, tokenizer)
            plans = [run("plan", "--profile", profile, "--json", whole) for _ in range(repeat)]
            seconds = statistics.median(taken for _, taken in plans)
            planned = json.loads(plans[0][0])
            print(
                f"{name}: {len(planned['tensors'])} tensors, {size_text(planned['bytes'])}, planned in {seconds:.1f} s"
            )
            write_frontier_model(name, first, tokenizer, FIRST_LAYERS[name])
            output = directory / "out.gguf"
            text, taken = run("--profile", profile, "--judge", "off", "--json", "--output", output, first)
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
            report = json.loads(text)
            n_weights = sum(row["weights"] for row in report["groups"])
            encoding = report["seconds"]["encode"]
            print(
                f"  its first {FIRST_LAYERS[name]} layers: {n_weights / 1e9:.1f} billion weights in {taken:.0f} s, "
                f"encoded at {n_weights / encoding / 1e6:.0f} M weights/s; peak resident memory {size_text(peak)}"
            )
        finally:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
