"""Q4_K and Q5_K: 8 sub-blocks of 32 weights, each with a 6-bit scale and a 6-bit minimum.

A weight is d * scale * code - dmin * minimum, with a code of 4 or 5 bits.

    Q4_K, ggml's block_q4_K: 256 weights in 144 bytes, 4.5 bits per weight
        d         2     float16, unit of the scales
        dmin      2     float16, unit of the minima
        scales   12     8 scales and 8 minima of 6 bits, see _pack_scales
        qs      128     byte 32 g + l: code of weight 64 g + l in the low nibble, of 64 g + 32 + l in the high one

    Q5_K, ggml's block_q5_K: 256 weights in 176 bytes, 5.5 bits per weight
        d, dmin, scales     as Q4_K
        qh       32     bit s of byte l: the code's fifth bit of weight 32 s + l
        qs      128     the codes' lower four bits, as Q4_K
"""

from functools import partial

import numpy as np
from gguf import GGMLQuantizationType as Type

from bitwright.formats.block_format import scalar_format
from bitwright.formats.choices import Effort
from bitwright.formats.kernels.scale_min_search import SuperBlockEffort, clip_grid, neighbour_grid, search_parts
from bitwright.formats.packing import pack_bits, pack_half, unpack_bits, unpack_half
from bitwright.formats.parts import ScalarBlocks, ScalarParts, integers


def _pairs(*codes: int) -> np.ndarray:
    return np.array([(code, code) for code in codes], np.float32)


_Q4_K_EFFORTS: dict[Effort, SuperBlockEffort] = {
    "best": SuperBlockEffort(clip_grid(8, 8, widest=-2), neighbour_grid(4, 8), _pairs(63, 60, 57, 54), 2, 1),
    "fast": SuperBlockEffort(clip_grid(6, 8, widest=-1), neighbour_grid(4, 4), _pairs(63, 57), 1, 0),
}
# The finer the codes, the more there is to win by the choice of the stored scale.
_Q5_K_EFFORTS: dict[Effort, SuperBlockEffort] = {
    "best": SuperBlockEffort(clip_grid(8, 8, widest=-2), neighbour_grid(8, 8), _pairs(63, 59, 55), 2, 1),
    "fast": SuperBlockEffort(clip_grid(6, 8, widest=-2), neighbour_grid(4, 8), _pairs(63), 1, 0),
}


def _unpack_q4_k(blocks: np.ndarray) -> ScalarParts:
    return ScalarParts(*_unpack_header(blocks), unpack_bits(blocks[:, 16:], 4, 32).view(np.int8))


def _pack_q4_k(parts: ScalarParts) -> np.ndarray:
    return np.concatenate([_pack_header(parts), pack_bits(parts.levels.view(np.uint8), 4, 32)], axis=1)


def _unpack_q5_k(blocks: np.ndarray) -> ScalarParts:
    codes = unpack_bits(blocks[:, 48:], 4, 32) | unpack_bits(blocks[:, 16:48], 1, 32) << 4
    return ScalarParts(*_unpack_header(blocks), codes.view(np.int8))


def _pack_q5_k(parts: ScalarParts) -> np.ndarray:
    codes = parts.levels.view(np.uint8)
    return np.concatenate([_pack_header(parts), pack_bits(codes >> 4, 1, 32), pack_bits(codes & 15, 4, 32)], axis=1)


def _pack_header(parts: ScalarParts) -> np.ndarray:
    """d, dmin and scales, uint8 [n_blocks, 16]."""
    return np.concatenate([pack_half(parts.units), _pack_scales(parts.scales.astype(np.uint8))], axis=1)


def _unpack_header(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return unpack_half(blocks[:, :4]), _unpack_scales(blocks[:, 4:16]).astype(np.int16)


def _pack_scales(scales: np.ndarray) -> np.ndarray:
    """8 scales and 8 minima of 6 bits, uint8 [n, 2, 8], to uint8 [n, 12].

    Bytes 0-3 and 4-7 hold scales and minima 0-3, and in their upper two bits the upper two bits of entries 4-7.
    Bytes 8-11 hold the lower four bits of entries 4-7, scales in the low nibble, minima in the high one.
    """
    first, second = scales[:, :, :4], scales[:, :, 4:]
    lower = second[:, 0] & 15 | second[:, 1] << 4
    return np.concatenate([(first | second >> 4 << 6).reshape(-1, 8), lower], axis=1)


def _unpack_scales(packed: np.ndarray) -> np.ndarray:
    """The inverse of _pack_scales."""
    upper, lower = packed[:, :8].reshape(-1, 2, 4), packed[:, 8:]
    low_nibbles = np.stack([lower & 15, lower >> 4], axis=1)
    return np.concatenate([upper & 63, low_nibbles | upper >> 6 << 4], axis=2)


_TABLE = np.arange(64, dtype=np.float32)
_Q4_K_BLOCKS = ScalarBlocks(256, 144, _unpack_q4_k, _pack_q4_k, integers(0, 15), 8, _TABLE, _TABLE)
_Q5_K_BLOCKS = ScalarBlocks(256, 176, _unpack_q5_k, _pack_q5_k, integers(0, 31), 8, _TABLE, _TABLE)
Q4_K = scalar_format(Type.Q4_K, _Q4_K_BLOCKS, partial(search_parts, efforts=_Q4_K_EFFORTS))
Q5_K = scalar_format(Type.Q5_K, _Q5_K_BLOCKS, partial(search_parts, efforts=_Q5_K_EFFORTS))
