"""Every format the encoder can write, one line each; the order is the order of listings."""

from bitwright.formats.block_format import BlockFormat
from bitwright.formats.blocks import fp4, iq4, plain, q1_0, q2_k, q4_0, q4_1, q4_k, q6_k, q8_0, ternary
from bitwright.formats.codebooks import iq1, iq2, iq3
from bitwright.formats.errors import ConvertError, nearest

_ALL = (
    plain.F32,
    plain.F16,
    plain.BF16,
    q8_0.Q8_0,
    q6_k.Q6_K,
    q4_k.Q5_K,
    q4_k.Q4_K,
    q6_k.Q3_K,
    q2_k.Q2_K,
    q4_1.Q5_1,
    q4_0.Q5_0,
    q4_1.Q4_1,
    q4_0.Q4_0,
    iq4.IQ4_NL,
    iq4.IQ4_XS,
    iq3.IQ3_S,
    iq3.IQ3_XXS,
    iq2.IQ2_S,
    iq2.IQ2_XS,
    iq2.IQ2_XXS,
    iq1.IQ1_M,
    iq1.IQ1_S,
    fp4.MXFP4,
    fp4.NVFP4,
    ternary.Q2_0,
    ternary.TQ2_0,
    ternary.TQ1_0,
    q1_0.Q1_0,
)

FORMATS: dict[str, BlockFormat] = {block_format.name: block_format for block_format in _ALL}


def get_format(name: str, where: str = "format name") -> BlockFormat:
    """The format of that name, in any letter case; an unknown one is an error with the nearest match."""
    try:
        return FORMATS[name.upper()]
    except KeyError:
        raise ConvertError(f"unknown format {name!r}", where, nearest(name, list(FORMATS))) from None
