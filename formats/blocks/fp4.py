"""MXFP4 and NVFP4: a shared scale and 4-bit floats, E2M1: a sign and 0, 0.5, 1, 1.5, 2, 3, 4 or 6.

MXFP4, ggml's block_mxfp4: 32 weights in 17 bytes, 4.25 bits per weight
    e     1     the scale 2**(e - 127) (E8M0 of the OCP microscaling formats)
    qs   16     byte l: code of weight l in the low nibble, of weight 16 + l in the high one

NVFP4, ggml's block_nvfp4: 64 weights in 36 bytes, 4.5 bits per weight
    d     4     UE4M3 scales of 16 weights each: exponent of bias 7 in bits 3 .. 6, mantissa in bits 0 .. 2
    qs   32     8 bytes for each 16 weights: weight l in the low nibble of byte l, weight 8 + l in the high one

A code's bit 3 is its sign, bits 0 .. 2 count the magnitudes above. The scales of NVFP4 reach from 2**-9 to 448 and lose
their mantissa below 2**-6, where the weights of most models lie. So a tensor may have a second-level scale beside its
blocks, by which its values are multiplied again (GGUF: the F32 tensor NAME.scale); blocks hold weight / tensor_scale.

The encoder tries stored scales from large to small, and gives each weight its nearest value under every one. `best`
ends when the error of the weights beyond the greatest code is as large as the least error found, so that no other scale
can be better; `fast` tries one window. Both formats count in halves: the step d is half of the scale, the levels are
0, 1, 2, 3, 4, 6, 8 and 12, as in ggml.
"""

import math

import numpy as np
from gguf import GGMLQuantizationType as Type

from bitwright.formats.block_format import BlockFormat
from bitwright.formats.choices import Effort
from bitwright.formats.compiler import Array, Real, inlined, jit
from bitwright.formats.encoding import to_blocks
from bitwright.formats.kernels.fp8_scales import MAGNITUDES
from bitwright.formats.kernels.lanes import magnitude
from bitwright.formats.packing import pack_bits, unpack_bits
from bitwright.formats.parts import ScalarBlocks, ScalarParts, scaled_sub_blocks

MXFP4_BLOCK_SIZE, MXFP4_TYPE_SIZE = 32, 17
NVFP4_BLOCK_SIZE, NVFP4_TYPE_SIZE, NVFP4_SUB_BLOCK_SIZE = 64, 36, 16

LEVELS = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32)
SIGNED_LEVELS = np.concatenate([LEVELS, 0 - LEVELS])

# By code. Beyond 252 MXFP4's greatest level would be infinite; NVFP4's codes 0 and 127 both stand for zero.
MXFP4_STEPS = np.ldexp(np.float32(1), np.arange(253) - 128).astype(np.float32)
NVFP4_STEPS = (MAGNITUDES[:127] / 2).astype(np.float32)
# Of a byte with the unused upper bit set, decoders strip it, but 255 they do not take for a zero.
_NVFP4_STEPS_OF_BYTES = np.concatenate([NVFP4_STEPS, [0], NVFP4_STEPS, MAGNITUDES[127:] / 2]).astype(np.float32)

# Exponents of tensor scales stay normal float32.
_MIN_TENSOR_EXPONENT = -126

# The largest scale that is tried, as a share of the largest weight. A scale under which that weight gets 2 or less is
# never better than half of it, which has the same values and more.
REACH = np.float32(1 / 2.5)
TOP_LEVEL = np.float32(12)
ZERO, ONE, TWO, FOUR = np.float32(0), np.float32(1), np.float32(2), np.float32(4)
EIGHT, SIXTEEN, HALF, QUARTER = np.float32(8), np.float32(16), np.float32(0.5), np.float32(0.25)
INFINITY = np.float32(np.inf)
# Weights side by side, where the lanes of a loop are weights: half of an MXFP4 block, a sub-block of NVFP4.
WEIGHT_LANES = 16
# From here on, a loop over trial scales fills the vector registers.
MANY_SCALES = 8
# NVFP4's code 0 is a scale of zero.
SMALLEST_CODE = 1
# Splits off the upper two bits of a float32 (Veltkamp): levels from 2 on have one bit behind the leading one.
SPLIT = np.float32(2**22 + 1)
# Weights so far beyond the greatest value are all alike; their squares stay inside float32.
FAR = np.float32(1e6)


