"""How far every encoder is from the best that its format can do.

On a sample of blocks of each data set of bench.encoders, our codes and ggml's stand beside a search that may take all
the time it wants. The figures are weighted squared errors over those of that search. What it is depends on the format:

every scale      one stored scale a block: all of them, of either sign, with the nearest level for every weight.
any low          Q4_1, Q5_1: all float16 scales, and for each the best low of all real numbers, by a sweep over the
                 changes of codes. So the bound is a little below what float16 lows reach.
every d          Q6_K, Q3_K, IQ4_XS: all float16 d, of either sign, from half of the one that needs the whole range of
                 the sub-blocks' scales to sixteen times that; for each, all stored scales of every sub-block.
long search      Q2_K, Q4_K, Q5_K: for a given d and dmin, all stored scales and minima of every sub-block. d and dmin
                 start on a grid, are refitted to their codes while that helps, and walk at random from the best places.
                 No proof, but the search finds the same from one start as from all.

Except `long search` these are the optima of the formats. Written without the encoders' code, in float64.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import numpy as np
from numba import njit

from bitwright.formats.blocks.fp4 import MXFP4_STEPS, NVFP4_STEPS, SIGNED_LEVELS
from bitwright.formats.kernels.level_search import LEVELS as IQ4_LEVELS
from bitwright.formats.registry import get_format
from scripts.bench.encoders import Matrix, encoders_of, model_matrices, synthetic

_ALL_F16 = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
F16 = np.unique(_ALL_F16[np.isfinite(_ALL_F16)])

_jit = njit(nogil=True, cache=True, error_model="numpy")


@_jit
def errors_of_scales(x, w, scales, levels, uniform, errors, nearest):
    """errors[t] = sum of w (x - scales[t] level)^2, each weight on its nearest level.

    uniform: the levels are all integers from the first to the last. nearest: room for one number a scale.
    """
    errors[:] = 0.0
    for j in range(x.size):
        if uniform:
            bottom, top = levels[0], levels[-1]
            for t in range(scales.size):
                inverse = 1.0 / scales[t] if scales[t] != 0.0 else 0.0
                r = x[j] - scales[t] * np.rint(min(max(x[j] * inverse, bottom), top))
                errors[t] += w[j] * (r * r)
        else:
            nearest[:] = np.inf
            for level in levels:
                for t in range(scales.size):
                    r = x[j] - scales[t] * level
                    nearest[t] = min(nearest[t], r * r)
            for t in range(scales.size):
                errors[t] += w[j] * nearest[t]


@_jit
def least_over_lows(x, w, scales, top):
    """The least of sum of w (x - scale code - low)^2 over codes 0 .. top, the given scales > 0, and any low.

    As low rises, the code of a weight falls from c + 1 to c at low / scale = x / scale - 1/2 - c. The remainders of
    that order these events within every unit of low / scale. After each event the best low of the codes, and its error,
    are known in closed form, so that the least of them all is the optimum.
    """
    best, sum_w = np.inf, w.sum()
    for scale in scales:
        position = x / scale - 0.5
        floors = np.floor(position)
        order = np.argsort(position - floors)
        residuals = x - scale * top
        first, second = (w * residuals).sum(), (w * residuals * residuals).sum()
        best = min(best, second - first * first / sum_w)
        for unit in range(int(floors.min()) - int(top) + 1, int(floors.max()) + 1):
            for j in order:
                code = floors[j] - unit
                if 0 <= code < top:
                    r = x[j] - scale * code
                    first += w[j] * scale
                    second += w[j] * scale * (r + r - scale)
                    best = min(best, second - first * first / sum_w)
    return max(best, 0.0)


@_jit
def error_of_steps(x, w, n_sub, d, scale_codes, levels, uniform, room):
    """The least error under one d: the sum over sub-blocks of their best stored scale's; room float64 [3, n_scales]."""
    size, error = x.size // n_sub, 0.0
    scales, errors, nearest = room[0], room[1], room[2]
    for t in range(scale_codes.size):
        scales[t] = d * scale_codes[t]
    for i in range(n_sub):
        part = slice(i * size, (i + 1) * size)
        errors_of_scales(x[part], w[part], scales, levels, uniform, errors, nearest)
        error += errors.min()
    return error


@_jit
def least_over_steps(x, w, n_sub, steps, scale_codes, levels, uniform):
    least, room = np.inf, np.empty((3, scale_codes.size))
    for d in steps:
        least = min(least, error_of_steps(x, w, n_sub, d, scale_codes, levels, uniform, room))
    return least


