"""FP8 weights, E4M3 of the OCP: `float-quantized` of compressed-tensors, 8 bits per weight and the scales.

weight         F8_E4M3  [n, k]    sign, four bits of exponent (bias 7), three of mantissa; up to +-448, no infinity
weight_scale   BF16     [n, 1] ("channel"), [1] ("tensor") or [ceil(n / 128), ceil(k / 128)] ("block" of 128 x 128)

A weight is scale * value. The values of a float format repeat themselves an octave higher, so every bfloat16 scale of
one octave is tried, from the one under which the largest weight takes the greatest value on: only there the steps lie
differently. Beyond, smaller weights would lose digits, and below, the largest would be cut off.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from bitwright.formats.bfloat16 import EPSILON_BITS, bfloat16, bfloat16_bits, bfloat16_bits_above
from bitwright.formats.choices import Effort
from bitwright.formats.encoding import check_rows, to_blocks
from bitwright.formats.kernels.float16 import NEGLIGIBLE
from bitwright.formats.kernels.fp8_scales import GREATEST, MAGNITUDES, measure, write_codes
from bitwright.formats.schemes.row_chunks import for_row_chunks
from bitwright.formats.schemes.scheme import Tensors, TensorShapes, WeightScheme

_POSITIVE = np.append(MAGNITUDES[:127], np.nan)
E4M3 = np.concatenate([_POSITIVE, -_POSITIVE]).astype(np.float32)
"""The values of the 256 codes."""

# Every bfloat16 of an octave, or every eighth one.
_TRIALS = {"best": np.arange(128, dtype=np.int32), "fast": np.arange(0, 128, 8, dtype=np.int32)}


@dataclass(frozen=True)
class Fp8Codec:
    weights: WeightScheme

    def tensors(self, n_rows: int, n_columns: int) -> TensorShapes:
        if self.weights.strategy == "tensor":
            scale: tuple[int, ...] = (1,)
        else:
            height, width = self._block(n_rows, n_columns)
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
        check_rows(rows, 1)
        rows = rows.view()
        rows.flags.writeable = False  # as to_blocks leaves them: numba compiles anew for arrays that may be written
        height, width = self._block(n_rows, n_columns)
        if global_scale is not None:
            bits = bfloat16_bits(np.full((1, 1), global_scale, np.float32))
        else:
            largest = self._largest(rows, n_threads)
            bits = _best(largest, self._errors(rows, importance, largest, effort, n_threads), effort)
        scales = np.repeat(bfloat16(bits), height, axis=0)[:n_rows]
        codes = np.empty(rows.shape, np.uint8)
        for_row_chunks(
            n_rows, n_columns, n_threads, lambda chunk: write_codes(rows[chunk], scales[chunk], width, codes[chunk])
        )
        return {"weight": codes, "weight_scale": bits.reshape(self.tensors(n_rows, n_columns)["weight_scale"][1])}

    def decode(self, tensors: Tensors, shape: tuple[int, int]) -> np.ndarray:
        (n_rows, n_columns), (height, width) = shape, self._block(*shape)
        scales = bfloat16(tensors["weight_scale"]).reshape(-(-n_rows // height), -1)
        scales = np.repeat(np.repeat(scales, height, axis=0)[:n_rows], width, axis=1)[:, :n_columns]
        weights: np.ndarray = E4M3[tensors["weight"]] * scales
        return weights

    def shared_scale(
        self,
        read: Callable[[], Iterable[np.ndarray]],
        importance: np.ndarray | None,
        effort: Effort,
        n_threads: int,
    ) -> float:
        """weight_scale of matrices together."""
        largest = np.zeros((1, 1), np.float32)
        for rows in read():
            largest = np.maximum(largest, self._largest(rows, n_threads))
        errors = sum(self._errors(rows, importance, largest, effort, n_threads) for rows in read())
        return float(bfloat16(_best(largest, np.asarray(errors), effort))[0, 0])

    def _block(self, n_rows: int, n_columns: int) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        if self.weights.block_structure:
            return self.weights.block_structure
        return (n_rows if self.weights.strategy == "tensor" else 1), n_columns

    def _largest(self, rows: np.ndarray, n_threads: int) -> np.ndarray:
        """The largest magnitude of each block, float32 [blocks down, blocks across]."""
        height, width = self._block(*rows.shape)
        edges = np.arange(0, rows.shape[1], width)
        largest = np.empty((len(rows), len(edges)), np.float32)

        def scan(chunk: slice) -> None:
            largest[chunk] = np.maximum.reduceat(np.abs(rows[chunk]), edges, axis=1)

        for_row_chunks(rows.shape[0], rows.shape[1], n_threads, scan)
        return np.maximum.reduceat(largest, np.arange(0, len(rows), height), axis=0)

    def _errors(
        self, rows: np.ndarray, importance: np.ndarray | None, largest: np.ndarray, effort: Effort, n_threads: int
    ) -> np.ndarray:
        """float64 [blocks down, blocks across, trials]: of each block under the scales that its largest magnitude
        gives, relative to the square of the first of them."""
        n_rows, n_columns = rows.shape
        height, width = self._block(n_rows, n_columns)
        first_bits = np.repeat(_first_bits(largest), height, axis=0)[:n_rows]
        partial: dict[int, np.ndarray] = {}

        def try_scales(chunk: slice) -> None:
            # The importance counts across blocks here, so it is normalised over the row.
            part, weights = to_blocks(rows[chunk], importance, n_columns)
            errors = np.zeros((len(part), largest.shape[1], _TRIALS[effort].size))
            measure(part, weights[0], first_bits[chunk], _TRIALS[effort], width, errors)
            partial[chunk.start] = np.add.reduceat(errors, np.arange(0, len(part), min(height, len(part))), axis=0)

        for_row_chunks(n_rows, n_columns, n_threads, try_scales, height if self.weights.block_structure else 1)
        errors = np.zeros((*largest.shape, _TRIALS[effort].size))
        for start in sorted(partial):
            errors[start // height : start // height + len(partial[start])] += partial[start]
        return errors


def _best(largest: np.ndarray, errors: np.ndarray, effort: Effort) -> np.ndarray:
    """The bits of the scales, uint16 like largest."""
    bits = _first_bits(largest) + _TRIALS[effort][errors.argmin(axis=2)]
    return np.where(largest < NEGLIGIBLE, EPSILON_BITS, bits).astype(np.uint16)


def _first_bits(largest: np.ndarray) -> np.ndarray:
    """Of the least bfloat16 scale that cuts off no weight, int32."""
    return bfloat16_bits_above(np.maximum(largest, NEGLIGIBLE) / GREATEST).astype(np.int32)
