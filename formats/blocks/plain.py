"""F32, F16 and BF16: one weight a block, rounded to nearest even.

F32   4 bytes   IEEE binary32, little endian
F16   2 bytes   IEEE binary16; a weight beyond +-65504 is refused, never turned into an infinity
BF16  2 bytes   the upper half of a binary32; a weight that rounds to an infinity is refused
"""

import numpy as np
from gguf import GGMLQuantizationType as Type

from bitwright.formats.bfloat16 import bfloat16, bfloat16_bits
from bitwright.formats.block_format import BlockFormat
from bitwright.formats.choices import Effort
from bitwright.formats.errors import ConvertError
from bitwright.formats.kernels.float16 import F16_MAX
from bitwright.formats.packing import unpack_half

BF16_MAX = 3.3895314e38
# From these bits of a magnitude on, rounding to the upper half makes an infinity.
_BEYOND_BF16 = 0x7F7F8000


def _encode_f32(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    return rows.astype("<f4").view(np.uint8)


def _encode_f16(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    with np.errstate(over="ignore"):
        halves = rows.astype("<f2")
    if not (finite := np.isfinite(halves)).all():
        raise _beyond(
            rows, ~finite, f"F16's range of +-{F16_MAX:g}", "BF16 or F32, for instance with --set 'TENSOR=BF16'"
        )
    return halves.view(np.uint8)


def _encode_bf16(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    if (beyond := (rows.view(np.uint32) & 0x7FFFFFFF) >= _BEYOND_BF16).any():
        raise _beyond(rows, beyond, f"BF16's range of +-{BF16_MAX:g}", "F32, for instance with --set 'TENSOR=F32'")
    return bfloat16_bits(rows).astype("<u2").view(np.uint8)


def _beyond(rows: np.ndarray, beyond: np.ndarray, limit: str, instead: str) -> ConvertError:
    row, column = np.argwhere(beyond)[0]
    what, where = f"the weight {rows[row, column]:g} is outside {limit}", f"row {row}, column {column}"
    return ConvertError(what, where, f"store this tensor as {instead}")


def _decode_f32(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view("<f4").astype(np.float32)


def _decode_bf16(data: np.ndarray) -> np.ndarray:
    return bfloat16(np.ascontiguousarray(data).view("<u2"))


F32 = BlockFormat(Type.F32, 1, 4, _encode_f32, _decode_f32)
F16 = BlockFormat(Type.F16, 1, 2, _encode_f16, unpack_half)
BF16 = BlockFormat(Type.BF16, 1, 2, _encode_bf16, _decode_bf16)
