"""Prefill products of a 7B shape in INT8 beside floating point, on this machine.

    python -m scripts.bench.int8 [--device cuda] [--tokens 512]

The INT8 product has everything that W8A8 adds to it: scales by token, quantization, integer product, dequantization.

    _int_mm    torch._int_mm, torch's own integer product
    exact      formats.kernels.int8_matmul, by which directories are evaluated (on a CPU)

The peers take turns with it: float16 on a GPU; float32 and bfloat16 on a CPU. Medians of the rounds.
"""

import statistics
import time
from collections.abc import Callable

import click
import numpy as np
import torch

from bitwright.converter.report.text import table
from bitwright.formats.kernels.int8_matmul import int8_linear, quantize_per_token
from scripts.bench.memory import MLP_WIDTH, WIDTH

# (columns, rows) of a layer's matrices, fused as runtimes do.
SHAPES = {
    "q, k, v": (WIDTH, 3 * WIDTH),
    "attention output": (WIDTH, WIDTH),
    "gate, up": (WIDTH, 2 * MLP_WIDTH),
    "down": (MLP_WIDTH, WIDTH),
}


def int_mm(inputs: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """inputs: float [n, n_columns]; codes: int8 [n_columns, n_rows], a transposed view; scales: float [n_rows]."""
    of_tokens = inputs.abs().amax(dim=1, keepdim=True).float().clamp_(min=1e-12) / 127
    rounded = (inputs / of_tokens).round_().to(torch.int8)
    return (torch._int_mm(rounded, codes).float() * of_tokens * scales).to(inputs.dtype)


def seconds(run: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def contestants(n_columns: int, n_rows: int, tokens: int, device: str) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n_rows, n_columns, generator=generator) * 0.02
    inputs = torch.randn(tokens, n_columns, generator=generator)
    scales = weight.abs().amax(dim=1) / 127
    codes = (weight / scales[:, None]).round().to(torch.int8)
    dtype = torch.float16 if device == "cuda" else torch.float32
    given, transposed, of_rows = inputs.to(device, dtype), codes.to(device).t(), scales.to(device)
    found: dict[str, Callable[[], object]] = {"_int_mm": lambda: int_mm(given, transposed, of_rows)}
    if device == "cpu":
        rows, stored = inputs.numpy(), (codes.numpy(), scales.numpy().astype(np.float32))
        found["exact"] = lambda: int8_linear(quantize_per_token(rows, True), *stored)
    for peer in (torch.float16,) if device == "cuda" else (torch.float32, torch.bfloat16):
        x, w = inputs.to(device, peer), weight.to(device, peer)
        found[str(peer).removeprefix("torch.")] = lambda x=x, w=w: torch.nn.functional.linear(x, w)
    return found


@click.command(help=__doc__)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--tokens", default=512, show_default=True, help="Of the prompt.")
@click.option("--rounds", default=5, show_default=True)
def main(device: str, tokens: int, rounds: int) -> None:
    rows, totals = [], {}
    for name, (n_columns, n_rows) in SHAPES.items():
        runs = contestants(n_columns, n_rows, tokens, device)
        times: dict[str, list[float]] = {kind: [] for kind in runs}
        with torch.inference_mode():
            for kind in runs:
                seconds(runs[kind], device)
            for _ in range(rounds):
                for kind, run in runs.items():
                    times[kind].append(seconds(run, device))
        of = {kind: statistics.median(measured) for kind, measured in times.items()}
        rows.append([name, *(f"{1e3 * of[kind]:.2f}" for kind in of)])
        totals = {kind: totals.get(kind, 0.0) + of[kind] for kind in of}
    rows.append(["a layer", *(f"{1e3 * of_all:.2f}" for of_all in totals.values())])
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} cores"
    click.echo(f"{tokens} tokens, milliseconds, {where}\n\n" + table(["product", *totals], rows))
    for peer in [kind for kind in totals if "float" in kind]:
        ratios = (f"{kind} {totals[peer] / totals[kind]:.2f}x" for kind in totals if "float" not in kind)
        click.echo(f"as fast as {peer}: {', '.join(ratios)}")


if __name__ == "__main__":
    main()
