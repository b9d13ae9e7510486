"""What error feedback costs beside a plain encode, on one core: both in turn in one process, and the medians.

encode      ns a weight of a plain encode at the best effort
quick, best the time of each level as a multiple of that: of feedback alone, and (with all) of everything that the stage
            does more, which is a second encode to start from and the judgement on 256 held-out inputs, too
e H e       what each leaves of the error under the inputs' second moments, as a share of the plain encode's

Weights are drawn from Student's t, inputs are of low rank with noise: the ratios of time are of use, the errors tell
levels apart, and no model is as kind as these inputs.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import get_args

import click
import numpy as np

from bitwright.converter.artifact.feedback import Inputs, output_squares
from bitwright.formats.block_format import BlockFormat
from bitwright.formats.choices import FeedbackLevel
from bitwright.formats.feedback.choose import feed_back, output_error
from bitwright.formats.feedback.moment_factor import factorize, unit_of
from bitwright.formats.registry import get_format

FORMATS = ("Q6_K", "Q4_K", "IQ4_XS", "Q3_K", "Q2_K", "IQ3_S", "IQ2_XXS")
LEVELS: tuple[FeedbackLevel, ...] = get_args(FeedbackLevel)
N_WEIGHTS = 1 << 20
"""Of a chunk, as `convert` encodes them."""


def inputs(n: int) -> np.ndarray:
    """Of a layer, float32 [2 n, n]."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((2 * n, n // 8), np.float32) @ rng.standard_normal((n // 8, n), np.float32)
    noisy = hidden + 2 * rng.standard_normal((2 * n, n), np.float32)
    return noisy * rng.lognormal(0, 0.7, n).astype(np.float32)


def seconds(work: Callable[[], object]) -> float:
    """Of this thread's own time, which others on the machine hardly change."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def row(block_format: BlockFormat, n: int, drawn: np.ndarray, moments: np.ndarray, repeats: int) -> str:
    rng = np.random.default_rng(1)
    rows = (rng.standard_t(5, (N_WEIGHTS // n, n)) * 0.02).astype(np.float32)
    factor = factorize(moments, unit_of(block_format))
    judged = Inputs(factor, np.ascontiguousarray(drawn[:256].T))
    importance = np.ascontiguousarray(factor.matrix.diagonal())
    plain = block_format.encode(rows, importance)
    start = block_format.encode(rows, factor.importance)
    fed = {level: feed_back(block_format, rows, start, factor, level) for level in LEVELS}

    def judge() -> None:
        output_squares(rows, [block_format.decode(data) for data in (plain, fed["quick"])], judged)

    works: dict[str, Callable[[], object]] = {
        "encode": lambda: block_format.encode(rows, importance),
        "judge": judge,
        "quick": lambda: feed_back(block_format, rows, start, factor, "quick"),
        "best": lambda: feed_back(block_format, rows, start, factor, "best"),
    }
    judge()
    times = [{name: seconds(work) for name, work in works.items()} for _ in range(repeats)]
    ratios = {name: median(found[name] / found["encode"] for found in times) for name in works}
    encode = median(found["encode"] for found in times) / rows.size * 1e9
    errors = [output_error(rows - block_format.decode(data), factor.matrix).sum() for data in (plain, *fed.values())]
    cells = [
        f"{ratios[level]:7.2f} {1 + ratios['judge'] + ratios[level]:9.2f} {error / errors[0]:7.4f}"
        for level, error in zip(LEVELS, errors[1:], strict=True)
    ]
    return f"{n:6} {block_format.name:<8} {encode:7.0f} ns {'   '.join(cells)}"


@click.command(help=__doc__)
@click.option("--columns", multiple=True, type=int, default=(1536, 4096), show_default=True)
@click.option("--format", "formats", multiple=True, default=FORMATS, show_default=True)
@click.option("--repeats", default=5, show_default=True)
def main(columns: tuple[int, ...], formats: tuple[str, ...], repeats: int) -> None:
    click.echo("     n format      encode   quick  with all   e H e      best  with all   e H e")
    for n in columns:
        drawn = inputs(n)
        moments = drawn.T @ drawn
        for name in formats:
            click.echo(row(get_format(name), n, drawn, moments, repeats))


if __name__ == "__main__":
    main()
