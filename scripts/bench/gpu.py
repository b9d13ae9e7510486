"""What a GPU makes of a 7B shape: importance at 512 samples of 512 tokens, peak memory, and INT8 products beside FP16.

    python -m scripts.bench.gpu
    python -m scripts.bench.gpu --layers 3 --samples 128       sooner

The checkpoint is that of seven_b, made of holes. The time of a layer is the median over all but the first, between two
checkpoints, and counts for as many layers and samples as the whole job has. Products are of the shapes of a layer, by
torch: INT8 as W8A8 computes them, with the scales of tokens and of channels applied to their integers, beside FP16;
medians over repetitions that alternate, timed by the GPU itself. Importance is computed on all GPUs of a kind, products
on the first one. Without a GPU nothing is measured.
"""

import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import click
import torch

from bitwright.calibration.stream.build import others_alike
from bitwright.profiles.sizes import size_text
from scripts.bench.memory import write_checkpoint
from scripts.bench.seven_b import ALL_LAYERS, ALL_SAMPLES, ALL_TOKENS, SHARD_BYTES, calibrate, seconds_per_layer

MOST_MINUTES, AIM_MINUTES, LEAST_RATIO = 30, 5, 1.3
# Rows and columns of a layer's matrices, and tokens at once: some texts that are continued, a prompt, many.
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
TOKENS = (64, 512, 8192)
REPETITIONS = 30


def milliseconds(products: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Of each, the median over repetitions that take turns."""
    times: dict[str, list[float]] = {name: [] for name in products}
    for turn in range(REPETITIONS + 5):
        for name, product in products.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            product()
            end.record()
            end.synchronize()
            if turn >= 5:  # the first ones choose kernels
                times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(of) for name, of in times.items()}


def compare_products(n_rows: int, n_columns: int, n_tokens: int) -> dict[str, float]:
    """Milliseconds of inputs [n_tokens, n_columns] times the transposed weights [n_rows, n_columns]."""
    inputs = torch.randn(n_tokens, n_columns, device="cuda", dtype=torch.float16)
    weights = torch.randn(n_rows, n_columns, device="cuda", dtype=torch.float16)
    codes, integers = (torch.randint(-127, 128, of.shape, device="cuda").to(torch.int8) for of in (inputs, weights))
    of_tokens, of_channels = (torch.rand(n, device="cuda") for n in (n_tokens, n_rows))

    def int8() -> torch.Tensor:
        sums: torch.Tensor = torch._int_mm(codes, integers.T)
        return (sums * of_tokens[:, None] * of_channels).half()

    products: dict[str, Callable[[], object]] = {
        "fp16": lambda: inputs @ weights.T,
        "int8": lambda: torch._int_mm(codes, integers.T),
        "int8, scaled": int8,
    }
    return milliseconds(products)


def report_importance(directory: Path, layers: int, samples: int) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        write_checkpoint(directory, layers, True, SHARD_BYTES)
        _, peak, times = calibrate(directory, False, samples, ALL_TOKENS, "cuda", None)
    finally:
        shutil.rmtree(directory)
    seconds = seconds_per_layer(times)
    minutes = seconds * ALL_LAYERS * ALL_SAMPLES / samples / 60
    print(f"importance: {seconds:.2f} s a layer of {samples} samples of {ALL_TOKENS} tokens, peak {size_text(peak)}")
    print(
        f"importance of {ALL_LAYERS} layers, {ALL_SAMPLES} samples: {minutes:.1f} min"
        f" (at most {MOST_MINUTES} are asked for, {AIM_MINUTES} are aimed at)"
    )


def report_products() -> None:
    print(f"{'rows':>6} {'columns':>8} {'tokens':>7} {'fp16 ms':>9} {'int8 ms':>9} {'scaled':>9} {'int8 / fp16':>12}")
    for n_rows, n_columns in SHAPES:
        for n_tokens in TOKENS:
            of = compare_products(n_rows, n_columns, n_tokens)
            ratio = of["fp16"] / of["int8"]
            print(
                f"{n_rows:6} {n_columns:8} {n_tokens:7} {of['fp16']:9.3f} {of['int8']:9.3f} {of['int8, scaled']:9.3f}"
                f" {ratio:11.2f}x"
            )
    print(f"at least {LEAST_RATIO} x is asked for, of a prompt's products")


@click.command(help=__doc__)
@click.option("--layers", default=4, show_default=True, help="Of the model that is run; three at least tell a time.")
@click.option("--samples", default=ALL_SAMPLES, show_default=True)
@click.option("--directory", default=".cache/bench-gpu", type=click.Path(path_type=Path), show_default=True)
def main(layers: int, samples: int, directory: Path) -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("torch finds no GPU of CUDA here, and this measures one")
    if layers < 3:
        raise click.UsageError("a time of a layer takes three layers at least")
    number = 1 + len(others_alike(torch.device("cuda")))
    print(f"{number} x {torch.cuda.get_device_name()}, torch {torch.__version__}")
    report_products()
    report_importance(directory, layers, samples)


if __name__ == "__main__":
    main()
