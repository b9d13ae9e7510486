"""Q4_K and Q5_K: 8 sub-blocks of 32 weights, each with a 6-bit scale and a 6-bit minimum.

A weight is d * scale * code - dmin * minimum, with a code of 4 or 5 bits.

    Q4_K, ggml's block_q4_K: 256 weights in 144 bytes, 4.5 bits per weight
        d         2     float16, unit of the scales
        dmin      2     float16, unit of the minima
        scales   12     8 scales and 8 minima of 6 bits, see pack_scales
        qs      128     byte 32 g + l: code of weight 64 g + l in the low nibble, of 64 g + 32 + l in the high one

    Q5_K, ggml's block_q5_K: 256 weights in 176 bytes, 5.5 bits per weight
        d, dmin, scales     as Q4_K
        qh       32     bit s of byte l: the code's fifth bit of weight 32 s + l
        qs      128     the codes' lower four bits, as Q4_K
"""

import numpy as np

from formats.block_format import Effort
from formats.encoding import to_blocks
from formats.parts import ScalarBlocks, ScalarParts, integers
from formats.scale_min_search import clip_grid, neighbour_grid, search_super_blocks

BLOCK_SIZE = 256
Q4_K_TYPE_SIZE, Q5_K_TYPE_SIZE = 144, 176
N_SUB_BLOCKS = 8
TOP_SCALE = np.float32(63)


def _pairs(*codes: int) -> np.ndarray:
    return np.array([(code, code) for code in codes], np.float32)


# Trial ranges of a sub-block, stored scales and minima tried around its optimum, codes that the largest scale and the
# largest minimum are tried on, fits of each trial range, refits of d and dmin.
_Effort = tuple[np.ndarray, np.ndarray, np.ndarray, int, int]
_Q4_K_EFFORTS: dict[Effort, _Effort] = {
    "best": (clip_grid(8, 8, widest=-2), neighbour_grid(4, 8), _pairs(63, 60, 57, 54), 2, 1),
    "fast": (clip_grid(6, 8, widest=-1), neighbour_grid(4, 4), _pairs(63, 57), 1, 0),
}
# The finer the codes, the more there is to win by the choice of the stored scale.
_Q5_K_EFFORTS: dict[Effort, _Effort] = {
    "best": (clip_grid(8, 8, widest=-2), neighbour_grid(8, 8), _pairs(63, 59, 55), 2, 1),
    "fast": (clip_grid(6, 8, widest=-2), neighbour_grid(4, 8), _pairs(63), 1, 0),
}


def encode_q4_k(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    return _close_q4_k(_search(rows, importance, 15, _Q4_K_EFFORTS[effort])).reshape(len(rows), -1)


def encode_q5_k(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    return _close_q5_k(_search(rows, importance, 31, _Q5_K_EFFORTS[effort])).reshape(len(rows), -1)


def decode_q4_k(data: np.ndarray) -> np.ndarray:
    return _decode(_open_q4_k(data)).reshape(len(data), -1)


def decode_q5_k(data: np.ndarray) -> np.ndarray:
    return _decode(_open_q5_k(data)).reshape(len(data), -1)


def _search(rows: np.ndarray, importance: np.ndarray | None, top_code: int, effort: _Effort) -> ScalarParts:
    blocks, weights = to_blocks(rows, importance, BLOCK_SIZE)
    steps = np.empty((len(blocks), 2), np.float32)
    scales = np.empty((len(blocks), 2, N_SUB_BLOCKS), np.uint8)
    codes = np.empty(blocks.shape, np.uint8)
    search_super_blocks(blocks, weights, np.float32(top_code), TOP_SCALE, *effort, (steps, scales, codes))
    return ScalarParts(steps, scales.astype(np.int16), codes.view(np.int8))


def _open_q4_k(data: np.ndarray) -> ScalarParts:
    blocks = data.reshape(-1, Q4_K_TYPE_SIZE)
    return ScalarParts(*_unpack_header(blocks), _unpack_nibbles(blocks[:, 16:]).view(np.int8))


def _close_q4_k(parts: ScalarParts) -> np.ndarray:
    return np.concatenate([_pack_header(parts), _pack_nibbles(parts.levels.view(np.uint8))], axis=1)


def _open_q5_k(data: np.ndarray) -> ScalarParts:
    blocks = data.reshape(-1, Q5_K_TYPE_SIZE)
    high = np.unpackbits(blocks[:, 16:48], axis=1, bitorder="little").reshape(-1, 32, 8).transpose(0, 2, 1)
    codes = _unpack_nibbles(blocks[:, 48:]) | high.reshape(-1, BLOCK_SIZE) << 4
    return ScalarParts(*_unpack_header(blocks), codes.view(np.int8))


def _close_q5_k(parts: ScalarParts) -> np.ndarray:
    codes = parts.levels.view(np.uint8)
    qh = np.packbits(codes.reshape(-1, 8, 32) >> 4, axis=1, bitorder="little").reshape(-1, 32)
    return np.concatenate([_pack_header(parts), qh, _pack_nibbles(codes & 15)], axis=1)


def _pack_header(parts: ScalarParts) -> np.ndarray:
    """d, dmin and scales, uint8 [n_blocks, 16]."""
    return np.concatenate(
        [parts.units.astype("<f2").view(np.uint8), pack_scales(parts.scales.astype(np.uint8))], axis=1
    )


def _unpack_header(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    units = np.ascontiguousarray(blocks[:, :4]).view("<f2").astype(np.float32)
    return units, unpack_scales(blocks[:, 4:16]).astype(np.int16)


def pack_scales(scales: np.ndarray) -> np.ndarray:
    """8 scales and 8 minima of 6 bits, uint8 [n, 2, 8], to uint8 [n, 12].

    Bytes 0-3 and 4-7 hold scales and minima 0-3, and in their upper two bits the upper two bits of entries 4-7.
    Bytes 8-11 hold the lower four bits of entries 4-7, scales in the low nibble, minima in the high one.
    """
    first, second = scales[:, :, :4], scales[:, :, 4:]
    lower = second[:, 0] & 15 | second[:, 1] << 4
    return np.concatenate([(first | second >> 4 << 6).reshape(-1, 8), lower], axis=1)


def unpack_scales(packed: np.ndarray) -> np.ndarray:
    """The inverse of pack_scales."""
    upper, lower = packed[:, :8].reshape(-1, 2, 4), packed[:, 8:]
    low_nibbles = np.stack([lower & 15, lower >> 4], axis=1)
    return np.concatenate([upper & 63, low_nibbles | upper >> 6 << 4], axis=2)


def _pack_nibbles(codes: np.ndarray) -> np.ndarray:
    pairs = codes.reshape(-1, 4, 2, 32)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)


def _unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    qs = packed.reshape(-1, 4, 32)
    return np.stack([qs & 15, qs >> 4], axis=2).reshape(-1, BLOCK_SIZE)


def _decode(parts: ScalarParts) -> np.ndarray:
    d, dmin = parts.units.T[:, :, None]
    scales, minima = parts.scales.transpose(1, 0, 2)
    return (d * scales)[:, :, None] * parts.levels.reshape(-1, 8, 32) - (dmin * minima)[:, :, None]


_TABLE = np.arange(TOP_SCALE + 1, dtype=np.float32)
Q4_K_BLOCKS = ScalarBlocks(integers(0, 15), N_SUB_BLOCKS, _TABLE, _TABLE, _open_q4_k, _close_q4_k)
Q5_K_BLOCKS = ScalarBlocks(integers(0, 31), N_SUB_BLOCKS, _TABLE, _TABLE, _open_q5_k, _close_q5_k)
