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

import numpy as np

from formats.block_format import Effort
from formats.encoding import to_blocks
from formats.iq_packing import pack_half, unpack_half
from formats.parts import NO_MINIMUM, ScalarBlocks, ScalarParts, integers
from formats.scale_search import search_super_blocks

BLOCK_SIZE = 256
Q6_K_TYPE_SIZE, Q3_K_TYPE_SIZE = 210, 110
N_SUB_BLOCKS = 16
SHIFTS = np.array([0, 2, 4, 6], np.uint8)[:, None]


def _reach(offset: int, n: int, widest: float, narrowest: float) -> np.ndarray:
    """Codes that the largest weight is tried on: n at the negative end, n at the positive one, as shares of it."""
    ends = offset * np.geomspace(widest, narrowest, n, dtype=np.float32)
    return np.concatenate([-ends, ends])


def _codes(*codes: int) -> np.ndarray:
    return np.array(codes, np.float32)


# Trial codes of a sub-block's largest weight, stored scales tried around the optimum, trial codes of the largest
# scale, refits of the best d. Q6_K's scales are so fine that trying the stored ones is most of the search. Beyond the
# range of scales the largest one is cut down: where it serves a single outlier, on code -4 instead of -3, so that the
# other sub-blocks get a finer unit.
_Effort = tuple[np.ndarray, np.ndarray, np.ndarray, int]
_Q6_K_EFFORTS: dict[Effort, _Effort] = {
    "best": (_reach(32, 8, 0.9, 1.1), _codes(*range(-19, 21)), _codes(-115, -105), 1),
    "fast": (_reach(32, 4, 0.9, 1.1), _codes(*range(-3, 5)), _codes(-115), 1),
}
_Q3_K_EFFORTS: dict[Effort, _Effort] = {
    "best": (_reach(4, 16, 0.7, 2.0), _codes(*range(-3, 5)), _codes(-43, -32, -28, -22), 1),
    "fast": (_reach(4, 16, 0.7, 2.0), _codes(*range(-3, 5)), _codes(-28), 1),
}


