"""F32, F16 and BF16: one weight a block, rounded to nearest even.

F32   4 bytes   IEEE binary32, little endian
F16   2 bytes   IEEE binary16; a weight beyond +-65504 is refused, never turned into an infinity
BF16  2 bytes   the upper half of a binary32; a weight that rounds to an infinity is refused
"""

import numpy as np

from formats.block_format import Effort
from formats.errors import ConvertError

BLOCK_SIZE = 1
F16_MAX = 65504.0
BF16_MAX = 3.3895314e38
# From these bits of a magnitude on, rounding to the upper half makes an infinity.
_BEYOND_BF16 = 0x7F7F8000


def encode_f32(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    return rows.astype("<f4").view(np.uint8)


def decode_f32(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view("<f4").astype(np.float32)


def encode_f16(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    with np.errstate(over="ignore"):
        halves = rows.astype("<f2")
    if not np.isfinite(halves).all():
        row, column = np.argwhere(~np.isfinite(halves))[0]
        raise ConvertError(
            f"the weight {rows[row, column]:g} is outside F16's range of +-{F16_MAX:g}",
            f"row {row}, column {column}",
            "store this tensor as BF16 or F32, for instance with --set 'TENSOR=BF16'",
        )
    return halves.view(np.uint8)


def decode_f16(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def encode_bf16(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
    bits = rows.view(np.uint32)
    if (beyond := (bits & 0x7FFFFFFF) >= _BEYOND_BF16).any():
        row, column = np.argwhere(beyond)[0]
        raise ConvertError(
            f"the weight {rows[row, column]:g} is outside BF16's range of +-{BF16_MAX:g}",
            f"row {row}, column {column}",
            "store this tensor as F32, for instance with --set 'TENSOR=F32'",
        )
    # Adding 0x7FFF plus the lowest kept bit rounds to nearest, ties to even.
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").view(np.uint8)


def decode_bf16(data: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(data).view("<u2").astype(np.uint32) << 16).view(np.float32)
