"""IQ2_XXS, IQ2_XS and IQ2_S: 32 groups of 8 weights; a group is a scale times a point of a grid, with signs.

The grids have 256, 512 and 1024 points with coordinates 8, 25 and 43 (gguf.quants). A weight is
d * (scale + 0.5) * 0.25 * coordinate, with a sign. In IQ2_XXS and IQ2_XS the number of minus signs of a group is even,
and the eighth sign is not stored. All blocks have 256 weights.

IQ2_XXS, ggml's block_iq2_xxs: 66 bytes, 2.0625 bits per weight; a 4-bit scale for 32 weights
    d        2     float16
    qs      64     8 bytes for 32 weights: 4 point indices; 32 bits, little endian, 4 x 7 signs and the scale

IQ2_XS, ggml's block_iq2_xs: 74 bytes, 2.3125 bits per weight; a 4-bit scale for 16 weights
    d        2     float16
    qs      64     16 bits a group, little endian: point index in the lower 9, 7 signs above
    scales   8     byte i: scale of sub-block 2 i in the low nibble, of 2 i + 1 in the high one

IQ2_S, ggml's block_iq2_s: 82 bytes, 2.5625 bits per weight; a 4-bit scale for 16 weights
    d        2     float16
    qs      32     lower 8 bits of each group's point index
    signs   32     a byte a group, bit j set where weight j is negative
    qh       8     upper two bits of the point indices, the first group's lowest
    scales   8     as IQ2_XS
"""

import numpy as np

from formats.block_format import Effort
from formats.grids import points
from formats.iq_kernels import FREE, PARITY
from formats.iq_packing import (
    EVEN_BYTES,
    decode_points,
    pack_half,
    pack_nibbles,
    pack_signs_and_scales,
    unpack_half,
    unpack_nibbles,
    unpack_signs_and_scales,
)
from formats.iq_search import search_efforts, search_rows
from formats.parts import Layout, PointBlocks, PointParts

BLOCK_SIZE = 256
IQ2_XXS_TYPE_SIZE, IQ2_XS_TYPE_SIZE, IQ2_S_TYPE_SIZE = 66, 74, 82
QH_SHIFTS = np.array([0, 2, 4, 6], np.uint8)

_TOP_CODE, _UNIT = np.float32(15), np.float32(1 / 8)
IQ2_XXS_LAYOUT = Layout(PARITY, 1, 1, 8, _TOP_CODE, _UNIT)
IQ2_XS_LAYOUT = Layout(PARITY, 1, 1, 16, _TOP_CODE, _UNIT)
IQ2_S_LAYOUT = Layout(FREE, 1, 1, 16, _TOP_CODE, _UNIT)

_IQ2_XXS_EFFORTS = search_efforts(IQ2_XXS_LAYOUT, 43, 6, n_candidates=(64, 16), n_rounds=2)
_IQ2_XS_EFFORTS = search_efforts(IQ2_XS_LAYOUT, 43, 6, n_candidates=(64, 16), n_rounds=2)
_IQ2_S_EFFORTS = search_efforts(IQ2_S_LAYOUT, 43, 6, n_candidates=(64, 8), n_rounds=1)


