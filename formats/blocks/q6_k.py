"""Q6_K and Q3_K: 16 sub-blocks of 16 weights, each with a scale. A weight is d * scale * (code - offset).

Q6_K, ggml's block_q6_K: 256 weights in 210 bytes, 6.5625 bits per weight, offset 32
    ql      128     lower four bits of the codes: byte 64 h + l holds weight 128 h + l in the low nibble,
                    weight 128 h + 64 + l in the high one
    qh       64     upper two bits: byte 32 h + l holds weights 128 h + l + 0, 32, 64, 96 at bits 0, 2, 4, 6
    scales   16     int8
    d         2     float16, unit of the scales

Q3_K, ggml's block_q3_K: 256 weights in 110 bytes, 3.4375 bits per weight, offset 4
    hmask    32     bit s of byte l: the code's third bit of weight 32 s + l
    qs       64     lower two bits: byte 32 h + l holds weights 128 h + l + 0, 32, 64, 96 at bits 0, 2, 4, 6
    scales   12     16 scales of 6 bits, stored + 32, see _pack_scales
    d         2     float16, unit of the scales
"""

from functools import partial

import numpy as np
from gguf import GGMLQuantizationType as Type

from bitwright.formats.block_format import scalar_format
from bitwright.formats.choices import Effort
from bitwright.formats.kernels.scale_search import SuperBlockEffort, search_parts
from bitwright.formats.packing import pack_bits, pack_half, unpack_bits, unpack_half
from bitwright.formats.parts import ScalarBlocks, ScalarParts, integers, scaled_sub_blocks

Q6_K_OFFSET, Q6_K_SCALE_OFFSET = 32, 128
Q3_K_OFFSET, Q3_K_SCALE_OFFSET = 4, 32


def _reach(offset: int, n: int, widest: float, narrowest: float) -> np.ndarray:
    """Codes that the largest weight is tried on: n at the negative end, n at the positive one, as shares of it."""
    ends = offset * np.geomspace(widest, narrowest, n, dtype=np.float32)
    return np.concatenate([-ends, ends])


def _codes(*codes: int) -> np.ndarray:
    return np.array(codes, np.float32)


# Q6_K's scales are so fine that trying the stored ones is most of the search. Beyond the range of scales the largest
# one is cut down: where it serves a single outlier, on code -4 instead of -3, so that the other sub-blocks get a finer
# unit.
_Q6_K_EFFORTS: dict[Effort, SuperBlockEffort] = {
    "best": SuperBlockEffort(_reach(32, 8, 0.9, 1.1), _codes(*range(-19, 21)), _codes(-115, -105), 1),
    "fast": SuperBlockEffort(_reach(32, 4, 0.9, 1.1), _codes(*range(-3, 5)), _codes(-115), 1),
}
_Q3_K_EFFORTS: dict[Effort, SuperBlockEffort] = {
    "best": SuperBlockEffort(_reach(4, 16, 0.7, 2.0), _codes(*range(-3, 5)), _codes(-43, -32, -28, -22), 1),
    "fast": SuperBlockEffort(_reach(4, 16, 0.7, 2.0), _codes(*range(-3, 5)), _codes(-28), 1),
}


def _unpack_q6_k(blocks: np.ndarray) -> ScalarParts:
    codes = unpack_bits(blocks[:, :128], 4, 64) | unpack_bits(blocks[:, 128:192], 2, 32) << 4
    scales = blocks[:, 192:208].view(np.int8).astype(np.int16) + np.int16(Q6_K_SCALE_OFFSET)
    levels = codes.view(np.int8) - np.int8(Q6_K_OFFSET)
    return scaled_sub_blocks(unpack_half(blocks[:, 208:])[:, 0], scales, levels)


def _pack_q6_k(parts: ScalarParts) -> np.ndarray:
    codes = (parts.levels + np.int8(Q6_K_OFFSET)).view(np.uint8)
    ql, qh = pack_bits(codes & 15, 4, 64), pack_bits(codes >> 4, 2, 32)
    scales = (parts.scales[:, 0] - np.int16(Q6_K_SCALE_OFFSET)).astype(np.int8).view(np.uint8)
    return np.concatenate([ql, qh, scales, pack_half(parts.units[:, 0])], axis=1)


def _unpack_q3_k(blocks: np.ndarray) -> ScalarParts:
    codes = unpack_bits(blocks[:, 32:96], 2, 32) | unpack_bits(blocks[:, :32], 1, 32) << 2
    levels = codes.view(np.int8) - np.int8(Q3_K_OFFSET)
    return scaled_sub_blocks(unpack_half(blocks[:, 108:])[:, 0], _unpack_scales(blocks[:, 96:108]), levels)


def _pack_q3_k(parts: ScalarParts) -> np.ndarray:
    codes = (parts.levels + np.int8(Q3_K_OFFSET)).view(np.uint8)
    hmask, qs = pack_bits(codes >> 2, 1, 32), pack_bits(codes & 3, 2, 32)
    scales = _pack_scales(parts.scales[:, 0].astype(np.uint8))
    return np.concatenate([hmask, qs, scales, pack_half(parts.units[:, 0])], axis=1)


def _pack_scales(scales: np.ndarray) -> np.ndarray:
    """16 scales of 6 bits, uint8 [n, 16], to uint8 [n, 12].

    Byte j below 8 holds the lower four bits of scales j and 8 + j, low nibble first.
    Byte 8 + j holds the upper two bits of scales j, 4 + j, 8 + j, 12 + j at bits 0, 2, 4, 6.
    """
    return np.concatenate([pack_bits(scales & 15, 4, 8), pack_bits(scales >> 4, 2, 4)], axis=1)


def _unpack_scales(packed: np.ndarray) -> np.ndarray:
    """The inverse of _pack_scales."""
    scales: np.ndarray = unpack_bits(packed[:, :8], 4, 8) | unpack_bits(packed[:, 8:], 2, 4) << 4
    return scales


def _table(scale_offset: int) -> np.ndarray:
    return np.arange(-scale_offset, scale_offset, dtype=np.float32)


_Q6_K_BLOCKS = ScalarBlocks(256, 210, _unpack_q6_k, _pack_q6_k, integers(-32, 31), 16, _table(Q6_K_SCALE_OFFSET))
_Q3_K_BLOCKS = ScalarBlocks(256, 110, _unpack_q3_k, _pack_q3_k, integers(-4, 3), 16, _table(Q3_K_SCALE_OFFSET))
Q6_K = scalar_format(Type.Q6_K, _Q6_K_BLOCKS, partial(search_parts, efforts=_Q6_K_EFFORTS))
Q3_K = scalar_format(Type.Q3_K, _Q3_K_BLOCKS, partial(search_parts, efforts=_Q3_K_EFFORTS))
