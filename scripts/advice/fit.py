"""Fit the constants of profiles/advice/efficiency.py to the measurements beside this file, and write them.

    python -m scripts.advice.fit            writes profiles/advice/fitted.toml
    python -m scripts.advice.fit --check    says whether it is what would be written

Decode: bandwidth share and overhead a layer of a group are those with the least sum of |log(predicted / measured)|. A
device's points count as the root of their number together: thirty points of one machine say less than thirty machines.
Groups of GPUs lean on each other: the points of all others count as PRIOR points, which decides where one group has
two devices. Prefill: the share of the dense rate is the
median of what was reached.
Spread: every device is left out once, and predicted from the others; quantiles count a device's points as the fit does.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitwright.profiles.advice.efficiency import EXPERTS_PREFILL
from scripts.advice.points import Point, kernel_points, measured_points, prompt_sums

OUT = Path(__file__).parent.parent.parent / "profiles" / "advice" / "fitted.toml"
PRIOR = 0.7
GPUS = ("cuda-gddr", "cuda-hbm", "metal", "rocm")
DECODE = (0.1, 0.9)  # quantiles: eight of ten points lie between
# On CPUs cores, NUMA and formats decide as much as bandwidth: two devices say little, and a class is wide.
_CPU_FACTOR = 3.0
# A group with fewer devices or points says nothing of a spread of its own.
LEAST_DEVICES, LEAST_POINTS = 8, 10
_STANDARD_BYTES = 4.58 * 2**30  # Llama-3.1-8B in Q4_K_M
_SHARES = np.arange(0.5, 0.981, 0.01)
_OVERHEADS = np.arange(0, 241, 4) * 1e-6
_SHARE, _OVERHEAD = (grid.ravel() for grid in np.meshgrid(_SHARES, _OVERHEADS, indexing="ij"))
# Shares that kernels reach where matrices are large (decode attention and the largest products of the kernel tables);
# with one model alone behind the sums, share and overhead cannot be told apart.
_KERNEL_SHARE = {"hbm": 0.92, "gddr": 0.9}


@dataclass(frozen=True)
class Fit:
    bandwidth_share: float
    layer_overhead: float

    def tokens_per_s(self, point: Point) -> float:
        return point.batch / (
            point.n_bytes / (self.bandwidth_share * point.device.bandwidth) + point.overheads * self.layer_overhead
        )


def single(points: Iterable[Point]) -> list[Point]:
    """Decode of one text."""
    return [point for point in points if point.kind == "tg" and point.batch == 1]


def fit_decode(points: Sequence[Point], group: str) -> Fit:
    """Of a group of llama.cpp's backends."""
    own = [point for point in points if point.group == group]
    others = [point for point in points if point.group in GPUS and point.group != group] if group in GPUS else []
    weights = [*_weights(own), *(PRIOR / len(others) for _ in others)]
    used = own + others
    moved = np.array([point.n_bytes / point.device.bandwidth for point in used])
    overheads = np.array([point.overheads for point in used])
    seconds = np.array([point.seconds for point in used])
    predicted = moved / _SHARE[:, None] + overheads * _OVERHEAD[:, None]
    best = int((np.abs(np.log(predicted / seconds)) @ np.array(weights)).argmin())
    return Fit(float(_SHARE[best]), float(_OVERHEAD[best]))


def _weights(points: Sequence[Point]) -> list[float]:
    """What a point counts beside others of its device."""
    per_device = Counter(point.hardware for point in points)
    return [per_device[point.hardware] ** -0.5 for point in points]


def fit_kernels(points: Sequence[Point], group: str) -> Fit | None:
    """Of a scheme in vLLM: the overhead with the median that its points ask for; where it has none that of the other
    schemes."""
    memory = group.split("-")[1]
    share = _KERNEL_SHARE[memory]
    own = [point for point in points if point.group == group]
    own = own or [point for point in points if point.group.startswith(f"vllm-{memory}-")]
    if not own:
        return None
    asked = [(p.seconds - p.n_bytes / (share * p.device.bandwidth)) / p.overheads for p in own]
    return Fit(share, max(0.0, float(np.median(asked))))


def fit_group(points: Sequence[Point], kernels: Sequence[Point], group: str) -> Fit | None:
    """points: whole runs, kernels: sums of kernels, to learn from."""
    if group.startswith("vllm-"):
        return fit_kernels([*points, *kernels], group)
    return fit_decode(points, group)


@dataclass(frozen=True)
class Left:
    """A point, predicted without its device. ratio: measured over predicted."""

    point: Point
    predicted: float

    @property
    def ratio(self) -> float:
        return self.point.tokens_per_s / self.predicted

    @property
    def error(self) -> float:
        return abs(self.predicted / self.point.tokens_per_s - 1)


def left_out(points: Sequence[Point], kernels: Sequence[Point]) -> list[Left]:
    """Every point, predicted from the other devices' points."""
    found = []
    for hardware in dict.fromkeys(point.hardware for point in points):
        train = [point for point in points if point.hardware != hardware]
        train_kernels = [point for point in kernels if point.hardware != hardware]
        tested = [point for point in points if point.hardware == hardware]
        for group in dict.fromkeys(point.group for point in tested):
            fit = fit_group(train, train_kernels, group)
            if fit is not None:
                found += [Left(point, fit.tokens_per_s(point)) for point in tested if point.group == group]
    return found


def spread(lefts: Sequence[Left], group: str) -> tuple[float, float]:
    """The ratios between which COVERAGE of the group's points lie; a group of few devices takes those of all GPUs,
    widened to its own."""
    if group == "cpu":
        return 1 / _CPU_FACTOR, _CPU_FACTOR
    own = [left for left in lefts if left.point.group == group]
    if len({left.point.hardware for left in own}) >= LEAST_DEVICES and len(own) >= LEAST_POINTS:
        return _quantiles(own)
    low, high = _quantiles([left for left in lefts if left.point.group in GPUS])
    ratios = [left.ratio for left in own]
    return min([low, *ratios]), max([high, *ratios])


