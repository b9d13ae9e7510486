"""How right `bitwright advise` is: every measured device predicted from the others, beside what other tools compute.

    python -m scripts.bench.advise            (make bench-advise)

Decode of one text: error of the predicted tokens a second, against scripts/advice/measured.csv. "held" is the share of
the points that lie in the range stated for them; the range, too, comes from the other devices alone. The peers' formula
is a share of 0.55 of the bandwidth over the bytes of the file. Prefill is stated as a class, whose share of right ones
is "held". Batches have no range: texts that have experts in common read less than is counted here, and the ceiling of a
batch is what they read if they had all in common. Exits with 1 where a figure misses its bar.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitwright.profiles.advice.efficiency import PREFILL_CLASS
from scripts.advice.fit import Left, calibrated, fit_group, left_out, prefill_left_out, prompts, single, spread
from scripts.advice.points import Point, kernel_points, measured_points

GDDR = "cuda-gddr"


@dataclass(frozen=True)
class Bar:
    what: str
    figure: float
    low: float
    high: float

    @property
    def met(self) -> bool:
        return self.low <= self.figure <= self.high


def held(points: Sequence[Point], kernels: Sequence[Point]) -> dict[int, bool]:
    """Of each point, by its place, whether the range that the other devices give holds it."""
    found = {}
    places = {id(point): place for place, point in enumerate(points)}
    for hardware in dict.fromkeys(point.hardware for point in points):
        train = [point for point in points if point.hardware != hardware]
        others = [point for point in kernels if point.hardware != hardware]
        lefts = left_out(train, others)
        for point in points:
            if point.hardware == hardware:
                fit = fit_group(train, others, point.group)
                if fit is not None:
                    low, high = spread(lefts, point.group)
                    ratio = point.tokens_per_s / fit.tokens_per_s(point)
                    found[places[id(point)]] = low <= ratio <= high
    return found


def quantiles(errors: Sequence[float]) -> tuple[float, float]:
    return 100 * float(np.median(errors)), 100 * float(np.quantile(errors, 0.9))


def line(name: str, lefts: Sequence[Left], inside: Sequence[bool] | None) -> str:
    median, ninety = quantiles([left.error for left in lefts])
    ratios = [left.ratio for left in lefts]
    devices = len({left.point.hardware for left in lefts})
    share = "     " if inside is None else f"{100 * float(np.mean(inside)):4.0f} %"
    spread_text = f"{np.quantile(ratios, 0.1):.2f} to {np.quantile(ratios, 0.9):.2f}"
    return f"{name:34} {len(lefts):6} {devices:7} {median:8.1f} % {ninety:8.1f} %   {share}   {spread_text}"


def main() -> None:
    every, kernels = measured_points(), kernel_points()
    points = single(every)
    lefts = left_out(points, kernels)
    inside = held(points, kernels)
    is_held = {id(point): inside[place] for place, point in enumerate(points) if place in inside}

    def group(*names: str) -> list[Left]:
        return [left for left in lefts if left.point.group.startswith(names)]

    def row(name: str, some: list[Left]) -> None:
        print(line(name, some, [is_held[id(left.point)] for left in some]))

    print(
        f"{'decode, device left out':34} {'points':>6} {'devices':>7} {'median':>10} {'90 %':>10}     held"
        "   measured / predicted"
    )
    no_cpu = [left for left in lefts if left.point.group != "cpu"]
    row("all but CPUs", no_cpu)
    for label, prefixes in (
        ("llama.cpp, CUDA, GDDR and LPDDR", (GDDR,)),
        ("llama.cpp, CUDA, HBM", ("cuda-hbm",)),
        ("llama.cpp, Metal", ("metal",)),
        ("llama.cpp, ROCm and Vulkan", ("rocm",)),
        ("vLLM and kin, from kernel sums", ("vllm-",)),
        ("llama.cpp, CPU (a class)", ("cpu",)),
    ):
        row(label, group(*prefixes))
    peers = [abs(0.55 * p.device.bandwidth / p.file_bytes / p.tokens_per_s - 1) for p in points]
    ceiling = [abs(point.ceiling / point.tokens_per_s - 1) for point in points]
    for label, errors in (("peers: 0.55 x bandwidth / file", peers), ("the bare ceiling", ceiling)):
        median, ninety = quantiles(errors)
        print(f"{label:34} {len(errors):6} {'':7} {median:8.1f} % {ninety:8.1f} %")
    print(line("one speed of the device measured", calibrated(lefts), None))
    batches = [point for point in every if point.kind == "tg" and point.batch > 1]
    batch_lefts = []
    for point in batches:
        train = [other for other in points if other.hardware != point.hardware]
        fit = fit_group(train, kernels, point.group)
        assert fit is not None
        batch_lefts.append(Left(point, fit.tokens_per_s(point)))
    print(line("decode of batches", batch_lefts, None))
    asked = prompts(every)
    prefill = prefill_left_out(asked)
    of_prefill = [1 / PREFILL_CLASS <= left.ratio <= PREFILL_CLASS for left in prefill]
    print(line("prefill (a class)", prefill, of_prefill))

    above = sum(point.tokens_per_s > point.ceiling for point in [*points, *batches])
    over = sum(left.predicted > left.point.ceiling for left in [*lefts, *batch_lefts])
    median, ninety = quantiles([left.error for left in no_cpu])
    gddr_median, gddr_ninety = quantiles([left.error for left in group(GDDR)])
    bars = [
        Bar("all but CPUs, median error in %", median, 0, 8),
        Bar("all but CPUs, error of 90 % in %", ninety, 0, 28),
        Bar("GDDR and LPDDR, median error in %", gddr_median, 0, 5.5),
        Bar("GDDR and LPDDR, error of 90 % in %", gddr_ninety, 0, 18),
        Bar("points in their ranges in %", 100 * float(np.mean([is_held[id(p.point)] for p in no_cpu])), 76, 84),
        Bar("points measured above the ceiling", above, 0, 0),
        Bar("points predicted above the ceiling", over, 0, 0),
        Bar("prompts in their class in %", 100 * float(np.mean(of_prefill)), 80, 100),
    ]
    print()
    for bar in bars:
        wanted = f"at most {bar.high:g}" if bar.low == 0 else f"{bar.low:g} to {bar.high:g}"
        print(f"{bar.what:38} {bar.figure:7.1f}   {wanted:12} {'met' if bar.met else 'MISSED'}")
    sys.exit(0 if all(bar.met for bar in bars) else 1)


if __name__ == "__main__":
    main()
