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
from formats.parts import NO_MINIMUM, BlockRows, ScalarBlocks, ScalarParts
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


def _block_rows(name: str, size: int, steps: np.ndarray) -> BlockRows:
    """Blocks of the scale's byte and the packed codes."""

    def opened(data: np.ndarray) -> ScalarParts:
        blocks = data.reshape(-1, 1 + size // 2)
        return fp4.parts_of(np.minimum(blocks[:, :1], len(steps) - 1), unpack_levels(blocks[:, 1:]))

    def closed(parts: ScalarParts) -> np.ndarray:
        return np.concatenate([parts.scales[:, 0].astype(np.uint8), pack_nibbles(fp4.codes_of(parts.levels))], axis=1)

    blocks = ScalarBlocks(fp4.ALL_LEVELS, 1, steps, NO_MINIMUM, opened, closed, fixed_unit=True)
    return BlockRows(name, size, blocks)


class _Fp4Codec:
    """What both have in common: rows of blocks."""

    _blocks: BlockRows

    def block_rows(self, n_columns: int) -> BlockRows:
        return self._blocks

    def to_blocks(self, tensors: Tensors, shape: tuple[int, int]) -> np.ndarray:
        scales = tensors["weight_scale"][..., None]
        packed = tensors["weight_packed"].reshape(*scales.shape[:2], -1)
        return np.concatenate([scales, packed], axis=2).reshape(len(scales), -1)

    def from_blocks(self, data: np.ndarray, tensors: Tensors) -> Tensors:
        blocks = data.reshape(*tensors["weight_scale"].shape, -1)
        packed = np.ascontiguousarray(blocks[..., 1:]).reshape(len(blocks), -1)
        return tensors | {"weight_packed": packed, "weight_scale": np.ascontiguousarray(blocks[..., 0])}

    def block_factor(self, tensors: Tensors) -> np.float32:
        return np.float32(1)


class Nvfp4Codec(_Fp4Codec):
    _blocks = _block_rows("NVFP4", fp4.NVFP4_SUB_BLOCK_SIZE, fp4.NVFP4_STEPS)

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

    def from_blocks(self, data: np.ndarray, tensors: Tensors) -> Tensors:
        found = super().from_blocks(data, tensors)
        zero = found["weight_scale"] == 0
        found["weight_packed"].reshape(*zero.shape, -1)[zero] = 0
        found["weight_scale"][zero] = ZERO_BLOCK_CODE
        return found

    def block_factor(self, tensors: Tensors) -> np.float32:
        return tensors["weight_global_scale"][0]

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


class Mxfp4Codec(_Fp4Codec):
    _blocks = _block_rows("MXFP4", fp4.MXFP4_BLOCK_SIZE, fp4.MXFP4_STEPS)

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
