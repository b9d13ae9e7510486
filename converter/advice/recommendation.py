"""What advice is: plain frozen data, for people, for --json and for Python."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bitwright.converter.advice.quality import CacheQuality, Confidence, Quality
from bitwright.formats.typed import to_plain
from bitwright.profiles.advice.hardware import Attention, Runtime, Support
from bitwright.profiles.advice.roofline import Bottleneck, Limit

_TERNARY = ("TQ1_0", "TQ2_0")
_ENOUGH_BITS = 4


@dataclass(frozen=True)
class Speed:
    """Tokens a second of all texts together, between low and high. is_class: measurements of such devices are few, or
    lie far apart: low and high are the ends of a class, and no figure is meant. coverage: the share of measured points
    that lie in such a range, None where too few were measured to say. basis: what stands behind it."""

    low: float
    high: float
    is_class: bool
    coverage: float | None
    basis: str

    @property
    def middle(self) -> float:
        return float((self.low * self.high) ** 0.5)


@dataclass(frozen=True)
class Candidate:
    """A profile on the device. formats: operator -> number formats of its matrices. tensor_bytes, file_bytes: as of
    PricedPlan. kv: the format of keys and values; kv_bytes: what they take at the context and batch. total_bytes: file
    and cache. longest_context: that fits, at most the model's. step_seconds, floor_seconds: of a decode step,
    predicted, and at the full bandwidth. shares: group -> its part of the step. speed_up, memory_savings: over the
    model in 16 bits with keys and values in 16 bits in the same runtime. quality: of the weights; cache_quality: with
    keys and values in kv, where that was measured. support: how the device computes with the
    formats; remark: what is to be said of that. command: what makes it; run: what the runtime has to be told."""

    profile: str
    runtime: Runtime
    formats: Mapping[str, tuple[str, ...]]
    bits_per_weight: float
    tensor_bytes: int
    file_bytes: int
    kv: str
    kv_bytes: int
    total_bytes: int
    fits: bool
    longest_context: int
    decode: Speed | None
    prefill: Speed | None
    step_seconds: float
    floor_seconds: float
    shares: Mapping[str, float]
    speed_up: float
    memory_savings: float
    quality: Quality
    cache_quality: CacheQuality | None
    support: Support
    remark: str
    bottlenecks: tuple[Bottleneck, ...]
    limit: Limit
    command: str
    run: str

    @property
    def kld(self) -> float | None:
        """Mean KL divergence in nats a token: with its cache where that was measured, else of its weights alone."""
        if self.cache_quality is not None and self.cache_quality.is_own:
            return self.cache_quality.kld
        return self.quality.kld

    @property
    def standing(self) -> Literal[0, 1, 2]:
        """0: it can be recommended. 1: it has less than four bits a weight, and nobody has measured what that costs:
        only where nothing else fits. 2: it is for models that were trained ternary: only once it was measured."""
        if self.quality.kind in ("measured", "published", "predicted"):
            return 0
        if any(name in _TERNARY for names in self.formats.values() for name in names):
            return 2
        return 0 if self.bits_per_weight >= _ENOUGH_BITS else 1


@dataclass(frozen=True)
class LeftOut:
    profile: str
    why: str


@dataclass(frozen=True)
class Machine:
    """The device as it is counted with. gpus: how many of it share the model. memory: bytes for a model and its cache,
    of all together; bandwidth, rates: of one. assumed: memory that the registry
    states for the largest of several sizes. measured: by --hardware this. sources: figure -> where it was read.
    instructions: sets of them that a measured CPU has."""

    name: str
    family: str
    architecture: str
    gpus: int
    memory: int
    assumed: bool
    bandwidth: float
    rates: Mapping[str, float]
    ridge: float | None
    measured: bool
    sources: Mapping[str, str]
    instructions: tuple[str, ...]


@dataclass(frozen=True)
class Recommendation:
    """candidates: what runs, the best first; left_out: what does not, and why. best: the one to take, None where
    nothing satisfies what was asked. reason: in one sentence.

    What follows best is its own, for who wants one answer: config (the profile), mixed_precision (operator -> formats),
    fa_config (the attention kernel), predicted_speedup, predicted_time_us and baseline_time_us of a decode step,
    memory_savings_pct, kv_cache_bytes, expected_quality_loss, confidence, bottleneck_analysis."""

    model: str
    revision: str | None
    machine: Machine
    phase: Literal["decode", "prefill", "both"]
    context: int
    model_context: int | None
    batch: int
    kv_token_bytes: int
    attention: Attention
    candidates: tuple[Candidate, ...]
    left_out: tuple[LeftOut, ...]
    best: Candidate | None
    reason: str
    notes: tuple[str, ...]
    config: str | None
    mixed_precision: Mapping[str, tuple[str, ...]]
    fa_config: Attention
    predicted_speedup: float | None
    predicted_time_us: float | None
    baseline_time_us: float | None
    memory_savings_pct: float | None
    kv_cache_bytes: int | None
    expected_quality_loss: str
    confidence: Confidence | None
    bottleneck_analysis: tuple[Bottleneck, ...]

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_plain(self)
        return plain