def encode_iq2_xxs(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    parts = PointParts(*search_rows(rows, importance, "IQ2_XXS", IQ2_XXS_LAYOUT, _IQ2_XXS_EFFORTS[effort]))
    return _close_iq2_xxs(parts).reshape(len(rows), -1)


def encode_iq2_xs(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    parts = PointParts(*search_rows(rows, importance, "IQ2_XS", IQ2_XS_LAYOUT, _IQ2_XS_EFFORTS[effort]))
    return _close_iq2_xs(parts).reshape(len(rows), -1)


def encode_iq2_s(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    parts = PointParts(*search_rows(rows, importance, "IQ2_S", IQ2_S_LAYOUT, _IQ2_S_EFFORTS[effort]))
    return _close_iq2_s(parts).reshape(len(rows), -1)


def _close_iq2_xxs(parts: PointParts) -> np.ndarray:
    d, scales, indices, signs = parts
    words = pack_signs_and_scales(signs, scales)[:, :, None]
    qs = np.concatenate([indices.astype(np.uint8).reshape(-1, 8, 4), words.view(np.uint8)], axis=2)
    return np.concatenate([pack_half(d), qs.reshape(-1, 64)], axis=1)


def _close_iq2_xs(parts: PointParts) -> np.ndarray:
    d, scales, indices, signs = parts
    qs = (indices | (signs & 127).astype(np.uint16) << 9).astype("<u2").view(np.uint8)
    return np.concatenate([pack_half(d), qs, pack_nibbles(scales)], axis=1)


def _close_iq2_s(parts: PointParts) -> np.ndarray:
    d, scales, indices, signs = parts
    qs, high = indices.astype(np.uint8), (indices >> 8).astype(np.uint8).reshape(-1, 8, 4)
    qh = np.bitwise_or.reduce(high << QH_SHIFTS, axis=2)
    return np.concatenate([pack_half(d), qs, signs, qh, pack_nibbles(scales)], axis=1)


def decode_iq2_xxs(data: np.ndarray) -> np.ndarray:
    return _decode(_open_iq2_xxs(data), "IQ2_XXS").reshape(len(data), -1)


def decode_iq2_xs(data: np.ndarray) -> np.ndarray:
    return _decode(_open_iq2_xs(data), "IQ2_XS").reshape(len(data), -1)


def decode_iq2_s(data: np.ndarray) -> np.ndarray:
    return _decode(_open_iq2_s(data), "IQ2_S").reshape(len(data), -1)


def _open_iq2_xxs(data: np.ndarray) -> PointParts:
    blocks = data.reshape(-1, IQ2_XXS_TYPE_SIZE)
    qs = np.ascontiguousarray(blocks[:, 2:]).reshape(-1, 8, 8)
    signs, scales = unpack_signs_and_scales(np.ascontiguousarray(qs[:, :, 4:]).view("<u4")[:, :, 0])
    return _parts(blocks, scales, qs[:, :, :4].reshape(-1, 32), signs)


def _open_iq2_xs(data: np.ndarray) -> PointParts:
    blocks = data.reshape(-1, IQ2_XS_TYPE_SIZE)
    qs = np.ascontiguousarray(blocks[:, 2:66]).view("<u2")
    return _parts(blocks, unpack_nibbles(blocks[:, 66:]), qs & 511, EVEN_BYTES[qs >> 9])


def _open_iq2_s(data: np.ndarray) -> PointParts:
    blocks = data.reshape(-1, IQ2_S_TYPE_SIZE)
    high = (blocks[:, 66:74, None] >> QH_SHIFTS & 3).reshape(-1, 32).astype(np.uint16)
    signs = np.ascontiguousarray(blocks[:, 34:66])
    return _parts(blocks, unpack_nibbles(blocks[:, 74:]), blocks[:, 2:34] | high << 8, signs)


def _parts(blocks: np.ndarray, scales: np.ndarray, indices: np.ndarray, signs: np.ndarray) -> PointParts:
    return PointParts(unpack_half(blocks[:, :2])[:, 0], scales, indices.astype(np.uint16), signs)


def _decode(parts: PointParts, grid: str) -> np.ndarray:
    scales = parts.d[:, None] * (np.float32(0.5) + parts.scales) * np.float32(0.25)
    return decode_points(scales, points(grid)[parts.indices], parts.signs)


IQ2_XXS_BLOCKS = PointBlocks("IQ2_XXS", IQ2_XXS_LAYOUT, _open_iq2_xxs, _close_iq2_xxs)
IQ2_XS_BLOCKS = PointBlocks("IQ2_XS", IQ2_XS_LAYOUT, _open_iq2_xs, _close_iq2_xs)
IQ2_S_BLOCKS = PointBlocks("IQ2_S", IQ2_S_LAYOUT, _open_iq2_s, _close_iq2_s)
