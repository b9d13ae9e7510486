"""Hold the schemes of compressed-tensors directories against llm-compressor's: error and speed.

Every round quantizes the same matrices with each of our efforts and, in an environment of its own, with each of
llm-compressor's observers, one after the other, on the same number of threads. Both start from weights in bfloat16 and
end with the packed tensors; ours hold float32 rows, theirs a bfloat16 module, as it keeps the model's dtype. All
tensors are decoded by the same decoder, which the tests hold against compressed-tensors itself.

The NMSE is the sum of squared errors over that of squared weights, the mean over the matrices of a data set; the
weighted one multiplies both by the importance of the column. `ours` knows the importance, `ours, plain` does not, nor
do llm-compressor's observers but the imatrix ones; `ours, its global scale` takes NVFP4's second-level scale as
llm-compressor chooses it. Speeds are medians over the rounds; they mean nothing unless the
machine is idle.

Data sets: `model`, matrices of the first, middle and last layer of a checkpoint; `gaussian`; `student-t`, weights of 5
degrees of freedom.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import click
import numpy as np

from bitwright.formats.bfloat16 import bfloat16, bfloat16_bits
from bitwright.formats.choices import Effort
from bitwright.formats.files.stored_tensor import NUMPY_DTYPES
from bitwright.formats.schemes.registry import SCHEMES, Scheme, get_scheme
from bitwright.formats.schemes.scheme import Tensors
from scripts.bench.encoders import Matrix, model_matrices

PEER = Path(".venv-llmcompressor/bin/python")
DEFAULT_OBSERVER = "memoryless_minmax"
OBSERVERS = (DEFAULT_OBSERVER, "memoryless_mse", "imatrix_mse")
FP4_OBSERVERS = ("nvfp4_expanded_mse", "nvfp4_expanded_imatrix")
# How much faster than that observer NVFP4 is meant to be.
NVFP4_SPEEDUP = ("nvfp4_expanded_mse", 100)


@dataclass(frozen=True)
class Measurement:
    """One quantizer on one data set; speed in M weights/s."""

    scheme: str
    data: str
    quantizer: str
    weighted_nmse: float
    nmse: float
    speed: float


def synthetic(name: str, n_weights: int) -> Matrix:
    rng = np.random.default_rng(0)
    shape = (max(1, n_weights // 1024), 1024)
    rows = rng.standard_t(5, shape) if name == "student-t" else rng.standard_normal(shape)
    return Matrix(to_bfloat16((0.02 * rows).astype(np.float32)), rng.lognormal(0, 1, 1024).astype(np.float32))


def to_bfloat16(rows: np.ndarray) -> np.ndarray:
    return bfloat16(bfloat16_bits(rows))


class Peer:
    """llm-compressor in its own process; matrices and results pass through files of a directory."""

    def __init__(self, jobs: TextIO, answers: TextIO, directory: Path, threads: int):
        self.jobs, self.answers, self.directory, self.threads = jobs, answers, directory, threads

    def quantize(self, scheme: Scheme, observer: str, matrix: Matrix) -> tuple[Tensors, float]:
        """The compressed tensors, and the seconds they took."""
        paths = {name: str(self.directory / name) for name in ("rows.npy", "importance.npy", "output.npz")}
        np.save(paths["rows.npy"], matrix.rows)
        np.save(paths["importance.npy"], matrix.importance)
        weights = {key: value for key, value in asdict(scheme.weights).items() if value is not None}
        job = {
            "rows": paths["rows.npy"],
            "importance": paths["importance.npy"],
            "output": paths["output.npz"],
            "scheme": {"weights": weights, "format": scheme.format},
            "observer": observer,
            "threads": self.threads,
        }
        print(json.dumps(job), file=self.jobs, flush=True)
        answer = self.answers.readline()
        if not answer:
            raise click.ClickException(f"llm-compressor ended while it quantized to {scheme.name} with {observer}")
        expected = scheme.codec.tensors(*matrix.rows.shape)
        with np.load(paths["output.npz"]) as archive:
            tensors = {
                suffix: archive[suffix].reshape(-1).view(NUMPY_DTYPES[dtype]).reshape(shape)
                for suffix, (dtype, shape) in expected.items()
            }
        return tensors, sum(json.loads(answer).values())


@contextmanager
def peer(python: Path, threads: int) -> Iterator[Peer]:
    reading, writing = os.pipe()
    command = [str(python), "scripts/peers/llmcompressor_peer.py", str(writing)]
    with (
        tempfile.TemporaryDirectory() as directory,
        os.fdopen(reading) as answers,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr, pass_fds=[writing], text=True) as process,
    ):
        os.close(writing)
        assert process.stdin
        yield Peer(process.stdin, answers, Path(directory), threads)


def quantizers_of(
    scheme: Scheme, llmcompressor: Peer | None, threads: int
) -> dict[str, Callable[[Matrix], tuple[Tensors, float]]]:
    """By name; what they return: the tensors and the seconds."""

    nvfp4 = scheme.format == "nvfp4-pack-quantized"

    def ours(effort: Effort, weighted: bool, widest: bool = False) -> Callable[[Matrix], tuple[Tensors, float]]:
        def quantize(matrix: Matrix) -> tuple[Tensors, float]:
            start = time.perf_counter()
            importance = matrix.importance if weighted else None
            divisor = 448 * 6 / float(np.abs(matrix.rows).max()) if widest else None
            tensors = scheme.encode(matrix.rows, importance, effort=effort, global_scale=divisor, n_threads=threads)
            return tensors, time.perf_counter() - start

        return quantize

    quantizers = {"ours": ours("best", True), "ours, plain": ours("best", False), "ours, fast": ours("fast", True)}
    if nvfp4:
        quantizers["ours, its global scale"] = ours("best", True, widest=True)
    if llmcompressor:
        names = OBSERVERS + (FP4_OBSERVERS if nvfp4 else ())
        if scheme.weights.strategy in ("tensor", "block"):  # which its imatrix observer falls back from
            names = tuple(name for name in names if "imatrix" not in name)
        for name in names:
            quantizers[name] = lambda matrix, name=name: llmcompressor.quantize(scheme, name, matrix)
    return quantizers


def nmse(scheme: Scheme, tensors: Tensors, matrix: Matrix) -> tuple[float, float]:
    """Weighted and plain, in float64."""
    exact, weights = matrix.rows.astype(np.float64), matrix.importance.astype(np.float64)
    squared = (exact - scheme.decode(tensors, matrix.rows.shape)) ** 2
    return (squared @ weights).sum() / (exact**2 @ weights).sum(), squared.sum() / (exact**2).sum()


def measure(
    scheme: Scheme, data: str, matrices: list[Matrix], llmcompressor: Peer | None, threads: int, repeats: int
) -> list[Measurement]:
    quantizers = quantizers_of(scheme, llmcompressor, threads)
    scheme.encode(matrices[0].rows[:1].repeat(2, axis=0), matrices[0].importance)  # compiles the kernels
    seconds: dict[str, list[float]] = {name: [] for name in quantizers}
    errors = {}
    for _ in range(repeats):
        for name, quantize in quantizers.items():
            results = [quantize(matrix) for matrix in matrices]
            seconds[name].append(sum(result[1] for result in results))
            pairs = [nmse(scheme, tensors, matrix) for (tensors, _), matrix in zip(results, matrices, strict=True)]
            errors[name] = [float(value) for value in np.mean(pairs, axis=0)]
    n_weights = sum(matrix.rows.size for matrix in matrices)
    return [
        Measurement(scheme.name, data, name, *errors[name], n_weights / statistics.median(seconds[name]) / 1e6)
        for name in quantizers
    ]


def verdicts(scheme: Scheme, measured: list[Measurement]) -> list[str]:
    """What misses its target: no observer may have a smaller error, and NVFP4 has to be that much faster than one."""
    by_name = {m.quantizer: m for m in measured}
    missed = []
    for m in measured:
        if m.quantizer.startswith("ours"):
            continue
        where = f"{scheme.name}, {m.data}, {m.quantizer}"
        if by_name["ours"].weighted_nmse > m.weighted_nmse:
            missed.append(f"{where}: weighted NMSE {by_name['ours'].weighted_nmse / m.weighted_nmse:.4f} times its own")
        if by_name["ours, plain"].nmse > m.nmse:
            missed.append(f"{where}: NMSE {by_name['ours, plain'].nmse / m.nmse:.4f} times its own")
        if m.quantizer == DEFAULT_OBSERVER and by_name["ours, fast"].weighted_nmse > m.weighted_nmse:
            ratio = by_name["ours, fast"].weighted_nmse / m.weighted_nmse
            missed.append(f"{where}: weighted NMSE of fast {ratio:.4f} times its own")
        observer, speedup = NVFP4_SPEEDUP
        if m.quantizer == observer and by_name["ours"].speed < speedup * m.speed:
            missed.append(f"{where}: {by_name['ours'].speed / m.speed:.0f} times its speed")
    return missed


def print_table(measured: list[Measurement]) -> None:
    default = {m.data: m for m in measured if m.quantizer == DEFAULT_OBSERVER}
    ratio = f"{'to default':>12}" if default else ""
    click.echo(f"{'data':11}{'quantizer':24}{'weighted NMSE':>14}{'NMSE':>12}{ratio}{'M weights/s':>13}")
    for m in measured:
        click.echo(f"{m.data:11}{m.quantizer:24}{m.weighted_nmse:14.3e}{m.nmse:12.3e}", nl=False)
        if default:
            click.echo(f"{m.weighted_nmse / default[m.data].weighted_nmse:12.3f}", nl=False)
        click.echo(f"{m.speed:13.3f}")


@click.command(help=__doc__)
@click.option("--model", help="Hugging Face directory or Hub id whose matrices are quantized.")
@click.option("--imatrix", type=click.Path(exists=True, path_type=Path), help="Its importance; else log-normal.")
@click.option("--scheme", "names", multiple=True, help="Schemes to measure; may be repeated. [default: one a storage]")
@click.option("--weights", default=1 << 18, show_default=True, help="Weights of a data set.")
@click.option("--repeats", default=3, show_default=True, help="Rounds.")
@click.option("--threads", default=1, show_default=True, help="Of either side.")
@click.option("--llmcompressor", default=PEER, type=click.Path(path_type=Path), show_default=True, help="Its Python.")
@click.option("--alone", is_flag=True, help="Measure ours only.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures to this file.")
def main(
    model: str | None,
    imatrix: Path | None,
    names: tuple[str, ...],
    weights: int,
    repeats: int,
    threads: int,
    llmcompressor: Path,
    alone: bool,
    json_path: Path | None,
) -> None:
    if not alone and not llmcompressor.exists():
        raise click.ClickException(f"{llmcompressor} is missing: make bench-schemes sets it up, --alone goes without")
    data = {"model": model_matrices(model, imatrix, weights)} if model else {}
    data |= {name: [synthetic(name, weights)] for name in ("gaussian", "student-t")}
    click.echo(f"about {weights} weights a data set, {repeats} rounds, threads: {threads} of {os.cpu_count()}")
    # Schemes that differ in their activations only store the same weights.
    by_storage = {(s.format, s.weights): s for s in reversed(SCHEMES.values())}
    chosen = [get_scheme(name) for name in names] or list(reversed(by_storage.values()))
    results, missed = [], []
    with peer(llmcompressor, threads) if not alone else nullcontext() as process:
        for scheme in chosen:
            click.echo(f"\n{scheme.name}, {scheme.bits_per_weight(1024, 1024):.3f} bits per weight at 1024 x 1024")
            for name, matrices in data.items():
                fitting = [matrix for matrix in matrices if scheme.fits(*matrix.rows.shape)]
                if len(fitting) < len(matrices):
                    click.echo(f"{len(matrices) - len(fitting)} of {len(matrices)} matrices of {name} do not fit")
                if fitting:
                    measured = measure(scheme, name, fitting, process, threads, repeats)
                    print_table(measured)
                    results += measured
                    missed += verdicts(scheme, measured)
    click.echo(f"\ntargets missed: {len(missed)}")
    for line in missed:
        click.echo(f"  {line}")
    if json_path:
        settings = {"model": model, "weights": weights, "repeats": repeats, "threads": threads}
        report = {"settings": settings, "missed": missed, "measurements": [asdict(m) for m in results]}
        json_path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
