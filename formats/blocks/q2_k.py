"""Q2_K, ggml's block_q2_K: 16 sub-blocks of 16 weights, each with a 4-bit scale and a 4-bit minimum.

256 weights in 84 bytes, 2.625 bits per weight. A weight is d * scale * code - dmin * minimum, with a code of 2 bits.

    scales   16     byte i: scale of sub-block i in the low nibble, its minimum in the high one
    qs       64     byte 32 h + l: codes of weights 128 h + l + 0, 32, 64, 96 at bits 0, 2, 4, 6
    d         2     float16, unit of the scales
    dmin      2     float16, unit of the minima
"""

from functools import partial

import numpy as np
from gguf import GGMLQuantizationType as Type

from bitwright.formats.block_format import scalar_format
from bitwright.formats.choices import Effort
from bitwright.formats.kernels.scale_min_search import SuperBlockEffort, clip_grid, neighbour_grid, search_parts
from bitwright.formats.packing import pack_bits, pack_half, unpack_bits, unpack_half
from bitwright.formats.parts import ScalarBlocks, ScalarParts, integers

_NINE_PAIRS = np.array([(scale, minimum) for scale in (15, 13, 11) for minimum in (15, 13, 11)], np.float32)
_EFFORTS: dict[Effort, SuperBlockEffort] = {
    "best": SuperBlockEffort(clip_grid(8, 8, widest=-1, narrowest=1.2), neighbour_grid(4, 4), _NINE_PAIRS, 1, 2),
    "fast": SuperBlockEffort(clip_grid(4, 4, widest=-0.5, narrowest=1), neighbour_grid(4, 4), _NINE_PAIRS[:1], 1, 1),
}


def _unpack(blocks: np.ndarray) -> ScalarParts:
    scales = unpack_bits(blocks[:, :16], 4, 16).reshape(-1, 2, 16).astype(np.int16)
    return ScalarParts(unpack_half(blocks[:, 80:]), scales, unpack_bits(blocks[:, 16:80], 2, 32).view(np.int8))


def _pack(parts: ScalarParts) -> np.ndarray:
    scales = parts.scales.astype(np.uint8).reshape(len(parts.scales), -1)
    codes = pack_bits(parts.levels.view(np.uint8), 2, 32)
    return np.concatenate([pack_bits(scales, 4, 16), codes, pack_half(parts.units)], axis=1)


_TABLE = np.arange(16, dtype=np.float32)
_BLOCKS = ScalarBlocks(256, 84, _unpack, _pack, integers(0, 3), 16, _TABLE, _TABLE)
Q2_K = scalar_format(Type.Q2_K, _BLOCKS, partial(search_parts, efforts=_EFFORTS))
