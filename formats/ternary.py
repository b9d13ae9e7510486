"""TQ1_0, TQ2_0 and Q2_0: a scale and the codes -1, 0 and 1, which Q2_0 extends by a 2. A weight is d * code.

TQ1_0, ggml's block_tq1_0: 256 weights in 54 bytes, 1.6875 bits per weight
    qs   48     five base-3 digits a byte, code + 1, the first weight's digit the most significant:
                byte l < 32: weights l, 32 + l, .. 128 + l; byte 32 + l: weights 160 + l, 176 + l, .. 224 + l
    qh    4     byte l: four digits, weights 240 + l, 244 + l, 248 + l, 252 + l, and a fifth of zero
    d     2     float16
    The byte of the number n < 243 is ceil(n * 256 / 243): digits come out on top of 8 bits as it is multiplied by 3.

TQ2_0, ggml's block_tq2_0: 256 weights in 66 bytes, 2.0625 bits per weight
    qs   64     byte l of each half: code + 1 of its weights l, 32 + l, 64 + l, 96 + l, two bits each, lowest first
    d     2     float16

Q2_0, ggml's block_q2_0: 64 weights in 18 bytes, 2.25 bits per weight
    d     2     float16; of either sign, so that the 2 can serve the longer side of the weights
    qs   16     byte l: code + 1 of weights 4 l .. 4 l + 3, two bits each, lowest first

Which codes are the nearest changes, as d shrinks, at one magnitude a time: at |x| = d / 2 a code leaves zero, at
x = 3 d / 2 it becomes a 2. The encoder sorts a block's weights by the d of these events and keeps running sums of w x q
and w q^2: after every event the best d of these codes, rounded to float16, and the error it leaves are known. So the
result is the optimum over all codes and all float16 scales. Both efforts are the same, except that `fast` tries only
the likelier sign of Q2_0's d.

Weights that are ternary already come back exactly, if their blocks' scales are float16 numbers.
"""

from collections.abc import Callable

import numpy as np

from formats.block_format import Effort
from formats.compiler import njit
from formats.encoding import check_rows, to_blocks
from formats.iq_packing import pack_half, unpack_half
from formats.parts import NO_MINIMUM, ONE_VALUE, ScalarBlocks, ScalarParts, integers, single_scale

TQ_BLOCK_SIZE, TQ1_0_TYPE_SIZE, TQ2_0_TYPE_SIZE = 256, 54, 66
Q2_0_BLOCK_SIZE, Q2_0_TYPE_SIZE = 64, 18

_BATCH_WEIGHTS = 1 << 16

ZERO, HALF, ONE, TWO, THREE = (np.float32(value) for value in (0, 0.5, 1, 2, 3))
INFINITY = np.float32(np.inf)
F16_MAX, F16_MIN_NORMAL = np.float32(65504), np.float32(2**-14)
# A block without a weight beyond this is zero in every format: less than 1e-20 of the least float16.
NEGLIGIBLE = np.float32(1e-30)


