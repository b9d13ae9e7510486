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

import numpy as np
from gguf import GGMLQuantizationType as Type

from bitwright.formats.block_format import NewerType, scalar_format
from bitwright.formats.choices import Effort
from bitwright.formats.compiler import Array, Real, jit
from bitwright.formats.encoding import check_rows, to_blocks
from bitwright.formats.kernels.float16 import NEGLIGIBLE, round_f16
from bitwright.formats.packing import pack_bits, pack_half, unpack_bits, unpack_half
from bitwright.formats.parts import ScalarBlocks, ScalarParts, integers, single_scale

_BATCH_WEIGHTS = 1 << 16

ZERO, HALF, ONE, TWO, THREE = (np.float32(value) for value in (0, 0.5, 1, 2, 3))
INFINITY = np.float32(np.inf)


def _unpack_tq1_0(blocks: np.ndarray) -> ScalarParts:
    codes = [_unpack_trits(blocks[:, :32], 5), _unpack_trits(blocks[:, 32:48], 5), _unpack_trits(blocks[:, 48:52], 4)]
    return _parts(unpack_half(blocks[:, 52:]), np.concatenate(codes, axis=1))


def _pack_tq1_0(parts: ScalarParts) -> np.ndarray:
    d, codes = _fields(parts)
    qs = [_pack_trits(codes[:, :160], 32), _pack_trits(codes[:, 160:240], 16), _pack_trits(codes[:, 240:], 4)]
    return np.concatenate([*qs, d], axis=1)


def _unpack_tq2_0(blocks: np.ndarray) -> ScalarParts:
    return _parts(unpack_half(blocks[:, 64:]), unpack_bits(blocks[:, :64], 2, 32))


def _pack_tq2_0(parts: ScalarParts) -> np.ndarray:
    d, codes = _fields(parts)
    return np.concatenate([pack_bits(codes, 2, 32), d], axis=1)


def _unpack_q2_0(blocks: np.ndarray) -> ScalarParts:
    return _parts(unpack_half(blocks[:, :2]), unpack_bits(blocks[:, 2:], 2))


def _pack_q2_0(parts: ScalarParts) -> np.ndarray:
    d, codes = _fields(parts)
    return np.concatenate([d, pack_bits(codes, 2)], axis=1)


def _parts(d: np.ndarray, codes: np.ndarray) -> ScalarParts:
    """d: float32 [n_blocks, 1]; codes: code + 1, uint8 [n_blocks, block_size]."""
    return single_scale(d, codes.view(np.int8) - np.int8(1))


def _fields(parts: ScalarParts) -> tuple[np.ndarray, np.ndarray]:
    """d as bytes, uint8 [n_blocks, 2], and code + 1, uint8 [n_blocks, block_size]."""
    return pack_half(parts.units[:, 0]), (parts.levels + np.int8(1)).view(np.uint8)


def _search(rows: np.ndarray, importance: np.ndarray | None, effort: Effort, of: ScalarBlocks) -> ScalarParts:
    blocks, weights = to_blocks(rows, importance, of.block_size)
    has_two = of.levels[-1] == 2
    scales, codes = np.empty(len(blocks), np.float32), np.empty(blocks.shape, np.uint8)
    # Whole rows at a time, as many as keep their events in the cache.
    step = len(weights) * max(1, _BATCH_WEIGHTS // weights.size)
    for first in range(0, len(blocks), step):
        batch = slice(first, first + step)
        events = _sort_events(blocks[batch], has_two)
        search_blocks(blocks[batch], weights, events, effort == "best", (scales[batch], codes[batch]))
    return _parts(scales[:, None], codes)


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


_TQ1_0_BLOCKS = ScalarBlocks(256, 54, _unpack_tq1_0, _pack_tq1_0, integers(-1, 1))
_TQ2_0_BLOCKS = ScalarBlocks(256, 66, _unpack_tq2_0, _pack_tq2_0, integers(-1, 1))
_Q2_0_BLOCKS = ScalarBlocks(64, 18, _unpack_q2_0, _pack_q2_0, integers(-1, 2))
TQ1_0, TQ2_0 = scalar_format(Type.TQ1_0, _TQ1_0_BLOCKS, _search), scalar_format(Type.TQ2_0, _TQ2_0_BLOCKS, _search)
Q2_0 = scalar_format(NewerType.Q2_0, _Q2_0_BLOCKS, _search)


def lossless_rows(rows: np.ndarray, block_size: int = TQ1_0.block_size) -> np.ndarray:
    """Which rows a ternary format of this block size reproduces exactly: bool [n_rows]. rows: float32 [n_rows,
    n_columns].

    Those with one magnitude a block beside zero, and this magnitude a float16 number (BitNet, TriLM).
    """
    check_rows(rows, block_size)
    magnitudes = np.abs(rows).reshape(len(rows), -1, block_size)
    scale = magnitudes.max(axis=2, keepdims=True)
    with np.errstate(over="ignore"):
        stored = scale.astype(np.float16).astype(np.float32)
    exact: np.ndarray = (((magnitudes == 0) | (magnitudes == scale)) & (stored == scale)).all(axis=(1, 2))
    return exact


@jit
def list_events(blocks: Array, events: Array) -> None:
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


@jit
def best_scale(sum_xq: Array, sum_qq: Array, largest: Real, scale: Array, gain: Array) -> tuple[Real, Real]:
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


@jit
def write_codes(x: Array, d: Real, has_two: bool, codes: Array) -> None:
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


@jit
def longer_side(x: Array, w: Array, largest: Real) -> Real:
    """The sign of the weights that get the 2, by their fourth moments: it is the better one nine times in ten."""
    m0, m1, m2, m3 = ZERO, ZERO, ZERO, ZERO
    for j in range(0, x.size, 4):
        a0, a1, a2, a3 = x[j] / largest, x[j + 1] / largest, x[j + 2] / largest, x[j + 3] / largest
        m0 += w[j] * (a0 * a0 * a0 * abs(a0))
        m1 += w[j + 1] * (a1 * a1 * a1 * abs(a1))
        m2 += w[j + 2] * (a2 * a2 * a2 * abs(a2))
        m3 += w[j + 3] * (a3 * a3 * a3 * abs(a3))
    return ONE if (m0 + m1) + (m2 + m3) >= ZERO else -ONE


@jit
def sum_events(x: Array, w: Array, events: Array, sign: Real, largest: Real, steps: Array, sums: Array) -> None:
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


@jit
def search_blocks(blocks: Array, weights: Array, events: Array, both_sides: bool, out: tuple[Array, Array]) -> None:
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
