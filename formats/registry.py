"""Every format the encoder can write, one line each; the order is the order of listings."""

from gguf import GGMLQuantizationType as Type

from formats import fp4, iq1, iq2, iq3, iq4, plain, q1_0, q2_k, q4_0, q4_1, q4_k, q6_k, q8_0, ternary
from formats.block_format import BlockFormat, NewerType
from formats.errors import ConvertError, nearest

_ALL = (
    BlockFormat(Type.F32, plain.BLOCK_SIZE, 4, plain.encode_f32, plain.decode_f32),
    BlockFormat(Type.F16, plain.BLOCK_SIZE, 2, plain.encode_f16, plain.decode_f16),
    BlockFormat(Type.BF16, plain.BLOCK_SIZE, 2, plain.encode_bf16, plain.decode_bf16),
    BlockFormat(Type.Q8_0, q8_0.BLOCK_SIZE, q8_0.TYPE_SIZE, q8_0.encode, q8_0.decode, blocks=q8_0.BLOCKS),
    BlockFormat(
        Type.Q6_K, q6_k.BLOCK_SIZE, q6_k.Q6_K_TYPE_SIZE, q6_k.encode_q6_k, q6_k.decode_q6_k, blocks=q6_k.Q6_K_BLOCKS
    ),
    BlockFormat(
        Type.Q5_K, q4_k.BLOCK_SIZE, q4_k.Q5_K_TYPE_SIZE, q4_k.encode_q5_k, q4_k.decode_q5_k, blocks=q4_k.Q5_K_BLOCKS
    ),
    BlockFormat(
        Type.Q4_K, q4_k.BLOCK_SIZE, q4_k.Q4_K_TYPE_SIZE, q4_k.encode_q4_k, q4_k.decode_q4_k, blocks=q4_k.Q4_K_BLOCKS
    ),
    BlockFormat(
        Type.Q3_K, q6_k.BLOCK_SIZE, q6_k.Q3_K_TYPE_SIZE, q6_k.encode_q3_k, q6_k.decode_q3_k, blocks=q6_k.Q3_K_BLOCKS
    ),
    BlockFormat(Type.Q2_K, q2_k.BLOCK_SIZE, q2_k.TYPE_SIZE, q2_k.encode, q2_k.decode, blocks=q2_k.BLOCKS),
    BlockFormat(
        Type.Q5_1, q4_1.BLOCK_SIZE, q4_1.Q5_1_TYPE_SIZE, q4_1.encode_q5_1, q4_1.decode_q5_1, blocks=q4_1.Q5_1_BLOCKS
    ),
    BlockFormat(
        Type.Q5_0, q4_0.BLOCK_SIZE, q4_0.Q5_0_TYPE_SIZE, q4_0.encode_q5_0, q4_0.decode_q5_0, blocks=q4_0.Q5_0_BLOCKS
    ),
    BlockFormat(
        Type.Q4_1, q4_1.BLOCK_SIZE, q4_1.Q4_1_TYPE_SIZE, q4_1.encode_q4_1, q4_1.decode_q4_1, blocks=q4_1.Q4_1_BLOCKS
    ),
    BlockFormat(
        Type.Q4_0, q4_0.BLOCK_SIZE, q4_0.Q4_0_TYPE_SIZE, q4_0.encode_q4_0, q4_0.decode_q4_0, blocks=q4_0.Q4_0_BLOCKS
    ),
    BlockFormat(
        Type.IQ4_NL,
        iq4.IQ4_NL_BLOCK_SIZE,
        iq4.IQ4_NL_TYPE_SIZE,
        iq4.encode_iq4_nl,
        iq4.decode_iq4_nl,
        blocks=iq4.IQ4_NL_BLOCKS,
    ),
    BlockFormat(
        Type.IQ4_XS,
        iq4.IQ4_XS_BLOCK_SIZE,
        iq4.IQ4_XS_TYPE_SIZE,
        iq4.encode_iq4_xs,
        iq4.decode_iq4_xs,
        blocks=iq4.IQ4_XS_BLOCKS,
    ),
    BlockFormat(
        Type.IQ3_S, iq3.BLOCK_SIZE, iq3.IQ3_S_TYPE_SIZE, iq3.encode_iq3_s, iq3.decode_iq3_s, blocks=iq3.IQ3_S_BLOCKS
    ),
    BlockFormat(
        Type.IQ3_XXS,
        iq3.BLOCK_SIZE,
        iq3.IQ3_XXS_TYPE_SIZE,
        iq3.encode_iq3_xxs,
        iq3.decode_iq3_xxs,
        needs_importance=True,
        blocks=iq3.IQ3_XXS_BLOCKS,
    ),
    BlockFormat(
        Type.IQ2_S,
        iq2.BLOCK_SIZE,
        iq2.IQ2_S_TYPE_SIZE,
        iq2.encode_iq2_s,
        iq2.decode_iq2_s,
        needs_importance=True,
        blocks=iq2.IQ2_S_BLOCKS,
    ),
    BlockFormat(
        Type.IQ2_XS,
        iq2.BLOCK_SIZE,
        iq2.IQ2_XS_TYPE_SIZE,
        iq2.encode_iq2_xs,
        iq2.decode_iq2_xs,
        needs_importance=True,
        blocks=iq2.IQ2_XS_BLOCKS,
    ),
    BlockFormat(
        Type.IQ2_XXS,
        iq2.BLOCK_SIZE,
        iq2.IQ2_XXS_TYPE_SIZE,
        iq2.encode_iq2_xxs,
        iq2.decode_iq2_xxs,
        needs_importance=True,
        blocks=iq2.IQ2_XXS_BLOCKS,
    ),
    BlockFormat(
        Type.IQ1_M,
        iq1.BLOCK_SIZE,
        iq1.IQ1_M_TYPE_SIZE,
        iq1.encode_iq1_m,
        iq1.decode_iq1_m,
        needs_importance=True,
        blocks=iq1.IQ1_M_BLOCKS,
    ),
    BlockFormat(
        Type.IQ1_S,
        iq1.BLOCK_SIZE,
        iq1.IQ1_S_TYPE_SIZE,
        iq1.encode_iq1_s,
        iq1.decode_iq1_s,
        needs_importance=True,
        blocks=iq1.IQ1_S_BLOCKS,
    ),
    BlockFormat(
        Type.MXFP4,
        fp4.MXFP4_BLOCK_SIZE,
        fp4.MXFP4_TYPE_SIZE,
        fp4.encode_mxfp4,
        fp4.decode_mxfp4,
        blocks=fp4.MXFP4_BLOCKS,
    ),
    BlockFormat(
        Type.NVFP4,
        fp4.NVFP4_BLOCK_SIZE,
        fp4.NVFP4_TYPE_SIZE,
        fp4.encode_nvfp4,
        fp4.decode_nvfp4,
        tensor_scale=fp4.nvfp4_tensor_scale,
        blocks=fp4.NVFP4_BLOCKS,
    ),
    BlockFormat(
        NewerType.Q2_0,
        ternary.Q2_0_BLOCK_SIZE,
        ternary.Q2_0_TYPE_SIZE,
        ternary.encode_q2_0,
        ternary.decode_q2_0,
        blocks=ternary.Q2_0_BLOCKS,
    ),
    BlockFormat(
        Type.TQ2_0,
        ternary.TQ_BLOCK_SIZE,
        ternary.TQ2_0_TYPE_SIZE,
        ternary.encode_tq2_0,
        ternary.decode_tq2_0,
        blocks=ternary.TQ2_0_BLOCKS,
    ),
    BlockFormat(
        Type.TQ1_0,
        ternary.TQ_BLOCK_SIZE,
        ternary.TQ1_0_TYPE_SIZE,
        ternary.encode_tq1_0,
        ternary.decode_tq1_0,
        blocks=ternary.TQ1_0_BLOCKS,
    ),
    BlockFormat(Type.Q1_0, q1_0.BLOCK_SIZE, q1_0.TYPE_SIZE, q1_0.encode, q1_0.decode, blocks=q1_0.BLOCKS),
)

FORMATS: dict[str, BlockFormat] = {block_format.name: block_format for block_format in _ALL}


def get_format(name: str, where: str = "format name") -> BlockFormat:
    """The format of that name, in any letter case; an unknown one is an error with the nearest match."""
    try:
        return FORMATS[name.upper()]
    except KeyError:
        raise ConvertError(f"unknown format {name!r}", where, nearest(name, list(FORMATS))) from None
