"""FP8 weights, E4M3 of the OCP: `float-quantized` of compressed-tensors, 8 bits per weight and the scales.

weight         F8_E4M3  [n, k]    sign, four bits of exponent (bias 7), three of mantissa; up to +-448, no infinity
weight_scale   BF16     [n, 1] ("channel"), [1] ("tensor") or [ceil(n / 128), ceil(k / 128)] ("block" of 128 x 128)

A weight is scale * value. The values of a float format repeat themselves an octave higher, so every bfloat16 scale of
one octave is tried, from the one under which the largest weight takes the greatest value on: only there the steps lie
differently. Beyond, smaller weights would lose digits, and below, the largest would be cut off.
"""

from dataclasses import dataclass

import numpy as np
from numba import njit

from formats.block_format import Effort
from formats.encoding import check_rows, to_blocks
from formats.int_codec import bfloat16
from formats.row_chunks import for_row_chunks
from formats.weight_scheme import Tensors, TensorShapes, WeightScheme

GREATEST = np.float32(448)
_CODES = np.arange(128)
_MAGNITUDES = np.where(_CODES < 8, _CODES / 8 * 2.0**-6, (1 + _CODES % 8 / 8) * 2.0 ** (_CODES // 8 - 7))
_MAGNITUDES[127] = np.nan
E4M3 = np.concatenate([_MAGNITUDES, -_MAGNITUDES]).astype(np.float32)
"""The values of the 256 codes."""

# Every bfloat16 of an octave, or every eighth one.
_TRIALS = {"best": np.arange(128, dtype=np.int32), "fast": np.arange(0, 128, 8, dtype=np.int32)}
# A row, block or tensor without a weight beyond this is zero; its scale is bfloat16's epsilon, as any would do.
NEGLIGIBLE = np.float32(1e-30)
ZERO_SCALE_BITS = np.uint16(0x3C00)

ZERO, ONE, MIN_NORMAL = np.float32(0), np.float32(1), np.float32(2**-6)
# Splits off the upper four bits of a float32 (Veltkamp); subnormals are multiples of 2**-9, float32's spacing here.
SPLIT, SHIFT = np.float32(2**20 + 1), np.float32(1.5 * 2**14)

_jit = njit(nogil=True, cache=True, error_model="numpy")


@_jit
def nearest_value(u):
    """The E4M3 value nearest to a float32."""
    u = min(max(u, -GREATEST), GREATEST)
    split = u * SPLIT
    return split - (split - u) if abs(u) >= MIN_NORMAL else (u + SHIFT) - SHIFT


@_jit
def add_errors(x, w, scales, lanes, errors):
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


@_jit
def measure(rows, weights, first_bits, trials, block, errors):
    """The error of every trial scale, of each row and each block of columns.

    rows float32 [n_rows, n_columns], weights float32 [n_columns].
    first_bits int32 [n_rows, n_blocks]: the first scale's bits as bfloat16; trials int32: what is added to them.
    block: columns of a block; errors float64 [n_rows, n_blocks, n_trials], zero before.
    """
    lanes, scales = np.empty((3, 16), np.float32), np.empty(trials.size, np.float32)
    for i in range(rows.shape[0]):
        for b in range(first_bits.shape[1]):
            for t in range(trials.size):
                scales[t] = np.int32((first_bits[i, b] + trials[t]) << np.int32(16)).view(np.float32)
            part = slice(b * block, min((b + 1) * block, rows.shape[1]))
            add_errors(rows[i, part], weights[part], scales, lanes, errors[i, b])


@_jit
def write_codes(rows, scales, block, codes):
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


@dataclass(frozen=True)
class Fp8Codec:
    weights: WeightScheme

    def tensors(self, n_rows: int, n_columns: int) -> TensorShapes:
        if self.weights.strategy == "tensor":
            scale: tuple[int, ...] = (1,)
        else:
            height, width = self._block(n_columns)
            scale = (-(-n_rows // height), -(-n_columns // width))
        return {"weight": ("F8_E4M3", (n_rows, n_columns)), "weight_scale": ("BF16", scale)}

    def encode(
        self,
        rows: np.ndarray,
        importance: np.ndarray | None,
        effort: Effort,
        global_scale: float | None,
        n_threads: int,
    ) -> Tensors:
        n_rows, n_columns = rows.shape
        rows = rows.view()
        rows.flags.writeable = False  # as to_blocks leaves them: numba compiles anew for arrays that may be written
        height, width = self._block(n_columns, n_rows)
        n_blocks = -(-n_columns // width)
        # Rows that share scales, side by side in the first axis.
        bands = -(-n_rows // height)
        if global_scale is not None:
            check_rows(rows, 1)
            bits = np.full((bands, n_blocks), bfloat16_bits(np.float32(global_scale)), np.int32)
        else:
            bits = self._search(rows, importance, effort, n_threads, (height, width))
        scales = np.repeat(bfloat16(bits.astype(np.uint16)), height, axis=0)[:n_rows]
        codes = np.empty(rows.shape, np.uint8)

        def write(chunk: slice) -> None:
            write_codes(rows[chunk], scales[chunk], width, codes[chunk])

        for_row_chunks(n_rows, n_columns, n_threads, write)
        shape = self.tensors(n_rows, n_columns)["weight_scale"][1]
        return {"weight": codes, "weight_scale": bits.astype(np.uint16).reshape(shape)}

    def decode(self, tensors: Tensors, shape: tuple[int, int]) -> np.ndarray:
        n_rows, n_columns = shape
        height, width = self._block(n_columns, n_rows)
        scales = bfloat16(tensors["weight_scale"]).reshape(-(-n_rows // height), -1)
        scales = np.repeat(np.repeat(scales, height, axis=0)[:n_rows], width, axis=1)[:, :n_columns]
        return E4M3[tensors["weight"]] * scales

    def global_scale(self, absolute_maximum: float) -> float | None:
        """Of a tensor, which modules that a runtime fuses have to share."""
        if self.weights.strategy != "tensor":
            return None
        bits = _first_bits(np.array([absolute_maximum], np.float32)).astype(np.uint16)
        return float(bfloat16(bits)[0])

    def _block(self, n_columns: int, n_rows: int = 1) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        if self.weights.block_structure:
            return self.weights.block_structure
        return (max(n_rows, 1) if self.weights.strategy == "tensor" else 1), n_columns

    def _search(
        self,
        rows: np.ndarray,
        importance: np.ndarray | None,
        effort: Effort,
        n_threads: int,
        block: tuple[int, int],
    ) -> np.ndarray:
        """The bits of the scales, int32 [bands, blocks of columns]."""
        (n_rows, n_columns), (height, width) = rows.shape, block
        n_blocks, bands = -(-n_columns // width), -(-n_rows // height)
        largest = np.zeros((n_rows, n_blocks), np.float32)
        weights = np.empty(n_columns, np.float32)

        def scan(chunk: slice) -> None:
            # The importance counts across blocks here, so it is normalised over the row.
            blocks, row_weights = to_blocks(rows[chunk], importance, n_columns)
            weights[:] = row_weights[0]
            edges = range(0, n_columns, width)
            for b, first in enumerate(edges):
                largest[chunk, b] = np.abs(blocks[:, first : first + width]).max(axis=1)

        for_row_chunks(n_rows, n_columns, n_threads, scan)
        starts = np.arange(0, n_rows, height)
        largest = np.maximum.reduceat(largest, starts, axis=0)
        first_bits = _first_bits(largest)
        row_bits = np.repeat(first_bits, height, axis=0)[:n_rows]
        trials = _TRIALS[effort]
        errors = np.zeros((bands, n_blocks, trials.size))
        partial: dict[int, np.ndarray] = {}

        def try_scales(chunk: slice) -> None:
            chunk_errors = np.zeros((chunk.stop - chunk.start, n_blocks, trials.size))
            measure(rows[chunk], weights, row_bits[chunk], trials, width, chunk_errors)
            partial[chunk.start] = np.add.reduceat(
                chunk_errors, np.arange(0, len(chunk_errors), min(height, len(chunk_errors))), axis=0
            )

        multiple = height if self.weights.block_structure else 1
        for_row_chunks(n_rows, n_columns, n_threads, try_scales, multiple)
        for start in sorted(partial):
            band = start // height
            errors[band : band + len(partial[start])] += partial[start]
        best = first_bits + trials[errors.argmin(axis=2)]
        return np.where(largest < NEGLIGIBLE, np.int32(ZERO_SCALE_BITS), best)


def bfloat16_bits(value: np.ndarray | np.float32) -> np.ndarray:
    """The nearest bfloat16's bits of positive float32 values, int32."""
    bits = np.asarray(value, np.float32).view(np.int32)
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def _first_bits(largest: np.ndarray) -> np.ndarray:
    """Of the least bfloat16 scale that cuts off no weight, int32."""
    scale = (np.maximum(largest, NEGLIGIBLE) / GREATEST).astype(np.float32)
    return (scale.view(np.int32) + 0xFFFF) >> 16
