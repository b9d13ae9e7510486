"""Q4_0 and Q5_0: 32 weights with one scale. A weight is d * (code - offset).

Q4_0, ggml's block_q4_0: 18 bytes, 4.5 bits per weight, offset 8
    d     2     float16, of either sign
    qs   16     byte l: code of weight l in the low nibble, of weight 16 + l in the high one

Q5_0, ggml's block_q5_0: 22 bytes, 5.5 bits per weight, offset 16
    d     2     float16, of either sign
    qh    4     bit j, little endian: the code's fifth bit of weight j
    qs   16     the codes' lower four bits, as Q4_0
"""

import numpy as np

from formats.block_format import Effort
from formats.encoding import to_blocks
from formats.iq_packing import pack_half, unpack_half
from formats.parts import NO_MINIMUM, ONE_VALUE, ScalarBlocks, ScalarParts, integers, single_scale
from formats.scale_search import search_blocks

BLOCK_SIZE = 32
Q4_0_TYPE_SIZE, Q5_0_TYPE_SIZE = 18, 22


def _peak_codes(offset: int, n: int, widest: float, narrowest: float) -> np.ndarray:
    """Trial codes of a block's largest weight: n about the negative end, n about the positive one, as shares of it.

    The end itself, ggml's choice, is among them, so that no block comes out worse than there."""
    shares = np.geomspace(widest, narrowest, n, dtype=np.float32)
    shares[np.abs(shares - 1).argmin()] = 1
    return offset * np.concatenate([-shares, shares])


# Effort: trial codes of the largest weight, refits of the best. Where other weights matter more than the largest one,
# it may be cut down to less than half; and a scale that leaves codes unused may happen to fit.
def _effort(offset: int, effort: Effort) -> tuple[np.ndarray, int]:
    if effort == "fast":
        return _peak_codes(offset, 24, 0.7, 1.6), 1
    return _peak_codes(offset, 48, 0.6, 2.2), 2


def encode_q4_0(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    return _close_q4_0(_search(rows, importance, effort, offset=8)).reshape(len(rows), -1)


def encode_q5_0(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    return _close_q5_0(_search(rows, importance, effort, offset=16)).reshape(len(rows), -1)


def decode_q4_0(data: np.ndarray) -> np.ndarray:
    return _decode(_open_q4_0(data)).reshape(len(data), -1)


def decode_q5_0(data: np.ndarray) -> np.ndarray:
    return _decode(_open_q5_0(data)).reshape(len(data), -1)


def _search(rows: np.ndarray, importance: np.ndarray | None, effort: Effort, offset: int) -> ScalarParts:
    blocks, weights = to_blocks(rows, importance, BLOCK_SIZE)
    scales, codes = np.empty(len(blocks), np.float32), np.empty(blocks.shape, np.int8)
    bottom, top = np.float32(-offset), np.float32(offset - 1)
    search_blocks(blocks, weights, bottom, top, *_effort(offset, effort), (scales, codes))
    return single_scale(scales[:, None], codes)


def _open_q4_0(data: np.ndarray) -> ScalarParts:
    blocks = data.reshape(-1, Q4_0_TYPE_SIZE)
    codes = _unpack_nibbles(blocks[:, 2:])
    return single_scale(unpack_half(blocks[:, :2]), codes.view(np.int8) - np.int8(8))


def _close_q4_0(parts: ScalarParts) -> np.ndarray:
    codes = (parts.levels + np.int8(8)).view(np.uint8)
    return np.concatenate([pack_half(parts.units[:, 0]), _pack_nibbles(codes)], axis=1)


def _open_q5_0(data: np.ndarray) -> ScalarParts:
    blocks = data.reshape(-1, Q5_0_TYPE_SIZE)
    codes = _unpack_nibbles(blocks[:, 6:]) | np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little") << 4
    return single_scale(unpack_half(blocks[:, :2]), codes.view(np.int8) - np.int8(16))


def _close_q5_0(parts: ScalarParts) -> np.ndarray:
    codes = (parts.levels + np.int8(16)).view(np.uint8)
    qh = np.packbits(codes >> 4, axis=1, bitorder="little")
    return np.concatenate([pack_half(parts.units[:, 0]), qh, _pack_nibbles(codes & 15)], axis=1)


def _pack_nibbles(codes: np.ndarray) -> np.ndarray:
    return codes[:, :16] | codes[:, 16:] << 4


def _unpack_nibbles(qs: np.ndarray) -> np.ndarray:
    return np.concatenate([qs & 15, qs >> 4], axis=1)


def _decode(parts: ScalarParts) -> np.ndarray:
    return parts.units[:, :1] * parts.levels


Q4_0_BLOCKS = ScalarBlocks(integers(-8, 7), 1, ONE_VALUE, NO_MINIMUM, _open_q4_0, _close_q4_0)
Q5_0_BLOCKS = ScalarBlocks(integers(-16, 15), 1, ONE_VALUE, NO_MINIMUM, _open_q5_0, _close_q5_0)
