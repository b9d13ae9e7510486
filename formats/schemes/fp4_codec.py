"""NVFP4 and MXFP4 as compressed-tensors stores them; the numbers and the searches are those of formats/blocks/fp4.py.

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

from bitwright.formats.blocks import fp4
from bitwright.formats.choices import Effort
from bitwright.formats.packing import pack_bits, unpack_bits
from bitwright.formats.parts import BlockRows, ScalarBlocks, ScalarParts, scaled_sub_blocks
from bitwright.formats.schemes.fp8_codec import E4M3
from bitwright.formats.schemes.row_chunks import for_row_chunks
from bitwright.formats.schemes.scheme import Tensors, TensorShapes, TunableRows

# Of a block of zeros, as compressed-tensors stores it: 0.125. Runtimes divide by scales.
ZERO_BLOCK_CODE = np.uint8(0x20)

Search = Callable[[slice], tuple[np.ndarray, np.ndarray]]


def _block_rows(name: str, size: int, steps: np.ndarray) -> BlockRows:
    """Blocks of the scale's byte and the packed codes."""

    def unpack(blocks: np.ndarray) -> ScalarParts:
        scales = np.minimum(blocks[:, :1], len(steps) - 1)
        return scaled_sub_blocks(1, scales, fp4.levels_of(unpack_bits(blocks[:, 1:], 4)))

    def pack(parts: ScalarParts) -> np.ndarray:
        return np.concatenate([parts.scales[:, 0].astype(np.uint8), pack_bits(fp4.codes_of(parts.levels), 4)], axis=1)

    type_size = 1 + size // 2
    blocks = ScalarBlocks(size, type_size, unpack, pack, fp4.ALL_LEVELS, scale_table=steps, fixed_unit=True)
    return BlockRows(name, blocks)


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

    def tunable(self, tensors: Tensors, shape: tuple[int, int]) -> TunableRows:
        return TunableRows(self._blocks.blocks, self.to_blocks(tensors, shape), self.block_factor(tensors), None)

    def tuned(self, data: np.ndarray, tensors: Tensors) -> Tensors:
        return self.from_blocks(data, tensors)

    def _encode(self, shape: tuple[int, int], search: Search, n_threads: int) -> Tensors:
        """search: gives the codes of the scales and the weights of some rows, uint8 [n_blocks] and
        [n_blocks, block_size]."""
        n_rows, n_columns = shape
        scales = np.empty((n_rows, n_columns // self._blocks.block_size), np.uint8)
        packed = np.empty((n_rows, n_columns // 2), np.uint8)

        def work(chunk: slice) -> None:
            scale_codes, codes = search(chunk)
            scales[chunk] = scale_codes.reshape(scales[chunk].shape)
            packed[chunk] = pack_bits(codes.reshape(-1, n_columns), 4)

        for_row_chunks(n_rows, n_columns, n_threads, work)
        return {"weight_packed": packed, "weight_scale": scales}

    def _decode(self, tensors: Tensors, steps: np.ndarray) -> np.ndarray:
        """steps: half of the scales, float32 [n_rows, n_blocks]; the weights, float32 [n_rows, n_columns]."""
        levels = fp4.SIGNED_LEVELS[unpack_bits(tensors["weight_packed"], 4)].reshape(*steps.shape, -1)
        weights: np.ndarray = steps[..., None] * levels
        return weights.reshape(len(steps), -1)


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
        if global_scale is None:
            global_scale = self.shared_scale(lambda: [rows], importance, effort, n_threads)
        divisor = np.float32(global_scale)

        def search(chunk: slice) -> tuple[np.ndarray, np.ndarray]:
            return fp4.search_nvfp4(rows[chunk] * divisor, importance, effort)

        tensors = self._encode((rows.shape[0], rows.shape[1]), search, n_threads)
        tensors["weight_scale"][tensors["weight_scale"] == 0] = ZERO_BLOCK_CODE
        return tensors | {"weight_global_scale": np.array([divisor])}

    def decode(self, tensors: Tensors, shape: tuple[int, int]) -> np.ndarray:
        # Halves: the scale's half is exact.
        return self._decode(tensors, E4M3[tensors["weight_scale"]] / tensors["weight_global_scale"] * np.float32(0.5))

    def from_blocks(self, data: np.ndarray, tensors: Tensors) -> Tensors:
        found = super().from_blocks(data, tensors)
        zero = found["weight_scale"] == 0
        found["weight_packed"].reshape(*zero.shape, -1)[zero] = 0
        found["weight_scale"][zero] = ZERO_BLOCK_CODE
        return found

    def block_factor(self, tensors: Tensors) -> np.float32:
        factor: np.float32 = tensors["weight_global_scale"][0]
        return factor

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
        def search(chunk: slice) -> tuple[np.ndarray, np.ndarray]:
            return fp4.search_mxfp4(rows[chunk], importance, effort)

        return self._encode((rows.shape[0], rows.shape[1]), search, n_threads)

    def decode(self, tensors: Tensors, shape: tuple[int, int]) -> np.ndarray:
        return self._decode(tensors, np.ldexp(np.float32(1), tensors["weight_scale"].astype(np.int32) - 128))
