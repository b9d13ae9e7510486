"""The roofline of a plan on a device: how long a step and a prompt take, where the time goes, what limits them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bitwright.profiles.advice.attention import KERNELS, prompt_bytes
from bitwright.profiles.advice.cache import Cache
from bitwright.profiles.advice.efficiency import PREFILL_CLASS, Decode, Prefill
from bitwright.profiles.advice.hardware import Attention, Device
from bitwright.profiles.advice.operators import GROUPS, Operator

Limit = Literal["memory", "compute"]


@dataclass(frozen=True)
class Bottleneck:
    """An operator of a step: its share of the step's bytes, its operations a byte, and what limits it; without a known
    rate nothing but memory is known of."""

    operator: str
    n_bytes: float
    operations: float
    share: float
    intensity: float
    limit: Limit


@dataclass(frozen=True)
class StepTime:
    """A decode step of a batch. seconds: predicted; low, high: tokens a second of all texts together, between which
    measurements lie. shares: group -> its part of the time. is_class, of_kernels: as of efficiency.Decode. floor:
    seconds when every byte comes at the full bandwidth, and the texts have every expert in common: how many they reach
    is a guess, and a ceiling is none."""

    seconds: float
    floor: float
    low: float
    high: float
    shares: dict[str, float]
    is_class: bool
    of_kernels: bool
    points: int
    devices: int


def step_time(
    operators: Sequence[Operator], n_layers: int, batch: int, device: Device, constants: Decode, has_experts: bool
) -> StepTime:
    """Bytes at the share of the bandwidth that runtimes reach, and an overhead a layer; of a large batch, arithmetic at
    the dense rate, where that takes longer."""
    n_bytes = sum(operator.n_bytes for operator in operators)
    operations = sum(operator.operations for operator in operators)
    seconds = constants.seconds(n_bytes, n_layers, device.bandwidth, has_experts)
    moving = constants.seconds(n_bytes, 0, device.bandwidth, has_experts)
    rate = device.rates.get("fp16")
    computing = operations / rate if rate else 0.0
    if computing > moving:
        seconds += computing - moving
    floor = max(sum(operator.least_bytes for operator in operators) / device.bandwidth, computing)
    groups = {}
    for name, kinds in GROUPS.items():
        of_group = sum(operator.n_bytes for operator in operators if operator.type in kinds)
        if of_group:
            groups[name] = of_group / n_bytes * max(moving, computing) / seconds
    groups["overhead"] = max(0.0, 1 - sum(groups.values()))
    speed = batch / seconds
    return StepTime(
        seconds,
        floor,
        speed * constants.low,
        min(speed * constants.high, batch / floor),
        groups,
        constants.is_class,
        constants.of_kernels,
        constants.points,
        constants.devices,
    )


def bottlenecks(operators: Sequence[Operator], device: Device) -> tuple[Bottleneck, ...]:
    """Of every operator; attention's products go by the cache that they read."""
    total = sum(operator.n_bytes for operator in operators)
    of_attention = [each for each in operators if each.type in GROUPS["keys and values"]]
    merged = {each.type.value: (each.n_bytes, each.operations) for each in operators if each not in of_attention}
    if of_attention:
        merged["kv_cache"] = (
            sum(each.n_bytes for each in of_attention),
            sum(each.operations for each in of_attention),
        )
    ridge = device.ridge()
    rows = []
    for name, (n_bytes, operations) in merged.items():
        intensity = operations / n_bytes if n_bytes else 0.0
        limit: Limit = "compute" if ridge is not None and intensity > ridge else "memory"
        rows.append(Bottleneck(name, n_bytes, operations, n_bytes / total, intensity, limit))
    return tuple(sorted(rows, key=lambda row: -row.n_bytes))


@dataclass(frozen=True)
class PromptTime:
    """A prompt of so many tokens. low, high: the class of tokens a second. limit: what takes the time."""

    seconds: float
    low: float
    high: float
    limit: Limit


def prompt_time(
    operations: float,
    tokens: int,
    weights_bytes: float,
    cache: Cache,
    device: Device,
    rate: float | None,
    constants: Prefill | None,
    kernel: Attention,
    *,
    speed_up: float = 1.0,
    has_experts: bool = False,
) -> PromptTime | None:
    """None where no rate of the device is known, or nothing was measured of its kind. rate: of the device's operations,
    which the runtime's constants are a share of. kernel: of attention; the constants are of the device's best, and
    another takes what it takes longer. speed_up: of products in the plan's own format over those in 16 bits."""
    if rate is None or constants is None:
        return None
    attention = _attention_seconds(cache, tokens, device, rate, kernel)
    usual = _attention_seconds(cache, tokens, device, rate, device.architecture.attention)
    computing = constants.seconds(operations, rate, has_experts) / speed_up + attention - usual
    reading = weights_bytes / device.bandwidth
    seconds = max(computing, reading)
    speed = tokens / seconds
    limit: Limit = "compute" if computing >= reading else "memory"
    return PromptTime(seconds, speed / PREFILL_CLASS, speed * PREFILL_CLASS, limit)


def _attention_seconds(cache: Cache, tokens: int, device: Device, rate: float, kernel: Attention) -> float:
    """Of causal attention over a prompt: its products, or its traffic."""
    pairs = sum(layer.heads * (layer.key + layer.value) * tokens * layer.seen(tokens) for layer in cache.layers)
    moved = sum(prompt_bytes(layer, tokens, kernel) for layer in cache.layers)
    return max(pairs / (rate * KERNELS[kernel].peak_share), moved / device.bandwidth)
