"""What a caller may choose of a calibration; apart from what computes it, which brings numpy and torch."""

from typing import Literal

Dtype = Literal["auto", "float32", "bfloat16"]
"""What the calibrated model computes in; see stream.build.choose_dtype."""

Device = Literal["auto", "cpu", "cuda", "mps"]
"""What it computes on; see stream.build.choose_device."""

RangeMethod = Literal["absmax", "average", "percentile", "mse"]
"""How the range of a static activation scale is found."""

DEFAULT_METHOD: RangeMethod = "mse"

Alpha = float | Literal["auto"]
"""How much of the inputs' range SmoothQuant moves into the weights, from 0 (nothing) to 1 (everything)."""

DEFAULT_ALPHA = 0.5

Judge = Literal["full", "fast", "off"]
"""How an artifact is judged: by quality, runtime and generated text; by less of each, in a fraction of the time; or not
at all."""

Labels = Literal["sampled", "text"]
"""What a loss is taken against: tokens drawn from the model's own predictions, or the next tokens of the text."""

CacheRounding = Literal["F16", "BF16", "Q8_0", "Q4_0", "FP8", "NVFP4"]
"""What an evaluation may keep keys and values in."""
