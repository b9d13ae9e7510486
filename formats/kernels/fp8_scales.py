"""E4M3: its values, the error of weights under trial scales, and their codes.

A lane is a trial scale: nothing is summed across lanes, and strict floating point does not stop the compiler from using
vector registers.
"""

import numpy as np

from bitwright.formats.compiler import Array, Real, jit
from bitwright.formats.kernels.float16 import bf16_value

_CODES = np.arange(128)
MAGNITUDES = np.where(_CODES < 8, _CODES / 8 * 2.0**-6, (1 + _CODES % 8 / 8) * 2.0 ** (_CODES // 8 - 7))
"""What the codes 0 .. 127 stand for, float64: four bits of exponent of bias 7, three of mantissa; E4M3 itself has no
number for code 127."""
GREATEST = np.float32(448)
ZERO, ONE, MIN_NORMAL = np.float32(0), np.float32(1), np.float32(2**-6)
# Splits off the upper four bits of a float32 (Veltkamp); subnormals are multiples of 2**-9, float32's spacing here.
SPLIT, SHIFT = np.float32(2**20 + 1), np.float32(1.5 * 2**14)


@jit
def nearest_value(u: Real) -> Real:
    """The E4M3 value nearest to a float32."""
    u = min(max(u, -GREATEST), GREATEST)
    split = u * SPLIT
    return split - (split - u) if abs(u) >= MIN_NORMAL else (u + SHIFT) - SHIFT


@jit
def add_errors(x: Array, w: Array, scales: Array, lanes: Array, errors: Array) -> None:
    """Adds to errors[t] the error of a row's part x under the scale scales[t], in units of the first scale.

    lanes float32 [3, n]: a lane is a scale; scales.size is a multiple of n. Four weights at a time, then the rest.
    """
    scale, inverse, error = lanes[0], lanes[1], lanes[2]
    n, unit = error.size, scales[0]
    for first in range(0, scales.size, n):
        for t in range(n):
            scale[t], inverse[t], error[t] = scales[first + t] / unit, ONE / (scales[first + t] / unit), ZERO
        last = x.size // 4 * 4
        for j in range(0, last, 4):
            v0, v1, v2, v3 = x[j] / unit, x[j + 1] / unit, x[j + 2] / unit, x[j + 3] / unit
            w0, w1, w2, w3 = w[j], w[j + 1], w[j + 2], w[j + 3]
            for t in range(n):
                r0 = v0 - scale[t] * nearest_value(v0 * inverse[t])
                r1 = v1 - scale[t] * nearest_value(v1 * inverse[t])
                r2 = v2 - scale[t] * nearest_value(v2 * inverse[t])
                r3 = v3 - scale[t] * nearest_value(v3 * inverse[t])
                error[t] += (w0 * (r0 * r0) + w1 * (r1 * r1)) + (w2 * (r2 * r2) + w3 * (r3 * r3))
        for j in range(last, x.size):
            v0, w0 = x[j] / unit, w[j]
            for t in range(n):
                r0 = v0 - scale[t] * nearest_value(v0 * inverse[t])
                error[t] += w0 * (r0 * r0)
        for t in range(n):
            errors[first + t] += error[t]


@jit
def measure(rows: Array, weights: Array, first_bits: Array, trials: Array, block: int, errors: Array) -> None:
    """The error of every trial scale, of each row and each block of columns.

    rows float32 [n_rows, n_columns], weights float32 [n_columns].
    first_bits int32 [n_rows, n_blocks]: the first scale's bits as bfloat16; trials int32: what is added to them.
    block: columns of a block; errors float64 [n_rows, n_blocks, n_trials], zero before.
    """
    lanes, scales = np.empty((3, 16), np.float32), np.empty(trials.size, np.float32)
    for i in range(rows.shape[0]):
        for b in range(first_bits.shape[1]):
            for t in range(trials.size):
                scales[t] = bf16_value(first_bits[i, b] + trials[t])
            part = slice(b * block, min((b + 1) * block, rows.shape[1]))
            add_errors(rows[i, part], weights[part], scales, lanes, errors[i, b])


@jit
def write_codes(rows: Array, scales: Array, block: int, codes: Array) -> None:
    """rows float32 [n_rows, n_columns], scales float32 [n_rows, n_blocks]; codes uint8 like rows."""
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            value = nearest_value(rows[i, j] / scales[i, j // block])
            magnitude = abs(value)
            if magnitude >= MIN_NORMAL:
                code = (np.float32(magnitude).view(np.int32) >> np.int32(20)) - np.int32(8 * 120)
            else:
                code = np.int32(magnitude * np.float32(2**9))
            codes[i, j] = code | 128 if value < ZERO else code
