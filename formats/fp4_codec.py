"""NVFP4 and MXFP4 as compressed-tensors stores them; the numbers and the searches are those of formats/fp4.py.

nvfp4-pack-quantized, 4.5 bits per weight
    weight_packed         U8       [n, k / 2]   columns 2 l and 2 l + 1 in the low and the high nibble of byte l
    weight_scale          F8_E4M3  [n, k / 16]  positive
    weight_global_scale   F32      [1]          a divisor: a weight is value * weight_scale / weight_global_scale

mxfp4-pack-quantized, 4.25 bits per weight
    weight_packed         U8       [n, k / 2]
    weight_scale          U8       [n, k / 32]  E8M0: a weight is value * 2**(weight_scale - 127)
"""

from collections.abc import Callable, Iterable

import numpy as np

from formats import fp4
from formats.block_format import Effort
from formats.fp8_codec import E4M3
from formats.row_chunks import for_row_chunks
from formats.weight_scheme import Tensors, TensorShapes

# Of a block of zeros, as compressed-tensors stores it: 0.125. Runtimes divide by scales.
ZERO_BLOCK_CODE = np.uint8(0x20)


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """Codes uint8 [n, k], two neighbours a byte: uint8 [n, k / 2]."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack_levels(packed: np.ndarray) -> np.ndarray:
    """The values, float32 [n, k], in halves as formats/fp4.py counts."""
    codes = np.empty((packed.shape[0], packed.shape[1] * 2), np.uint8)
    codes[:, ::2], codes[:, 1::2] = packed & 15, packed >> 4
    return fp4.SIGNED_LEVELS[codes]


class Nvfp4Codec:
    def tensors(self, n_rows: int, n_columns: int) -> TensorShapes:
        return {
            "weight_packed": ("U8", (n_rows, n_columns // 2)),
            "weight_scale": ("F8_E4M3", (n_rows, n_columns // fp4.NVFP4_SUB_BLOCK_SIZE)),
            "weight_global_scale": ("F32", (1,)),
        }

    def encode(
        self,
        rows: np.ndarray,
        importance: np.ndarray | None,
        effort: Effort,
        global_scale: float | None,
        n_threads: int,
    ) -> Tensors:
        n_rows, n_columns = rows.shape
        if global_scale is None:
            global_scale = self.shared_scale(lambda: [rows], importance, effort, n_threads)
        divisor = np.float32(global_scale)
        scales = np.empty((n_rows, n_columns // fp4.NVFP4_SUB_BLOCK_SIZE), np.uint8)
        packed = np.empty((n_rows, n_columns // 2), np.uint8)

        def work(chunk: slice) -> None:
            codes = fp4.search_nvfp4(rows[chunk] * divisor, importance, effort)
            packed[chunk] = pack_nibbles(codes[1].reshape(-1, n_columns))
            scales[chunk] = codes[0].reshape(scales[chunk].shape)

        for_row_chunks(n_rows, n_columns, n_threads, work)
        scales[scales == 0] = ZERO_BLOCK_CODE
        return {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": np.array([divisor])}

    def decode(self, tensors: Tensors, shape: tuple[int, int]) -> np.ndarray:
        # Halves: the scale's half is exact.
        steps = E4M3[tensors["weight_scale"]] / tensors["weight_global_scale"] * np.float32(0.5)
        levels = unpack_levels(tensors["weight_packed"]).reshape(*steps.shape, -1)
        return (steps[..., None] * levels).reshape(shape)

    def shared_scale(
        self,
        read: Callable[[], Iterable[np.ndarray]],
        importance: np.ndarray | None,
        effort: Effort,
        n_threads: int,
    ) -> float:
        """weight_global_scale of matrices together. Their largest weight alone decides: see nvfp4_tensor_scale."""
        largest = (max(float(rows.max()), -float(rows.min())) for rows in read())
        return 1 / fp4.nvfp4_tensor_scale(max(largest))


class Mxfp4Codec:
    def tensors(self, n_rows: int, n_columns: int) -> TensorShapes:
        return {
            "weight_packed": ("U8", (n_rows, n_columns // 2)),
            "weight_scale": ("U8", (n_rows, n_columns // fp4.MXFP4_BLOCK_SIZE)),
        }

    def encode(
        self,
        rows: np.ndarray,
        importance: np.ndarray | None,
        effort: Effort,
        global_scale: float | None,
        n_threads: int,
    ) -> Tensors:
        n_rows, n_columns = rows.shape
        scales = np.empty((n_rows, n_columns // fp4.MXFP4_BLOCK_SIZE), np.uint8)
        packed = np.empty((n_rows, n_columns // 2), np.uint8)

        def work(chunk: slice) -> None:
            codes = fp4.search_mxfp4(rows[chunk], importance, effort)
            packed[chunk] = pack_nibbles(codes[1].reshape(-1, n_columns))
            scales[chunk] = codes[0].reshape(scales[chunk].shape)

        for_row_chunks(n_rows, n_columns, n_threads, work)
        return {"weight_packed": packed, "weight_scale": scales}

    def decode(self, tensors: Tensors, shape: tuple[int, int]) -> np.ndarray:
        steps = np.ldexp(np.float32(1), tensors["weight_scale"].astype(np.int32) - 128)
        levels = unpack_levels(tensors["weight_packed"]).reshape(*steps.shape, -1)
        return (steps[..., None] * levels).reshape(shape)