def calibrated(lefts: Sequence[Left]) -> list[Left]:
    """The points of devices with three or more, but for one that stands for the device: a model of 8B in Q4_K_M or what
    is nearest to it in bytes. Predictions are those that this point corrects."""
    found = []
    for hardware, group in dict.fromkeys((left.point.hardware, left.point.group) for left in lefts):
        own = [left for left in lefts if (left.point.hardware, left.point.group) == (hardware, group)]
        if len(own) >= 3 and group in GPUS:
            known = min(own, key=lambda left: abs(left.point.file_bytes - _STANDARD_BYTES))
            found += [Left(left.point, left.predicted * known.ratio) for left in own if left is not known]
    return found


def _quantiles(lefts: Sequence[Left]) -> tuple[float, float]:
    ordered = sorted(lefts, key=lambda left: left.ratio)
    weights = np.array(_weights([left.point for left in ordered]))
    places = (np.cumsum(weights) - weights / 2) / weights.sum()
    low, high = np.exp(np.interp(DECODE, places, np.log([left.ratio for left in ordered])))
    return float(low), float(high)


def prompts(points: Iterable[Point]) -> list[Point]:
    """Prefill on devices whose rate is known."""
    return [point for point in points if point.kind == "pp" and point.device.prompt_rate]


def reached(point: Point) -> float:
    """The share of the dense rate that a prompt reached, as one without experts would have."""
    assert point.device.prompt_rate is not None
    share = point.operations / point.tokens * point.tokens_per_s / point.device.prompt_rate
    return share / (EXPERTS_PREFILL if point.has_experts else 1)


def fit_prefill(points: Sequence[Point], group: str) -> float | None:
    own = sorted((point for point in points if point.group == group), key=reached)
    if not own:
        return None
    weights = np.array(_weights(own))
    places = (np.cumsum(weights) - weights / 2) / weights.sum()
    return float(np.exp(np.interp(0.5, places, np.log([reached(point) for point in own]))))


def prefill_left_out(points: Sequence[Point]) -> list[Left]:
    found = []
    for hardware in dict.fromkeys(point.hardware for point in points):
        train = [point for point in points if point.hardware != hardware]
        for point in points:
            if point.hardware == hardware and (share := fit_prefill(train, point.group)) is not None:
                found.append(Left(point, point.tokens_per_s * share / reached(point)))
    return found


def table() -> str:
    """The file."""
    points, kernels = single(measured_points()), kernel_points()
    lines = ["# Written by scripts/advice/fit.py from scripts/advice/measured.csv and kernels.csv.", ""]
    lefts = left_out(points, kernels)
    kernel_lefts = left_out([point for point in [*points, *kernels] if point.group.startswith("vllm-")], [])
    for group in sorted({point.group for point in [*points, *kernels]}):
        fit = fit_group(points, kernels, group)
        assert fit is not None
        own = [point for point in [*points, *kernels] if point.group == group]
        devices = {point.hardware for point in own}
        of_kernels = any(point.of_kernels for point in own)
        if group.startswith("vllm-"):
            low, high = spread([*lefts, *(left for left in kernel_lefts if left.point.of_kernels)], group)
        else:
            low, high = spread(lefts, group)
        is_class = group == "cpu" or len(devices) < 3
        lines += [
            f"[decode.{group}]",
            f"bandwidth_share = {fit.bandwidth_share:.2f}",
            f"layer_overhead = {fit.layer_overhead:.3g}",
            f"low = {low:.3f}",
            f"high = {high:.3f}",
            f"points = {len(own)}",
            f"devices = {len(devices)}",
            f"of_kernels = {str(of_kernels).lower()}",
            f"is_class = {str(is_class).lower()}",
            "",
        ]
    asked = prompts(measured_points())
    for group in sorted({point.group for point in asked}):
        share = fit_prefill(asked, group)
        own = [point for point in asked if point.group == group]
        lines += [
            f"[prefill.{group}]",
            f"peak_share = {share:.3f}",
            f"points = {len(own)}",
            f"devices = {len({point.hardware for point in own})}",
            "",
        ]
    return "\n".join([*lines, *_prompt_tables()]).rstrip() + "\n"


def _prompt_tables() -> list[str]:
    """Prefill in vLLM, from sums of kernels: the share of the rate that 16 bits reach, and what other formats gain."""
    sums, lines = prompt_sums(), []
    plain = {each.hardware: each for each in sums if each.format == "BF16"}
    for memory in ("gddr", "hbm"):
        shares = [each.share for each in plain.values() if each.memory == memory]
        lines += [
            f"[prefill.vllm-{memory}]",
            f"peak_share = {np.median(shares):.3f}",
            f"points = {len(shares)}",
            f"devices = {len(shares)}",
            "",
        ]
    lefts = left_out(single(measured_points()), kernel_points())
    ratios = calibrated(lefts)
    low, high = _quantiles(ratios)
    lines += ["[measured]", f"low = {low:.3f}", f"high = {high:.3f}", f"points = {len(ratios)}", ""]
    lines.append("[prefill_speed_up]")
    for name in dict.fromkeys(each.format for each in sums if each.format != "BF16"):
        gains = [plain[each.hardware].seconds / each.seconds for each in sums if each.format == name]
        lines.append(f"{name.lower()} = {np.median(gains):.2f}")
    return lines


def main() -> None:
    text = table()
    if "--check" in sys.argv:
        sys.exit(0 if OUT.read_text() == text else f"{OUT} is not what the measurements give")
    OUT.write_text(text)
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()