@_jit
def choose_pairs(x, w, n_sub, d, dmin, top, top_scale, normal):
    """The least error under one d and dmin, over all stored scales and minima, 0 .. top_scale, of every sub-block.

    normal: gets the normal equations of d and dmin for the codes of that choice, float64 [5].
    """
    size, total = x.size // n_sub, 0.0
    errors, n_codes = np.empty(top_scale + 1), top_scale + 1
    normal[:] = 0.0
    for i in range(n_sub):
        first = i * size
        least, best_s, best_m = np.inf, 0, 0
        for s in range(n_codes):
            scale = d * s
            inverse = 1.0 / scale if scale > 0.0 else 0.0
            errors[:] = 0.0
            for j in range(first, first + size):
                for m in range(n_codes):
                    shifted = x[j] + dmin * m
                    r = shifted - scale * np.rint(min(max(shifted * inverse, 0.0), top))
                    errors[m] += w[j] * (r * r)
            m = errors.argmin()
            if errors[m] < least:
                least, best_s, best_m = errors[m], s, m
        total += least
        scale = d * best_s
        for j in range(first, first + size):
            shifted = x[j] + dmin * best_m
            code = np.rint(min(max(shifted / scale, 0.0), top)) if scale > 0.0 else 0.0
            a, b = best_s * code, -float(best_m)
            normal[0] += w[j] * a * a
            normal[1] += w[j] * a * b
            normal[2] += w[j] * b * b
            normal[3] += w[j] * a * x[j]
            normal[4] += w[j] * b * x[j]
    return total


