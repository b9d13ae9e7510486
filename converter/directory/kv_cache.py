"""The scales of a plan's caches of keys and values, from what calibration has seen of them."""

from dataclasses import dataclass
from math import log2

import numpy as np

from bitwright.calibration.statistics.activations import ActivationStatistics
from bitwright.formats.bfloat16 import bfloat16
from bitwright.formats.errors import ConvertError
from bitwright.formats.schemes.cache_scheme import encode_cache_scale
from bitwright.profiles.planning.plan_modules import ModulePlan
from bitwright.profiles.planning.precision import LIMITS


@dataclass(frozen=True)
class CacheScale:
    """absmax: the largest magnitude that calibration has seen of what the scale is for. outlier_ratio: the largest
    channel's absmax over the median channel's; channels that are always zero do not count."""

    name: str
    layer: int
    absmax: float
    outlier_ratio: float

    @property
    def bits(self) -> np.ndarray:
        """As it is stored, uint16 [1]. Raises ConvertError as encode_cache_scale does."""
        return encode_cache_scale(self.absmax, f"tensor {self.name}")

    def to_dict(self) -> dict[str, str | int | float]:
        return {
            "tensor": self.name,
            "layer": self.layer,
            "scale": float(bfloat16(self.bits)[0]),
            "absmax": self.absmax,
            "outlier_ratio": self.outlier_ratio,
        }


def cache_scales(plan: ModulePlan, seen: ActivationStatistics) -> list[CacheScale]:
    """One for every scale that the plan stores. Raises ConvertError for a layer whose cache was not seen."""
    scales = []
    for row in plan.tensors:
        for name in row.cache_scales:
            layer = row.tensor.layer
            if layer is None or layer not in seen.caches:
                raise ConvertError(
                    f"the attention of layer {layer} has handed no keys and values to a cache",
                    f"tensor {name}",
                    'leave caches in 16 bits: kv_cache = "BF16"',
                )
            cached = seen.caches[layer]
            peaks = cached.keys if name.endswith(".k_scale") else cached.values
            live = peaks[peaks > 0].astype(np.float64)
            ratio = float(live.max() / np.median(live)) if live.size else 1.0
            scales.append(CacheScale(name, layer, float(peaks.max()), ratio))
    return scales


def cache_notes(scales: list[CacheScale]) -> list[str]:
    """What a user should know: caches in which a typical channel loses its precision beside an outlier."""
    _, limit = LIMITS["FP8_STATIC"]
    return [
        f"{scale.name}: the largest channel is 2**{log2(scale.outlier_ratio):.1f} times the median one, and FP8 with"
        f' one scale bears 2**{limit:g}; kv_cache = "BF16" keeps the cache in 16 bits'
        for scale in scales
        if log2(scale.outlier_ratio) > limit
    ]


def cache_lines(plan: ModulePlan) -> list[str]:
    """What a plan says of the cache."""
    names = [name for row in plan.tensors for name in row.cache_scales]
    if not names:
        return []
    return [f"the cache of keys and values is FP8, with {len(names)} scales from calibration (k_scale, v_scale)"]
