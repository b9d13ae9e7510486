"""What the calibrated model computes in, and on; apart from the model, which brings torch."""

from typing import Literal

Dtype = Literal["auto", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda", "mps"]
