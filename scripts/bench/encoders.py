"""Hold every encoder against ggml's: speed, error and cold start.

Every round encodes the same rows with each of our efforts and with ggml's C encoder, one after the other in one
process, on one thread and then on all of them (row chunks over threads for both); speeds are medians over the rounds.
The weighted NMSE is the sum of importance x squared error over that of importance x squared weight, the mean over the
tensors of a data set; the plain one leaves importance out. Cold start is the first `best` call in a new process,
imports not counted: with an empty compiler cache, with a warm one, and ggml's.

Data sets: `model`, tensors of the first, middle and last layer of a checkpoint; `student-t`, weights of 5 degrees of
freedom; `outlier`, gaussian weights and one column in 4096 at 50 standard deviations.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import click
import numpy as np

from bitwright.calibration.statistics.imatrix_file import load_imatrix
from bitwright.converter.model.model_map import describe
from bitwright.converter.model.stored_rows import read_rows
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.block_format import BlockFormat
from bitwright.formats.blocks.fp4 import encode_nvfp4, nvfp4_tensor_scale
from bitwright.formats.choices import Effort
from bitwright.formats.registry import FORMATS, get_format
from bitwright.profiles.vocabulary import UNQUANTIZED_ROLES
from scripts.peers import ggml

N_COLUMNS = 4096
CHUNK_WEIGHTS = 1 << 16

# Ratios ours / ggml by effort: weighted NMSE at most, speed per thread at least. No entry, no targets.
_K = {"best": (0.96, 1.0), "fast": (1.0, 3.0)}
_SLOWER = {"best": (0.97, 0.5), "fast": (1.0, 1.0)}
_IQ1 = {"best": (0.88, 0.7), "fast": (1.0, 2.0)}
_TERNARY = {"best": (0.35, 0.1), "fast": (0.5, 0.3)}
TARGETS: dict[str, dict[str, tuple[float, float]]] = {
    **dict.fromkeys(("Q4_K", "Q5_K", "IQ3_XXS", "IQ3_S"), _K),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS"), _K | {"best": (0.98, 1.0)}),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S"), _K | {"best": (0.95, 1.0)}),
    "Q2_K": _K | {"best": (0.92, 1.0)},
    **dict.fromkeys(("IQ1_S", "IQ1_M"), _IQ1),
    **dict.fromkeys(("Q3_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"), _SLOWER),
    "Q8_0": {"best": (1.0, 0.7)},
    "Q1_0": _SLOWER | {"best": (1.0, 0.5)},
    **dict.fromkeys(("TQ1_0", "TQ2_0"), _TERNARY),
    "Q2_0": _TERNARY | {"best": (0.3, 0.1)},
    "NVFP4": {"best": (0.6, 0.5), "fast": (0.85, 1.0)},
}


@dataclass(frozen=True)
class Matrix:
    """rows float32 [n_rows, n_columns], importance float32 [n_columns]."""

    rows: np.ndarray
    importance: np.ndarray

    @cached_property
    def tensor_scale(self) -> float:
        return nvfp4_tensor_scale(float(np.abs(self.rows).max()))


@dataclass(frozen=True)
class Encoder:
    """encode(rows of a matrix, the matrix) -> bytes; decode(bytes, the matrix) -> rows; targets as in TARGETS."""

    name: str
    encode: Callable[[np.ndarray, Matrix], np.ndarray]
    decode: Callable[[np.ndarray, Matrix], np.ndarray]
    targets: tuple[float, float] | None = None


@dataclass(frozen=True)
class Measurement:
    """One encoder on one data set; speeds in M weights/s."""

    data: str
    encoder: str
    weighted_nmse: float
    nmse: float
    speed: float
    speed_all_threads: float


def synthetic(name: str, n_weights: int) -> Matrix:
    rng = np.random.default_rng(0)
    shape = (max(1, n_weights // N_COLUMNS), N_COLUMNS)
    if name == "student-t":
        rows = rng.standard_t(5, shape)
    else:
        rows = rng.standard_normal(shape)
        rows[:, 1234] = 50 * rng.choice([-1, 1], len(rows))
    return Matrix((0.02 * rows).astype(np.float32), rng.lognormal(0, 1, N_COLUMNS).astype(np.float32))


def model_matrices(model: str, imatrix: Path | None, n_weights: int) -> list[Matrix]:
    """The weight matrices of three layers, a share of n_weights each in rows that are spread evenly."""
    checkpoint = open_checkpoint(model)
    described = describe(checkpoint)
    layers = {0, described.n_layers // 2, described.n_layers - 1}
    specs = [t for t in described.tensors if t.layer in layers and t.role not in UNQUANTIZED_ROLES and t.n_rows > 1]
    importance = load_imatrix(imatrix) if imatrix else None
    matrices = []
    for index, spec in enumerate(specs):
        n_rows = spec.n_rows // spec.n_matrices
        rows = read_rows(checkpoint, spec, 0, n_rows)[:: max(1, n_rows * spec.n_columns * len(specs) // n_weights)]
        columns = importance.columns(spec.name)[0] if importance else log_normal(index, spec.n_columns)
        matrices.append(Matrix(np.ascontiguousarray(rows), columns))
    return matrices


def log_normal(seed: int, n_columns: int) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(0, 1, n_columns).astype(np.float32)


def encoders_of(block_format: BlockFormat) -> list[Encoder]:
    """Ours and, last, ggml's. NVFP4 is meant to have a tensor scale, so the targets are for that."""
    name, targets = block_format.name, TARGETS.get(block_format.name, {})

    def ours(effort: Effort) -> Encoder:
        return Encoder(
            effort,
            lambda rows, matrix: block_format.encode(rows, matrix.importance, effort),
            lambda data, matrix: block_format.decode(data),
            targets.get(effort) if name != "NVFP4" else None,
        )

    def scaled(effort: Effort) -> Encoder:
        return Encoder(
            f"{effort}, tensor scale",
            lambda rows, matrix: encode_nvfp4(rows, matrix.importance, effort, matrix.tensor_scale),
            lambda data, matrix: block_format.decode(data) * np.float32(matrix.tensor_scale),
            targets.get(effort),
        )

    theirs = Encoder(
        "ggml",
        lambda rows, matrix: ggml.quantize(rows, name, matrix.importance),
        lambda data, matrix: ggml.dequantize(data, name, matrix.rows.shape[1]),
    )
    with_scale = [scaled("best"), scaled("fast")] if name == "NVFP4" else []
    return [ours("best"), ours("fast"), *with_scale, theirs]