def encode_q6_k(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    return _close_q6_k(_search(rows, importance, 32, 128, _Q6_K_EFFORTS[effort])).reshape(len(rows), -1)


def decode_q6_k(data: np.ndarray) -> np.ndarray:
    return _decode(_open_q6_k(data), 128).reshape(len(data), -1)


def encode_q3_k(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    return _close_q3_k(_search(rows, importance, 4, 32, _Q3_K_EFFORTS[effort])).reshape(len(rows), -1)


def decode_q3_k(data: np.ndarray) -> np.ndarray:
    return _decode(_open_q3_k(data), 32).reshape(len(data), -1)


def _search(
    rows: np.ndarray, importance: np.ndarray | None, offset: int, scale_offset: int, effort: _Effort
) -> ScalarParts:
    blocks, weights = to_blocks(rows, importance, BLOCK_SIZE)
    d, codes = np.empty(len(blocks), np.float32), np.empty(blocks.shape, np.int8)
    scales = np.empty((len(blocks), N_SUB_BLOCKS), np.int8)
    code_range = np.float32(-offset), np.float32(offset - 1)
    scale_range = np.float32(-scale_offset), np.float32(scale_offset - 1)
    search_super_blocks(blocks, weights, code_range, scale_range, *effort, (d, scales, codes))
    return _parts(d, scales.astype(np.int16) + np.int16(scale_offset), codes)


def _parts(d: np.ndarray, stored_scales: np.ndarray, levels: np.ndarray) -> ScalarParts:
    units, scales = np.zeros((len(d), 2), np.float32), np.zeros((len(d), 2, N_SUB_BLOCKS), np.int16)
    units[:, 0], scales[:, 0] = d, stored_scales
    return ScalarParts(units, scales, levels)


def _open_q6_k(data: np.ndarray) -> ScalarParts:
    blocks = data.reshape(-1, Q6_K_TYPE_SIZE)
    ql, qh = blocks[:, :128].reshape(-1, 2, 1, 64), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    low = np.concatenate([ql & 15, ql >> 4], axis=2).reshape(-1, 256)
    codes = low | (qh >> SHIFTS & 3).reshape(-1, 256) << 4
    scales = blocks[:, 192:208].view(np.int8).astype(np.int16) + np.int16(128)
    return _parts(unpack_half(blocks[:, 208:])[:, 0], scales, codes.view(np.int8) - np.int8(32))


def _close_q6_k(parts: ScalarParts) -> np.ndarray:
    codes = (parts.levels + np.int8(32)).view(np.uint8)
    halves, quarters = (codes & 15).reshape(-1, 2, 2, 64), codes.reshape(-1, 2, 4, 32)
    ql = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(-1, 128)
    qh = np.bitwise_or.reduce(quarters >> 4 << SHIFTS, axis=2).reshape(-1, 64)
    scales = (parts.scales[:, 0] - np.int16(128)).astype(np.int8).view(np.uint8)
    return np.concatenate([ql, qh, scales, pack_half(parts.units[:, 0])], axis=1)


def _open_q3_k(data: np.ndarray) -> ScalarParts:
    blocks = data.reshape(-1, Q3_K_TYPE_SIZE)
    high = np.unpackbits(blocks[:, :32], axis=1, bitorder="little").reshape(-1, 32, 8).transpose(0, 2, 1)
    low = blocks[:, 32:96].reshape(-1, 2, 1, 32) >> SHIFTS & 3
    codes = low.reshape(-1, 256) | high.reshape(-1, 256) << 2
    d, scales = unpack_half(blocks[:, 108:])[:, 0], _unpack_scales(blocks[:, 96:108])
    return _parts(d, scales, codes.view(np.int8) - np.int8(4))


def _close_q3_k(parts: ScalarParts) -> np.ndarray:
    codes = (parts.levels + np.int8(4)).view(np.uint8)
    hmask = np.packbits(codes.reshape(-1, 8, 32) >> 2, axis=1, bitorder="little").reshape(-1, 32)
    qs = np.bitwise_or.reduce((codes & 3).reshape(-1, 2, 4, 32) << SHIFTS, axis=2).reshape(-1, 64)
    scales = _pack_scales(parts.scales[:, 0].astype(np.uint8))
    return np.concatenate([hmask, qs, scales, pack_half(parts.units[:, 0])], axis=1)


def _pack_scales(scales: np.ndarray) -> np.ndarray:
    """16 scales of 6 bits, uint8 [n, 16], to uint8 [n, 12].

    Byte j below 8 holds the lower four bits of scales j and 8 + j, low nibble first.
    Byte 8 + j holds the upper two bits of scales j, 4 + j, 8 + j, 12 + j at bits 0, 2, 4, 6.
    """
    low = scales & 15
    high = np.bitwise_or.reduce((scales >> 4).reshape(-1, 4, 4) << SHIFTS, axis=1)
    return np.concatenate([low[:, :8] | low[:, 8:] << 4, high], axis=1)


def _unpack_scales(packed: np.ndarray) -> np.ndarray:
    """The inverse of _pack_scales."""
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = (packed[:, None, 8:] >> SHIFTS & 3).reshape(-1, 16)
    return low | high << 4


def _decode(parts: ScalarParts, scale_offset: int) -> np.ndarray:
    steps = parts.units[:, :1] * (parts.scales[:, 0] - np.int16(scale_offset))
    return steps[:, :, None] * parts.levels.reshape(-1, N_SUB_BLOCKS, 16)


def _table(scale_offset: int) -> np.ndarray:
    return np.arange(-scale_offset, scale_offset, dtype=np.float32)


Q6_K_BLOCKS = ScalarBlocks(integers(-32, 31), N_SUB_BLOCKS, _table(128), NO_MINIMUM, _open_q6_k, _close_q6_k)
Q3_K_BLOCKS = ScalarBlocks(integers(-4, 3), N_SUB_BLOCKS, _table(32), NO_MINIMUM, _open_q3_k, _close_q3_k)
