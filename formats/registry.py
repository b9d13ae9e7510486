"""Every format the encoder can write, one line each; the order is the order of listings."""

from gguf import GGMLQuantizationType as Type

from formats import plain, q2_k, q4_k
from formats.block_format import BlockFormat
from formats.errors import ConvertError, nearest

_ALL = (
    BlockFormat(Type.F32, plain.BLOCK_SIZE, 4, plain.encode_f32, plain.decode_f32),
    BlockFormat(Type.F16, plain.BLOCK_SIZE, 2, plain.encode_f16, plain.decode_f16),
    BlockFormat(Type.BF16, plain.BLOCK_SIZE, 2, plain.encode_bf16, plain.decode_bf16),
    BlockFormat(Type.Q5_K, q4_k.BLOCK_SIZE, q4_k.Q5_K_TYPE_SIZE, q4_k.encode_q5_k, q4_k.decode_q5_k),
    BlockFormat(Type.Q4_K, q4_k.BLOCK_SIZE, q4_k.Q4_K_TYPE_SIZE, q4_k.encode_q4_k, q4_k.decode_q4_k),
    BlockFormat(Type.Q2_K, q2_k.BLOCK_SIZE, q2_k.TYPE_SIZE, q2_k.encode, q2_k.decode),
)

FORMATS: dict[str, BlockFormat] = {block_format.name: block_format for block_format in _ALL}


def get_format(name: str, where: str = "format name") -> BlockFormat:
    """The format of that name, in any letter case; an unknown one is an error with the nearest match."""
    try:
        return FORMATS[name.upper()]
    except KeyError:
        raise ConvertError(f"unknown format {name!r}", where, nearest(name, list(FORMATS))) from None
