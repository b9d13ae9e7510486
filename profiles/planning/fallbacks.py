"""What takes the place of a format or a scheme that a tensor cannot have: every table of them, and why it is needed.

blocks    a block format whose block does not divide the tensor's rows
shapes    a scheme whose groups or blocks do not divide the matrix
experts   a scheme that runtimes do not take for the experts of a layer, which they multiply as one
inputs    a scheme that rounds the inputs of a matrix more coarsely than these can bear
"""

from collections.abc import Mapping

from bitwright.formats.block_format import BlockFormat
from bitwright.formats.registry import FORMATS

# The better encoder first where sizes are equal. Ternary, 1-bit and FP4 formats are made for models trained or hardware
# built for them: nobody should get one without asking.
_OF_BLOCKS = ("IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16")

# The first that fits; at last the source's own 16 bits.
_OF_SHAPES: Mapping[str, tuple[str, ...]] = {
    "W8A16": ("W8A16_CHANNEL",),
    "W4A16": ("W4A16_G64", "W4A16_G32", "W8A16_CHANNEL"),
    "W4A16_G64": ("W4A16_G32", "W8A16_CHANNEL"),
    "W4A16_G32": ("W8A16_CHANNEL",),
    "W4A16_ASYM": ("W4A16_ASYM_G64", "W4A16_ASYM_G32", "W8A16_CHANNEL"),
    "W4A16_ASYM_G64": ("W4A16_ASYM_G32", "W8A16_CHANNEL"),
    "W4A16_ASYM_G32": ("W8A16_CHANNEL",),
    "NVFP4": ("FP8",),
    "NVFP4A16": ("W8A16_CHANNEL",),
    "MXFP4": ("FP8",),
    "MXFP4A16": ("W8A16_CHANNEL",),
    "FP8_BLOCK": ("FP8",),
}

# What vLLM's fused experts do not take: INT8 needs scales that are measured by token, INT4 has no zero points.
_OF_EXPERTS: Mapping[str, str] = {
    "W8A8_STATIC": "W8A8",
    "W8A8_STATIC_ASYM": "W8A8",
    "W4A16_ASYM": "W4A16",
    "W4A16_ASYM_G64": "W4A16_G64",
    "W4A16_ASYM_G32": "W4A16_G32",
}

# The same arithmetic with finer scales of the inputs, then 8 bits for 4.
_OF_INPUTS: Mapping[str, tuple[str, ...]] = {
    "W8A8_STATIC": ("W8A8",),
    "W8A8_STATIC_ASYM": ("W8A8",),
    "FP8_STATIC": ("FP8",),
    "NVFP4": ("FP8",),
    "MXFP4": ("FP8",),
}


def fitting_format(wanted: BlockFormat, n_columns: int) -> BlockFormat:
    """The wanted format, or the smallest one with at least as many bits whose block divides the row."""
    if wanted.fits(n_columns):
        return wanted
    candidates = [FORMATS[name] for name in _OF_BLOCKS if name in FORMATS]
    candidates = [c for c in candidates if c.fits(n_columns) and c.bits_per_weight >= wanted.bits_per_weight]
    return min(candidates, key=lambda c: c.bits_per_weight)


def schemes_by_shape(wanted: str) -> tuple[str, ...]:
    """The wanted scheme, and what to try in turn where the matrix has no shape for it; none of them for 16 bits."""
    return wanted, *_OF_SHAPES.get(wanted, ())


def scheme_of_experts(wanted: str) -> str:
    """The scheme that the experts of a layer can have in the place of the wanted one: itself where they can have it."""
    return _OF_EXPERTS.get(wanted, wanted)


def schemes_by_inputs(wanted: str) -> tuple[str, ...]:
    """The wanted scheme, and what to try in turn where its rounding is too coarse for the inputs."""
    return wanted, *_OF_INPUTS.get(wanted, ())