def encode_tq1_0(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    d, codes = _search(rows, importance, effort, TQ_BLOCK_SIZE, has_two=False)
    return _pack_tq1_0(d, codes).reshape(len(rows), -1)


def decode_tq1_0(data: np.ndarray) -> np.ndarray:
    return _decode(_open_tq1_0(data)).reshape(len(data), -1)


def encode_tq2_0(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    d, codes = _search(rows, importance, effort, TQ_BLOCK_SIZE, has_two=False)
    return _pack_tq2_0(d, codes).reshape(len(rows), -1)


def decode_tq2_0(data: np.ndarray) -> np.ndarray:
    return _decode(_open_tq2_0(data)).reshape(len(data), -1)


def encode_q2_0(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    d, codes = _search(rows, importance, effort, Q2_0_BLOCK_SIZE, has_two=True)
    return _pack_q2_0(d, codes).reshape(len(rows), -1)


def decode_q2_0(data: np.ndarray) -> np.ndarray:
    return _decode(_open_q2_0(data)).reshape(len(data), -1)


def _open_tq1_0(data: np.ndarray) -> ScalarParts:
    blocks = data.reshape(-1, TQ1_0_TYPE_SIZE)
    codes = [_unpack_trits(blocks[:, :32], 5), _unpack_trits(blocks[:, 32:48], 5), _unpack_trits(blocks[:, 48:52], 4)]
    return _parts(blocks[:, 52:], np.concatenate(codes, axis=1))


def _open_tq2_0(data: np.ndarray) -> ScalarParts:
    blocks = data.reshape(-1, TQ2_0_TYPE_SIZE)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    codes = blocks[:, :64].reshape(-1, 2, 1, 32) >> shifts & 3
    return _parts(blocks[:, 64:], codes.reshape(-1, TQ_BLOCK_SIZE))


def _open_q2_0(data: np.ndarray) -> ScalarParts:
    blocks = data.reshape(-1, Q2_0_TYPE_SIZE)
    codes = blocks[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3
    return _parts(blocks[:, :2], codes.reshape(-1, Q2_0_BLOCK_SIZE))


def _pack_tq1_0(d: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """d: float16 as uint8 [n_blocks, 2]; codes: code + 1."""
    qs = [_pack_trits(codes[:, :160], 32), _pack_trits(codes[:, 160:240], 16), _pack_trits(codes[:, 240:], 4)]
    return np.concatenate([*qs, d], axis=1)


def _pack_tq2_0(d: np.ndarray, codes: np.ndarray) -> np.ndarray:
    fields = codes.reshape(-1, 2, 4, 32)
    qs = fields[:, :, 0] | fields[:, :, 1] << 2 | fields[:, :, 2] << 4 | fields[:, :, 3] << 6
    return np.concatenate([qs.reshape(-1, 64), d], axis=1)


def _pack_q2_0(d: np.ndarray, codes: np.ndarray) -> np.ndarray:
    qs = codes[:, ::4] | codes[:, 1::4] << 2 | codes[:, 2::4] << 4 | codes[:, 3::4] << 6
    return np.concatenate([d, qs], axis=1)


def _parts(d: np.ndarray, codes: np.ndarray) -> ScalarParts:
    return single_scale(unpack_half(d), codes.view(np.int8) - np.int8(1))


def _blocks(
    top: int,
    open_blocks: Callable[[np.ndarray], ScalarParts],
    pack: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> ScalarBlocks:
    def close(parts: ScalarParts) -> np.ndarray:
        return pack(pack_half(parts.units[:, 0]), (parts.levels + np.int8(1)).view(np.uint8))

    return ScalarBlocks(integers(-1, top), 1, ONE_VALUE, NO_MINIMUM, open_blocks, close)


TQ1_0_BLOCKS = _blocks(1, _open_tq1_0, _pack_tq1_0)
TQ2_0_BLOCKS = _blocks(1, _open_tq2_0, _pack_tq2_0)
Q2_0_BLOCKS = _blocks(2, _open_q2_0, _pack_q2_0)


def lossless_rows(rows: np.ndarray) -> np.ndarray:
    """Which rows TQ1_0 and TQ2_0 reproduce exactly: bool [n_rows]. rows: float32 [n_rows, n_columns].

    Those with one magnitude a block beside zero, and this magnitude a float16 number (BitNet, TriLM).
    """
    check_rows(rows, TQ_BLOCK_SIZE)
    magnitudes = np.abs(rows).reshape(len(rows), -1, TQ_BLOCK_SIZE)
    scale = magnitudes.max(axis=2, keepdims=True)
    with np.errstate(over="ignore"):
        stored = scale.astype(np.float16).astype(np.float32)
    return (((magnitudes == 0) | (magnitudes == scale)) & (stored == scale)).all(axis=(1, 2))


def _search(
    rows: np.ndarray, importance: np.ndarray | None, effort: Effort, block_size: int, has_two: bool
) -> tuple[np.ndarray, np.ndarray]:
    """d as bytes, uint8 [n_blocks, 2], and code + 1, uint8 [n_blocks, block_size]."""
    blocks, weights = to_blocks(rows, importance, block_size)
    scales, codes = np.empty(len(blocks), np.float32), np.empty(blocks.shape, np.uint8)
    # Whole rows at a time, as many as keep their events in the cache.
    step = len(weights) * max(1, _BATCH_WEIGHTS // weights.size)
    for first in range(0, len(blocks), step):
        batch = slice(first, first + step)
        events = _sort_events(blocks[batch], has_two)
        search_blocks(blocks[batch], weights, events, effort == "best", (scales[batch], codes[batch]))
    return scales.astype("<f2").view(np.uint8).reshape(-1, 2), codes


def _sort_events(blocks: np.ndarray, has_two: bool) -> np.ndarray:
    """The events of each block by rising magnitude, uint32 [n_blocks, n_events]; the lower bits are the event's index.

    Event j: code j leaves zero. With has_two, event block_size + j: code j becomes a 2, at a third of its magnitude.
    The magnitudes are those of float32 less the bits that hold the index, which are zeros in weights that were float16
    or bfloat16.
    """
    events = np.empty((len(blocks), blocks.shape[1] * (1 + has_two)), np.uint32)
    list_events(blocks, events)
    events.sort(axis=1)
    return events


def _pack_trits(digits: np.ndarray, n_bytes: int) -> np.ndarray:
    """uint8 [n, n_digits * n_bytes], digit k of byte l at k * n_bytes + l, to uint8 [n, n_bytes]."""
    digits = digits.reshape(len(digits), -1, n_bytes)
    number = digits[:, 0]
    for k in range(1, 5):
        number = number * np.uint8(3)
        if k < digits.shape[1]:
            number += digits[:, k]
    return ((number.astype(np.uint16) * np.uint16(256) + np.uint16(242)) // np.uint16(243)).astype(np.uint8)


def _unpack_trits(data: np.ndarray, n_digits: int) -> np.ndarray:
    shifted = data[:, None] * np.array([1, 3, 9, 27, 81], np.uint8)[:n_digits, None]
    return ((shifted.astype(np.uint16) * np.uint16(3)) >> 8).astype(np.uint8).reshape(len(data), -1)


def _decode(parts: ScalarParts) -> np.ndarray:
    return parts.units[:, :1] * parts.levels


_jit = njit(nogil=True, cache=True, error_model="numpy")


@_jit
def list_events(blocks, events):
    """What _sort_events sorts: events uint32 [n_blocks, n_events] of blocks float32 [n_blocks, block_size]."""
    size, n_events = blocks.shape[1], events.shape[1]
    upper_bits = np.uint32(0xFFFFFFFF - (n_events - 1))
    for b in range(blocks.shape[0]):
        # The shift drops the sign.
        for j in range(size):
            bits = np.float32(blocks[b, j]).view(np.uint32)
            events[b, j] = (bits << np.uint32(1)) & upper_bits | np.uint32(j)
        for j in range(size, n_events):
            bits = np.float32(blocks[b, j - size] / THREE).view(np.uint32)
            events[b, j] = (bits << np.uint32(1)) & upper_bits | np.uint32(j)


@_jit
def round_f16(value):
    """The float16 nearest to a value >= 0, as float32; beyond the range of float16 the largest one."""
    value = min(value, F16_MAX)
    split = value * np.float32(2**13 + 1)  # Veltkamp: leaves the upper 24 - 13 bits
    # Subnormals are multiples of 2**-24, which is the spacing of float32 in [0.5, 1).
    half = np.float32(0.5)
    return (value + half) - half if value < F16_MIN_NORMAL else split - (split - value)


@_jit
def best_scale(sum_xq, sum_qq, largest, scale, gain):
    """The float16 scale of the best codes, by their sums in units of the largest weight, and the error it takes away.

    sum_xq, sum_qq: of each trial; scale, gain: room for as many.
    """
    inverse = ONE / largest
    for t in range(gain.size):
        scale[t] = round_f16(largest * (sum_xq[t] / sum_qq[t]))
        step = scale[t] * inverse
        gain[t] = step * (TWO * sum_xq[t] - step * sum_qq[t])
    g0, g1, g2, g3 = gain[0], gain[1], gain[2], gain[3]
    for t in range(4, gain.size, 4):
        g0, g1 = max(g0, gain[t]), max(g1, gain[t + 1])
        g2, g3 = max(g2, gain[t + 2]), max(g3, gain[t + 3])
    most = max(g0, g1, g2, g3)
    for t in range(gain.size):
        if gain[t] == most:
            return scale[t], most
    return ZERO, ZERO


@_jit
def write_codes(x, d, has_two, codes):
    """code + 1 of every weight under the scale d, of either sign."""
    step = abs(d)
    half = step * HALF
    limit = half * THREE if has_two else INFINITY
    sign = np.float32(-1) if d < ZERO else np.float32(1)
    if step == ZERO:
        codes[:] = 1
        return
    for j in range(x.size):
        y = x[j] * sign
        codes[j] = np.uint8(1) + np.uint8(y > half) + np.uint8(y > limit) - np.uint8(y < -half)


@_jit
def longer_side(x, w, largest):
    """The sign of the weights that get the 2, by their fourth moments: it is the better one nine times in ten."""
    m0, m1, m2, m3 = ZERO, ZERO, ZERO, ZERO
    for j in range(0, x.size, 4):
        a0, a1, a2, a3 = x[j] / largest, x[j + 1] / largest, x[j + 2] / largest, x[j + 3] / largest
        m0 += w[j] * (a0 * a0 * a0 * abs(a0))
        m1 += w[j + 1] * (a1 * a1 * a1 * abs(a1))
        m2 += w[j + 2] * (a2 * a2 * a2 * abs(a2))
        m3 += w[j + 3] * (a3 * a3 * a3 * abs(a3))
    return ONE if (m0 + m1) + (m2 + m3) >= ZERO else -ONE


@_jit
def sum_events(x, w, events, sign, largest, steps, sums):
    """sums[0..1, k] = Swxq, Swqq of the codes after the k + 1 events of the largest magnitudes, in units of `largest`.

    sign: of the weights that may become a 2. steps: room for what each event adds.
    """
    size, n_events = x.size, events.size
    for j in range(size):
        steps[0, j], steps[1, j] = w[j] * (abs(x[j]) / largest), w[j]
    for j in range(n_events - size):
        longer = np.float32(x[j] * sign > ZERO)
        # The square of the code grows from 1 to 4.
        steps[0, size + j], steps[1, size + j] = longer * steps[0, j], longer * (THREE * w[j])
    # Two halves side by side, as each sum has to wait for the one before.
    half, last = n_events // 2, n_events - 1
    xq0, qq0, xq1, qq1 = ZERO, ZERO, ZERO, ZERO
    for k in range(half):
        event = events[last - k] & last
        xq0 += steps[0, event]
        qq0 += steps[1, event]
        sums[0, k], sums[1, k] = xq0, qq0
        event = events[last - half - k] & last
        xq1 += steps[0, event]
        qq1 += steps[1, event]
        sums[0, half + k], sums[1, half + k] = xq1, qq1
    for k in range(half, n_events):
        sums[0, k] += xq0
        sums[1, k] += qq0


@_jit
def search_blocks(blocks, weights, events, both_sides, out):
    """The best scale of each block, and its codes.

    blocks float32 [n_blocks, block_size], weights float32 [blocks_per_row, block_size].
    events uint32 [n_blocks, n_events]: by rising magnitude, as _sort_events makes them.
    both_sides: where codes reach to 2, try both signs of d.
    out: (scales float32 [n_blocks], code + 1 uint8 like blocks).
    """
    scales, codes = out
    size, n_events = blocks.shape[1], events.shape[1]
    has_two = n_events > size
    # One array: in two of them a load may look as if it waited for a store, when they lie 4096 bytes apart.
    room = np.empty((6, n_events), np.float32)
    steps, sums, trials = room[:2], room[2:4], room[4:]
    for b in range(blocks.shape[0]):
        x, w = blocks[b], weights[b % weights.shape[0]]
        largest = abs(x[events[b, n_events - 1] & (size - 1)])
        if largest < NEGLIGIBLE:
            scales[b] = ZERO
            codes[b, :] = 1
            continue
        sign = longer_side(x, w, largest) if has_two else ONE
        sum_events(x, w, events[b], sign, largest, steps, sums)
        scale, gain = best_scale(sums[0], sums[1], largest, trials[0], trials[1])
        scales[b] = scale * sign
        if has_two and both_sides:
            sum_events(x, w, events[b], -sign, largest, steps, sums)
            other_scale, other_gain = best_scale(sums[0], sums[1], largest, trials[0], trials[1])
            if other_gain > gain:
                scales[b] = other_scale * -sign
        write_codes(x, scales[b], has_two, codes[b])
