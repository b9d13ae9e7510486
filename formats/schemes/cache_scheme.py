"""How a runtime's cache of keys and values is quantized: `kv_cache_scheme` of compressed-tensors.

FP8    values of E4M3 times one scale for all keys of a layer and one for all its values: k_scale and v_scale, BF16 [1],
       beside the projections. A float format bears the whole range of a tensor, so the scale is the largest magnitude
       of calibration over 448; what is larger when the model runs is cut off there.
"""

import numpy as np

from bitwright.formats.bfloat16 import bfloat16_bits
from bitwright.formats.errors import ConvertError
from bitwright.formats.kernels.fp8_scales import GREATEST
from bitwright.formats.schemes.scheme import ActivationScheme

CACHE_SCHEMES: dict[str, ActivationScheme] = {"FP8": ActivationScheme(8, "float", "tensor", dynamic=False)}
"""By the name that a profile uses."""

SCALE_DTYPE, SCALE_SHAPE, SCALE_BYTES = "BF16", (1,), 2
"""Of k_scale and of v_scale."""

# A smaller scale is zero in the float16 or bfloat16 that a runtime may hold it in, or nearly.
_LEAST_PEAK = 1e-4


def encode_cache_scale(peak: float, where: str) -> np.ndarray:
    """Bits uint16 [1] of the scale under which the magnitude `peak` takes the greatest value.

    Raises ConvertError for a magnitude that gives no scale a runtime could divide by.
    """
    if not np.isfinite(peak) or peak < _LEAST_PEAK:
        raise ConvertError(
            f"the largest magnitude that calibration has seen there is {peak:g}, which gives no scale",
            where,
            'read more text (--samples 1024), or leave caches in 16 bits: kv_cache = "BF16"',
        )
    return bfloat16_bits(np.array([peak / float(GREATEST)], np.float32))
