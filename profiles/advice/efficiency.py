"""How much of a device's bandwidth and arithmetic runtimes reach: constants fitted to measurements, with the spread of
the measurements around them. `scripts/advice/fit.py` writes the file from scripts/advice/*.csv.

    seconds of a step = bytes / (bandwidth_share x bandwidth) + layers x layer_overhead

A layer with experts takes EXPERTS_OVERHEAD times the overhead: its router, and the gathering and scattering of tokens.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from bitwright.profiles.advice.hardware import Device, Runtime

COVERAGE = 0.8
"""The share of measured points that a stated range holds."""

EXPERTS_OVERHEAD = 1.5

EXPERTS_PREFILL = 0.6
"""What a prompt reaches of a dense model's rate where its tokens are shared out among experts."""

PREFILL_CLASS = 2.0
"""Prefill is stated as a class: the prediction by so much, either way. Builds and formats differ by more than devices
do, and no narrower statement is right in eight of ten cases."""


@dataclass(frozen=True)
class Decode:
    """bandwidth_share: of the bandwidth, when a kernel streams. layer_overhead: seconds a layer, of launches and of
    what streams badly. low, high: measured over predicted tokens a second, between which COVERAGE of the points lie,
    devices left out one by one. points, devices: behind it. of_kernels: the points are sums of kernels measured one by
    one, which a whole step takes longer than. is_class: the points are so few, or lie so far apart, that no figure is
    given but a class of speeds."""

    bandwidth_share: float
    layer_overhead: float
    low: float
    high: float
    points: int
    devices: int
    of_kernels: bool = False
    is_class: bool = False

    def seconds(self, n_bytes: float, n_layers: int, bandwidth: float, has_experts: bool) -> float:
        """Of a step that reads so many bytes."""
        overhead = self.layer_overhead * (EXPERTS_OVERHEAD if has_experts else 1)
        return n_bytes / (self.bandwidth_share * bandwidth) + n_layers * overhead


@dataclass(frozen=True)
class Prefill:
    """peak_share: of the dense rate in 16 bits. points, devices: as of Decode."""

    peak_share: float
    points: int
    devices: int

    def seconds(self, operations: float, rate: float, has_experts: bool) -> float:
        """Of a prompt; rate: operations a second of the device."""
        return operations / (rate * self.peak_share * (EXPERTS_PREFILL if has_experts else 1))


def decode_group(runtime: Runtime, backend: str, memory_kind: str, scheme: str = "") -> str:
    """The name of the group of measurements that a run belongs to. scheme: how vLLM's weights are stored."""
    if runtime == "vLLM":
        memory = "hbm" if memory_kind == "hbm" else "gddr"
        return f"vllm-{memory}-{scheme.lower()}"
    if backend == "cuda":
        return "cuda-hbm" if memory_kind == "hbm" else "cuda-gddr"
    return backend


def decode_constants(device: Device, runtime: Runtime, scheme: str = "") -> Decode:
    """Those of the device's group; of a scheme that nobody has measured in vLLM those of 16 bits, as a class."""
    table = _fitted()["decode"]
    name = decode_group(runtime, device.backend, device.memory_kind, scheme)
    if name in table:
        return Decode(**table[name])
    plain = decode_group(runtime, device.backend, device.memory_kind, "bf16")
    return Decode(**{**table[plain], "is_class": True})


def prefill_constants(device: Device, runtime: Runtime) -> Prefill | None:
    """None where nothing was measured of such devices."""
    name = decode_group(runtime, device.backend, device.memory_kind).rstrip("-")
    entry = _fitted()["prefill"].get(name)
    return None if entry is None else Prefill(**entry)


def prefill_speed_up(family: str) -> float:
    """Of a prompt's products in a number format of vLLM's over those in 16 bits, where the device computes in it: the
    median of the kernel tables; 1 of what is not in them."""
    return float(_fitted()["prefill_speed_up"].get(family.lower(), 1.0))


def measured_spread() -> tuple[float, float]:
    """The ratios of measured over predicted tokens a second once one speed of the device is known, and corrects the
    others: between them lie COVERAGE of the points of llama.cpp on GPUs."""
    entry = _fitted()["measured"]
    return entry["low"], entry["high"]


def measured_groups() -> Mapping[str, Decode]:
    """Every group of decode that was measured."""
    return {name: Decode(**entry) for name, entry in _fitted()["decode"].items()}


@cache
def _fitted() -> dict[str, Any]:
    return tomllib.loads((files("bitwright.profiles.advice") / "fitted.toml").read_text(encoding="utf-8"))