def encode_mxfp4(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    blocks, weights = to_blocks(rows, importance, MXFP4_BLOCK_SIZE)
    data = np.empty((len(blocks), MXFP4_TYPE_SIZE), np.uint8)
    # The exponent of a float32, whose bias is 127 too.
    first = (23, 0, 1)
    search_blocks(blocks, weights, MXFP4_STEPS, first, 3, effort == "best", data)
    write_blocks(blocks, MXFP4_STEPS, data)
    return data.reshape(len(rows), -1)


def search_mxfp4(rows: np.ndarray, importance: np.ndarray | None, effort: Effort) -> tuple[np.ndarray, np.ndarray]:
    """The codes of the scales, uint8 [n_blocks], and of the weights, uint8 [n_blocks, 32]; arguments as encoders'."""
    data = encode_mxfp4(rows, importance, effort).reshape(-1, MXFP4_TYPE_SIZE)
    return data[:, 0], unpack_bits(data[:, 1:], 4, 16)


def _decode_mxfp4(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(-1, MXFP4_TYPE_SIZE)
    with np.errstate(over="ignore"):
        step = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)
        weights: np.ndarray = step * SIGNED_LEVELS[unpack_bits(blocks[:, 1:], 4, 16)]
    return weights.reshape(len(data), -1)


def encode_nvfp4(
    rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best", tensor_scale: float = 1.0
) -> np.ndarray:
    """As every encoder; what is encoded is rows / tensor_scale. A weight beyond 2688 tensor_scale is cut off there."""
    scaled = rows if tensor_scale == 1 else rows / np.float32(tensor_scale)
    blocks, weights = to_blocks(scaled, importance, NVFP4_SUB_BLOCK_SIZE)
    return _nvfp4_blocks(blocks, weights, effort).reshape(len(rows), -1)


def search_nvfp4(rows: np.ndarray, importance: np.ndarray | None, effort: Effort) -> tuple[np.ndarray, np.ndarray]:
    """As search_mxfp4, of sub-blocks of 16 weights, however many a row has."""
    blocks, weights = to_blocks(rows, importance, NVFP4_SUB_BLOCK_SIZE)
    n_blocks = len(blocks)
    if missing := -n_blocks % 4:
        blocks = np.concatenate([blocks, np.zeros((missing, NVFP4_SUB_BLOCK_SIZE), np.float32)])
    data = _nvfp4_blocks(blocks, weights, effort)
    return data[:, :4].reshape(-1)[:n_blocks], unpack_bits(data[:, 4:], 4, 8).reshape(-1, 16)[:n_blocks]


def _nvfp4_blocks(blocks: np.ndarray, weights: np.ndarray, effort: Effort) -> np.ndarray:
    """uint8 [n_sub_blocks / 4, 36]; blocks float32 [n_sub_blocks, 16], weights float32 [sub_blocks_per_row, 16]."""
    data = np.empty((len(blocks) // 4, NVFP4_TYPE_SIZE), np.uint8)
    # The exponent and three bits of the mantissa. Below code 16 half of a scale may be none, so all of them are tried.
    first = (20, 8 * 120, 15)
    search_blocks(blocks, weights, NVFP4_STEPS, first, 16, effort == "best", data)
    write_blocks(blocks, NVFP4_STEPS, data)
    return data


def decode_nvfp4(data: np.ndarray) -> np.ndarray:
    """Without the tensor's second-level scale."""
    blocks = data.reshape(-1, NVFP4_TYPE_SIZE)
    steps = _NVFP4_STEPS_OF_BYTES[blocks[:, :4]]
    levels = SIGNED_LEVELS[unpack_bits(blocks[:, 4:], 4, 8)].reshape(-1, 4, 16)
    weights: np.ndarray = steps[..., None] * levels
    return weights.reshape(len(data), -1)


def nvfp4_tensor_scale(absolute_maximum: float) -> float:
    """The second-level scale of a tensor whose largest weight has that magnitude.

    A power of two, so that dividing by it loses nothing. The greatest block scale comes to lie in 128 .. 256 where the
    largest weight is stored as 6, and in 192 .. 384 where it is stored as 4; UE4M3 ends at 448.
    """
    if absolute_maximum == 0:
        return 1.0
    fraction, exponent = math.frexp(absolute_maximum / (6 * 256))
    return math.ldexp(1.0, max(exponent - (fraction == 0.5), _MIN_TENSOR_EXPONENT))


def _unpack_mxfp4(blocks: np.ndarray) -> ScalarParts:
    scales = np.minimum(blocks[:, :1], len(MXFP4_STEPS) - 1)
    return scaled_sub_blocks(1, scales, levels_of(unpack_bits(blocks[:, 1:], 4, 16)))


def _pack_mxfp4(parts: ScalarParts) -> np.ndarray:
    return np.concatenate([parts.scales[:, 0].astype(np.uint8), pack_bits(codes_of(parts.levels), 4, 16)], axis=1)


def _unpack_nvfp4(blocks: np.ndarray) -> ScalarParts:
    scales = np.minimum(blocks[:, :4] & 127, len(NVFP4_STEPS) - 1)
    return scaled_sub_blocks(1, scales, levels_of(unpack_bits(blocks[:, 4:], 4, 8)))


def _pack_nvfp4(parts: ScalarParts) -> np.ndarray:
    return np.concatenate([parts.scales[:, 0].astype(np.uint8), pack_bits(codes_of(parts.levels), 4, 8)], axis=1)


def levels_of(codes: np.ndarray) -> np.ndarray:
    """The signed levels of codes, int8 of the same shape."""
    levels: np.ndarray = SIGNED_LEVELS[codes]
    return levels.astype(np.int8)


def codes_of(levels: np.ndarray) -> np.ndarray:
    """The codes of signed levels, uint8 of the same shape. A level of 0 gets code 0, without a sign."""
    codes: np.ndarray = np.searchsorted(LEVELS, np.abs(levels)).astype(np.uint8) | (levels < 0).astype(np.uint8) << 3
    return codes


ALL_LEVELS = np.unique(SIGNED_LEVELS).astype(np.int8)
_MXFP4_BLOCKS = ScalarBlocks(
    MXFP4_BLOCK_SIZE, MXFP4_TYPE_SIZE, _unpack_mxfp4, _pack_mxfp4, ALL_LEVELS, scale_table=MXFP4_STEPS, fixed_unit=True
)
_NVFP4_BLOCKS = ScalarBlocks(
    NVFP4_BLOCK_SIZE, NVFP4_TYPE_SIZE, _unpack_nvfp4, _pack_nvfp4, ALL_LEVELS, 4, NVFP4_STEPS, fixed_unit=True
)
MXFP4 = BlockFormat(Type.MXFP4, MXFP4_BLOCK_SIZE, MXFP4_TYPE_SIZE, encode_mxfp4, _decode_mxfp4, blocks=_MXFP4_BLOCKS)
NVFP4 = BlockFormat(
    Type.NVFP4,
    NVFP4_BLOCK_SIZE,
    NVFP4_TYPE_SIZE,
    encode_nvfp4,
    decode_nvfp4,
    tensor_scale=nvfp4_tensor_scale,
    blocks=_NVFP4_BLOCKS,
)


@inlined
def total(lanes: Array) -> Real:
    """The sum over lanes, in four chains, as each sum has to wait for the one before."""
    s0, s1, s2, s3 = lanes[0], lanes[1], lanes[2], lanes[3]
    for t in range(4, lanes.size, 4):
        s0 += lanes[t]
        s1 += lanes[t + 1]
        s2 += lanes[t + 2]
        s3 += lanes[t + 3]
    summed: Real = (s0 + s1) + (s2 + s3)
    return summed


@inlined
def clipping_error(v: Array, w: Array, limit: Real, lanes: Array) -> Real:
    """What the weights beyond `limit` lose under any code: a bound on the error of every smaller scale."""
    lanes[:] = ZERO
    for first in range(0, v.size, lanes.size):
        for t in range(lanes.size):
            excess = max(v[first + t] - limit, ZERO)
            lanes[t] += w[first + t] * (excess * excess)
    return total(lanes)


@jit
def nearest_level(u: Real) -> Real:
    """The level nearest to u >= 0: an integer up to 2, two significant bits from there on."""
    u = min(u, TOP_LEVEL)
    split = u * SPLIT
    return split - (split - u) if u > TWO else np.rint(u)


@inlined
def try_few_scales(v: Array, w: Array, unit: Real, steps: Array, top: int, error: Array, lanes: Array) -> None:
    """error[i]: under the step of code top - i; v and errors are in units of `unit`. A lane has two weights."""
    half = lanes.size
    for i in range(error.size):
        step = steps[max(top - i, SMALLEST_CODE)]
        ratio, inverse = step / unit, unit / step
        for t in range(half):
            r0 = v[t] - ratio * nearest_level(v[t] * inverse)
            r1 = v[half + t] - ratio * nearest_level(v[half + t] * inverse)
            lanes[t] = w[t] * (r0 * r0) + w[half + t] * (r1 * r1)
        error[i] = total(lanes)


@inlined
def try_many_scales(v: Array, w: Array, unit: Real, steps: Array, top: int, lanes: Array) -> None:
    """As try_few_scales, with lanes[2] as `error`: its lanes are trial scales, so that no lanes have to be summed."""
    ratio, inverse, error = lanes[0], lanes[1], lanes[2]
    for t in range(inverse.size):
        step = steps[max(top - t, SMALLEST_CODE)]
        ratio[t], inverse[t], error[t] = step / unit, unit / step, ZERO
    # Four weights at a time: a lane's sum has to wait for its last store.
    for j in range(0, v.size, 4):
        v0, v1, v2, v3 = v[j], v[j + 1], v[j + 2], v[j + 3]
        w0, w1, w2, w3 = w[j], w[j + 1], w[j + 2], w[j + 3]
        for t in range(inverse.size):
            r0 = v0 - ratio[t] * nearest_level(v0 * inverse[t])
            r1 = v1 - ratio[t] * nearest_level(v1 * inverse[t])
            r2 = v2 - ratio[t] * nearest_level(v2 * inverse[t])
            r3 = v3 - ratio[t] * nearest_level(v3 * inverse[t])
            error[t] += (w0 * (r0 * r0) + w1 * (r1 * r1)) + (w2 * (r2 * r2) + w3 * (r3 * r3))


@jit
def search_blocks(
    blocks: Array,
    weights: Array,
    steps: Array,
    first: tuple[int, int, int],
    n_scales: int,
    exhaustive: bool,
    data: Array,
) -> None:
    """The best stored scale of each block.

    blocks float32 [n_blocks, block_size], weights float32 [blocks_per_row, block_size].
    steps float32 [n_codes]: half of the scale, by its code.
    first: (shift, offset, least): the first code is (bits of the largest scale worth trying >> shift) - offset, and not
    below `least`.
    n_scales: scales that are tried at a time; exhaustive: go on until no smaller scale can be better.
    Writes the scales' codes to data uint8 [n_blocks / n_sub, n_sub + ..], n_sub of them at the front of each row.
    """
    shift, offset, least = first
    n, n_sub = blocks.shape[1], blocks.shape[0] // data.shape[0]
    v, w, scale_lanes = np.empty(n, np.float32), np.empty(n, np.float32), np.empty((3, n_scales), np.float32)
    error, weight_lanes = scale_lanes[2], np.empty(WEIGHT_LANES, np.float32)
    for b in range(blocks.shape[0]):
        largest = magnitude(blocks, b)
        if largest == ZERO:
            data[b // n_sub, b % n_sub] = 0
            continue
        top = min(max(int(np.float32(largest * REACH).view(np.int32) >> shift) - offset, least), steps.size - 1)
        unit = steps[top]
        column = b % weights.shape[0]
        for j in range(n):
            v[j], w[j] = min(abs(blocks[b, j]) / unit, FAR), weights[column, j]
        best_error, best, searching = INFINITY, 0, True
        while searching:
            if n_scales < MANY_SCALES:
                try_few_scales(v, w, unit, steps, top, error, weight_lanes)
            else:
                try_many_scales(v, w, unit, steps, top, scale_lanes)
            for i in range(n_scales):
                if error[i] < best_error:
                    best_error, best = error[i], max(top - i, SMALLEST_CODE)
            top -= n_scales
            searching = exhaustive and top >= SMALLEST_CODE
            if searching:
                searching = bool(clipping_error(v, w, TOP_LEVEL * (steps[top] / unit), weight_lanes) < best_error)
        data[b // n_sub, b % n_sub] = best


@jit
def write_blocks(blocks: Array, steps: Array, data: Array) -> None:
    """Writes the codes of the weights behind the scales of their blocks.

    blocks float32 [n_blocks, block_size]; steps and data as for search_blocks. In a loop of its own, and in floats to
    the last: beside the search it was not vectorised.
    """
    half, n_sub = blocks.shape[1] // 2, blocks.shape[0] // data.shape[0]
    for b in range(blocks.shape[0]):
        row, i = b // n_sub, b % n_sub
        step = steps[max(data[row, i], SMALLEST_CODE)]
        # Cut out, so that no index may be negative: such indices would scatter the bytes.
        lows, highs, codes = blocks[b, :half], blocks[b, half:], data[row, n_sub + half * i :][:half]
        for j in range(half):
            low_level, high_level = nearest_level(abs(lows[j]) / step), nearest_level(abs(highs[j]) / step)
            low_code = min(low_level, low_level * HALF + TWO, low_level * QUARTER + FOUR)
            high_code = min(high_level, high_level * HALF + TWO, high_level * QUARTER + FOUR)
            low_code += EIGHT if (lows[j] < ZERO) & (low_code > ZERO) else ZERO
            high_code += EIGHT if (highs[j] < ZERO) & (high_code > ZERO) else ZERO
            codes[j] = np.uint8(low_code + SIXTEEN * high_code)
