"""The beginning of a safetensors file, known before its first tensor is.

    header's length, 8 bytes little endian | header, JSON padded with blanks to 8 bytes | the tensors without gaps

So a file's size and every tensor's place are known as well, and nothing is in memory but the tensor that is written.
"""

import json
from collections.abc import Mapping
from math import prod

import numpy as np

from formats.errors import ConvertError

NUMPY_DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "F8_E4M3": np.dtype("u1"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
}
"""What holds a tensor of safetensors' dtype here; of dtypes that numpy lacks, the bits."""


def header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Everything before the data of these tensors, which follow each other in this order: name -> dtype and shape.

    metadata: {"format": "pt"} by default, which transformers asks for.
    Raises ConvertError for a dtype that cannot be written.
    """
    described: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in NUMPY_DTYPES:
            raise ConvertError(
                f"tensors of dtype {dtype} cannot be written", f"tensor {name}", f"use one of {', '.join(NUMPY_DTYPES)}"
            )
        start, end = end, end + prod(shape) * NUMPY_DTYPES[dtype].itemsize
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