def least_over_walks(block: np.ndarray, w: np.ndarray, n_sub: int, top: int, top_scale: int, effort: int) -> float:
    """The long search; effort: of starts on either axis, and ten times that many steps of a walk."""
    normal, rng = np.empty(5), np.random.default_rng(0)
    parts = block.reshape(n_sub, -1)
    lows = np.minimum(parts.min(axis=1), 0)
    reach = float((np.maximum(parts.max(axis=1), 0) - lows).max() / top / top_scale), float(-lows.min() / top_scale)

    def try_steps(steps: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Error, d and dmin as float16, and their least-squares successors."""
        d, dmin = np.minimum(np.abs(steps), 65504).astype(np.float16).astype(np.float64)
        error = choose_pairs(block, w, n_sub, d, dmin, float(top), top_scale, normal)
        matrix = np.array([[normal[0], normal[1]], [normal[1], normal[2]]])
        return error, np.array([d, dmin]), np.linalg.lstsq(matrix, normal[3:], rcond=None)[0]

    def settle(steps: np.ndarray) -> tuple[float, np.ndarray]:
        error, steps, refitted = try_steps(steps)
        while True:
            next_error, next_steps, next_refitted = try_steps(refitted)
            if next_error >= error:
                return error, steps
            error, steps, refitted = next_error, next_steps, next_refitted

    # From a little more than the codes need, as where the largest weights do not matter, to few of the codes.
    shares = np.geomspace(0.8, 2.5, effort)
    settled = [settle(np.array([reach[0] * a, reach[1] * b])) for a in shares for b in shares]
    settled.sort(key=lambda place: place[0])
    least = settled[0][0]
    for place in settled[:4]:
        error, steps = place
        for width in np.geomspace(0.05, 0.0005, 10 * effort):
            next_error, next_steps = settle(steps * (1 + width * rng.standard_normal(2)))
            if next_error < error:
                error, steps = next_error, next_steps
        least = min(least, error)
    return least


def least_of_scales(block: np.ndarray, w: np.ndarray, scales: np.ndarray, levels: np.ndarray) -> float:
    # Under a scale of more than twice the largest weight all codes are zero, or the nearest to it.
    tried = scales[np.abs(scales) <= 2 * max(np.abs(block).max(), F16[F16 > 0][0])]
    errors = np.empty_like(tried)
    errors_of_scales(block, w, tried, levels, is_uniform(levels), errors, np.empty_like(tried))
    return float(errors.min())


def least_of_lows(block: np.ndarray, w: np.ndarray, top: int) -> float:
    centred = block - block.mean()
    step = np.ptp(centred) / top
    return least_over_lows(centred, w, F16[(step / 8 <= F16) & (3 * step >= F16) & (F16 > 0)], float(top))


def least_of_steps(block: np.ndarray, w: np.ndarray, n_sub: int, scale_codes: np.ndarray, levels: np.ndarray) -> float:
    whole_range = np.abs(block).max() / np.abs(levels).max() / np.abs(scale_codes).max()
    steps = F16[(np.abs(F16) >= whole_range / 2) & (np.abs(F16) <= 16 * whole_range)]
    return least_over_steps(block, w, n_sub, steps, scale_codes, levels, is_uniform(levels))


def is_uniform(levels: np.ndarray) -> bool:
    return bool((np.diff(levels) == 1).all())


def integers(first: int, last: int) -> np.ndarray:
    return np.arange(first, last + 1, dtype=np.float64)


Bound = Callable[[np.ndarray, np.ndarray], float]
"""(block, weights), float64 [block_size] -> the least weighted squared error."""


def bound_of(name: str, effort: int, tensor_scale: float) -> tuple[str, Bound]:
    """What kind of search it is, and the search; tensor_scale: NVFP4's."""
    iq4, fp4 = IQ4_LEVELS.astype(np.float64), np.unique(SIGNED_LEVELS).astype(np.float64)
    scales: dict[str, tuple[np.ndarray, np.ndarray]] = {
        "Q8_0": (F16, integers(-127, 127)),
        "Q5_0": (F16, integers(-16, 15)),
        "Q4_0": (F16, integers(-8, 7)),
        "IQ4_NL": (F16, iq4),
        "Q2_0": (F16, integers(-1, 2)),
        "TQ2_0": (F16, integers(-1, 1)),
        "TQ1_0": (F16, integers(-1, 1)),
        "Q1_0": (F16, np.array([-1.0, 1.0])),
        "MXFP4": (MXFP4_STEPS.astype(np.float64), fp4),
        "NVFP4": (NVFP4_STEPS.astype(np.float64) * tensor_scale, fp4),
    }
    steps: dict[str, tuple[int, np.ndarray, np.ndarray]] = {
        "Q6_K": (16, integers(-128, 127), integers(-32, 31)),
        "Q3_K": (16, integers(-32, 31), integers(-4, 3)),
        "IQ4_XS": (8, integers(-32, 31), iq4),
    }
    walks = {"Q5_K": (8, 31, 63), "Q4_K": (8, 15, 63), "Q2_K": (16, 3, 15)}
    if name in scales:
        candidates, levels = scales[name]
        return "every scale", partial(least_of_scales, scales=candidates, levels=levels)
    if name in steps:
        n_sub, codes, levels = steps[name]
        return "every d", partial(least_of_steps, n_sub=n_sub, scale_codes=codes, levels=levels)
    if name in walks:
        n_sub, top, top_scale = walks[name]
        return "long search", partial(least_over_walks, n_sub=n_sub, top=top, top_scale=top_scale, effort=effort)
    return "any low", partial(least_of_lows, top={"Q4_1": 15, "Q5_1": 31}[name])


NAMES = (
    *("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS"),
    *("MXFP4", "NVFP4", "Q2_0", "TQ2_0", "TQ1_0", "Q1_0"),
)


def ratios_to_bound(name: str, matrices: list[Matrix], n_blocks: int, effort: int) -> tuple[str, dict[str, float]]:
    """The kind of search, and each encoder's error over the search's, on about n_blocks blocks.

    They are those of whole rows, spread evenly over every matrix, so that an outlier's column is there as often as in
    the matrix. Their errors are counted as shares of their matrix's sum of squares.
    """
    block_format = get_format(name)
    fitting = [matrix for matrix in matrices if block_format.fits(matrix.rows.shape[1])]
    encoders = [e for e in encoders_of(block_format) if name != "NVFP4" or "scale" in e.name or e.name == "ggml"]
    # NVFP4 has a scale for every 16 weights of its blocks of 64.
    size = 16 if name == "NVFP4" else block_format.block_size
    sums, bound_sum, kind = dict.fromkeys((e.name for e in encoders), 0.0), 0.0, ""
    for matrix in fitting:
        kind, bound = bound_of(name, effort, matrix.tensor_scale)
        n_rows = min(len(matrix.rows), -(-n_blocks * size // (len(fitting) * matrix.rows.shape[1])))
        rows = np.ascontiguousarray(matrix.rows[:: len(matrix.rows) // n_rows][:n_rows])
        exact, importance = rows.astype(np.float64), matrix.importance.astype(np.float64)
        norm = (exact**2 @ importance).mean()
        for encoder in encoders:
            squared = (exact - encoder.decode(encoder.encode(rows, matrix), matrix)) ** 2
            sums[encoder.name] += (squared @ importance).mean() / norm
        weights = np.broadcast_to(importance, exact.shape)
        pairs = zip(exact.reshape(-1, size), weights.reshape(-1, size), strict=True)
        bound_sum += sum(bound(block, block_weights) for block, block_weights in pairs) / n_rows / norm
    return kind, {encoder: error / bound_sum for encoder, error in sums.items()}


@click.command(help=__doc__)
@click.option("--model", help="Hugging Face directory or Hub id whose tensors are encoded.")
@click.option("--imatrix", type=click.Path(exists=True, path_type=Path), help="Its importance; else log-normal.")
@click.option("--format", "names", multiple=True, help=f"May be repeated.  [default: {', '.join(NAMES)}]")
@click.option("--blocks", default=63, show_default=True, help="Blocks of a data set.")
@click.option("--effort", default=12, show_default=True, help="Of the long search: starts on either axis.")
def main(model: str | None, imatrix: Path | None, names: tuple[str, ...], blocks: int, effort: int) -> None:
    n_weights = 1 << 18
    data = {"model": model_matrices(model, imatrix, n_weights)} if model else {}
    data |= {name: [synthetic(name, n_weights)] for name in ("student-t", "outlier")}
    click.echo(f"weighted error over the bound's, {blocks} blocks a data set: {' / '.join(data)}")
    for name in names or NAMES:
        results = [ratios_to_bound(name, matrices, blocks, effort) for matrices in data.values()]
        columns = [f"{encoder} {' / '.join(f'{r[encoder]:.3f}' for _, r in results)}" for encoder in results[0][1]]
        click.echo(f"{name:8}{results[0][0]:13}{'   '.join(columns)}")


if __name__ == "__main__":
    main()