def nmse(encoder: Encoder, matrices: list[Matrix]) -> tuple[float, float]:
    """Weighted and plain, in float64."""
    errors = []
    for matrix in matrices:
        exact = matrix.rows.astype(np.float64)
        squared = (exact - encoder.decode(encoder.encode(matrix.rows, matrix), matrix)) ** 2
        weights = matrix.importance.astype(np.float64)
        errors.append(((squared @ weights).sum() / (exact**2 @ weights).sum(), squared.sum() / (exact**2).sum()))
    weighted, plain = np.mean(errors, axis=0)
    return float(weighted), float(plain)


def seconds(encoder: Encoder, matrices: list[Matrix], pool: Executor | None) -> float:
    """Of encoding all matrices, on this thread or in row chunks on the pool's."""
    pieces = [
        (piece, matrix)
        for matrix in matrices
        for piece in np.array_split(matrix.rows, max(1, matrix.rows.size // CHUNK_WEIGHTS))
    ]
    start = time.perf_counter()
    if pool is None:
        for matrix in matrices:
            encoder.encode(matrix.rows, matrix)
    else:
        list(pool.map(lambda piece: encoder.encode(*piece), pieces))
    return time.perf_counter() - start


def measure(
    block_format: BlockFormat, data: str, matrices: list[Matrix], threads: int, repeats: int
) -> list[Measurement]:
    encoders = encoders_of(block_format)
    n_weights = sum(matrix.rows.size for matrix in matrices)
    errors = [nmse(encoder, matrices) for encoder in encoders]  # compiles kernels and builds ggml's tables, too
    speeds = []
    with ThreadPoolExecutor(threads) as executor:
        for pool in (None, executor):
            rounds = [[seconds(encoder, matrices, pool) for encoder in encoders] for _ in range(repeats)]
            speeds.append([n_weights / statistics.median(times) / 1e6 for times in zip(*rounds, strict=True)])
    return [
        Measurement(data, encoder.name, *error, *speed)
        for encoder, error, *speed in zip(encoders, errors, *speeds, strict=True)
    ]


_FIRST_CALL = """
import sys, time
import numpy as np
from bitwright.formats.registry import get_format
from scripts.peers import ggml
block_format = get_format(sys.argv[1])
rows = np.linspace(-1, 1, 4 * block_format.block_size, dtype=np.float32)[None]
importance = np.linspace(0.5, 2, rows.size, dtype=np.float32)
ggml.library()
for encode in (lambda: block_format.encode(rows, importance), lambda: ggml.quantize(rows, sys.argv[1], importance)):
    start = time.perf_counter()
    encode()
    print(time.perf_counter() - start)
"""


def cold_start(name: str) -> dict[str, float]:
    """Seconds of the first call, in new processes."""
    with tempfile.TemporaryDirectory() as cache:
        runs = [
            subprocess.run(
                [sys.executable, "-c", _FIRST_CALL, name],
                env={**os.environ, "NUMBA_CACHE_DIR": cache},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            for _ in range(2)
        ]
    (empty, _), (warm, theirs) = (map(float, run.stdout.split()) for run in runs)
    return {"empty_cache": empty, "warm_cache": warm, "ggml": theirs}


@dataclass(frozen=True)
class Ratio:
    """Ours / ggml. most, least: the targets of weighted_nmse and speed; None where there are none."""

    data: str
    encoder: str
    weighted_nmse: float
    nmse: float
    speed: float
    speed_all_threads: float
    most: float | None
    least: float | None

    @property
    def verdict(self) -> str:
        if self.most is None or self.least is None:
            return "no target"
        missed = ["NMSE"] * (self.weighted_nmse > self.most) + ["speed"] * (self.speed < self.least)
        return f"MISSED: {', '.join(missed)}" if missed else "met"


def ratios(block_format: BlockFormat, measured: list[Measurement]) -> list[Ratio]:
    theirs = {m.data: m for m in measured if m.encoder == "ggml"}
    targets = {encoder.name: encoder.targets or (None, None) for encoder in encoders_of(block_format)}
    return [
        Ratio(
            m.data,
            m.encoder,
            m.weighted_nmse / theirs[m.data].weighted_nmse,
            m.nmse / theirs[m.data].nmse,
            m.speed / theirs[m.data].speed,
            m.speed_all_threads / theirs[m.data].speed_all_threads,
            *targets[m.encoder],
        )
        for m in measured
        if m.encoder != "ggml"
    ]


def print_tables(measured: list[Measurement], compared: list[Ratio], threads: int) -> None:
    all_threads = f"{threads} threads"
    click.echo(f"{'M weights/s':>66}\n{'data':11}{'encoder':20}{'weighted NMSE':>14}{'NMSE':>10}", nl=False)
    click.echo(f"{'1 thread':>11}{all_threads:>11}")
    for m in measured:
        click.echo(f"{m.data:11}{m.encoder:20}{m.weighted_nmse:14.6f}{m.nmse:10.6f}", nl=False)
        click.echo(f"{m.speed:11.1f}{m.speed_all_threads:11.1f}")
    click.echo("ratios ours / ggml, targets in brackets")
    for r in compared:
        most, least = (f"({target:g})" if target is not None else "" for target in (r.most, r.least))
        click.echo(f"{r.data:11}{r.encoder:20}{r.weighted_nmse:7.3f} {most:6}{r.nmse:10.3f}", nl=False)
        click.echo(f"{r.speed:7.2f} {least:5}{r.speed_all_threads:9.2f}  {r.verdict}")


@dataclass(frozen=True)
class Result:
    """Of one format; cold_start: seconds, as cold_start returns them."""

    name: str
    cold_start: dict[str, float]
    measurements: list[Measurement]
    ratios: list[Ratio]


def bench_format(block_format: BlockFormat, data: dict[str, list[Matrix]], threads: int, repeats: int) -> Result:
    """Measure one format on all data, and print its tables."""
    click.echo(f"\n{block_format.name}, {block_format.bits_per_weight:g} bits per weight")
    cold = cold_start(block_format.name)
    figures = f"{cold['empty_cache']:.2f} s with an empty cache, {cold['warm_cache']:.2f} s with a warm one"
    click.echo(f"first call: {figures}; ggml {cold['ggml']:.2f} s")
    measured = []
    for name, matrices in data.items():
        fitting = [matrix for matrix in matrices if block_format.fits(matrix.rows.shape[1])]
        if fitting:
            measured += measure(block_format, name, fitting, threads, repeats)
        if len(fitting) < len(matrices):
            click.echo(f"{len(matrices) - len(fitting)} of {len(matrices)} tensors of {name} do not fit its blocks")
    compared = ratios(block_format, measured)
    print_tables(measured, compared, threads)
    return Result(block_format.name, cold, measured, compared)


@click.command(help=__doc__)
@click.option("--model", help="Hugging Face directory or Hub id whose tensors are encoded.")
@click.option("--imatrix", type=click.Path(exists=True, path_type=Path), help="Its importance; else log-normal.")
@click.option("--format", "names", multiple=True, help="Formats to measure; may be repeated. [default: all]")
@click.option("--weights", default=1 << 20, show_default=True, help="Weights of a data set.")
@click.option("--repeats", default=5, show_default=True, help="Rounds of timing.")
@click.option("--threads", default=os.cpu_count() or 1, show_default=True, help="What `all threads` means.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures to this file.")
def main(
    model: str | None,
    imatrix: Path | None,
    names: tuple[str, ...],
    weights: int,
    repeats: int,
    threads: int,
    json_path: Path | None,
) -> None:
    data = {"model": model_matrices(model, imatrix, weights)} if model else {}
    data |= {name: [synthetic(name, weights)] for name in ("student-t", "outlier")}
    importance = f"importance of {imatrix}" if imatrix else "a log-normal importance, as no --imatrix is given"
    source = f"model is {model} with {importance}" if model else "no --model is given"
    click.echo(f"about {weights} weights a data set, median of {repeats} rounds; {source}")
    chosen = map(get_format, names) if names else (f for f in FORMATS.values() if f.block_size > 1)
    results = [bench_format(block_format, data, threads, repeats) for block_format in chosen]
    ours = [(result.name, ratio) for result in results for ratio in result.ratios]
    missed = [(name, ratio) for name, ratio in ours if ratio.verdict.startswith("MISSED")]
    click.echo(f"\n{len(ours) - len(missed)} of {len(ours)} rows meet their targets or have none")
    for name, ratio in missed:
        click.echo(f"  {name}, {ratio.data}, {ratio.encoder}: {ratio.verdict}")
    if json_path:
        settings = {"weights": weights, "repeats": repeats, "threads": threads, "source": source}
        report = {"settings": settings, "formats": [asdict(result) for result in results]}
        json_path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
