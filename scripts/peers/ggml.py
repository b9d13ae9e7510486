"""ggml's own encoders and decoders, for tests and benchmarks to stand beside; the product never imports this.

The functions are those of the shared object in the `xllamacpp` wheel, called through ctypes.
"""

import ctypes
import functools

import numpy as np
from gguf import GGMLQuantizationType

from bitwright.converter.judge.llama_cpp import shared_object

# Newer than some releases of the gguf package.
_TYPE_IDS = {"NVFP4": 40, "Q1_0": 41, "Q2_0": 42} | {kind.name: kind.value for kind in GGMLQuantizationType}


@functools.cache
def library() -> ctypes.CDLL:
    """The shared object, with the signatures of the functions that are used here."""
    ggml = shared_object()
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,  # enum ggml_type type
        ctypes.c_void_p,  # const float * src
        ctypes.c_void_p,  # void * dst
        ctypes.c_int64,  # int64_t start
        ctypes.c_int64,  # int64_t nrows
        ctypes.c_int64,  # int64_t n_per_row
        ctypes.c_void_p,  # const float * imatrix
    ]
    ggml.ggml_row_size.restype = ctypes.c_size_t
    ggml.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    ggml.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    return ggml


def needs_importance(format_name: str) -> bool:
    return library().ggml_quantize_requires_imatrix(_TYPE_IDS[format_name])


def quantize(rows: np.ndarray, format_name: str, importance: np.ndarray | None = None) -> np.ndarray:
    """ggml_quantize_chunk: float32 [n_rows, n_columns] and float32 [n_columns] to uint8 [n_rows, row_bytes].

    On one thread. The first call for an IQ type builds that type's grid, which takes seconds.
    """
    kind = _TYPE_IDS[format_name]
    rows = np.ascontiguousarray(rows, np.float32)
    n_rows, n_columns = rows.shape
    if importance is None and needs_importance(format_name):
        raise ValueError(f"ggml refuses to encode {format_name} without an importance matrix")
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        if importance.shape != (n_columns,):
            raise ValueError(f"importance must be [{n_columns}], not {importance.shape}")
    data = np.zeros((n_rows, row_bytes(format_name, n_columns)), np.uint8)
    library().ggml_quantize_init(kind)
    imatrix = None if importance is None else importance.ctypes.data
    written = library().ggml_quantize_chunk(kind, rows.ctypes.data, data.ctypes.data, 0, n_rows, n_columns, imatrix)
    if written != data.size:
        raise RuntimeError(f"ggml wrote {written} bytes of {format_name}, not {data.size}")
    return data


def row_bytes(format_name: str, n_columns: int) -> int:
    """ggml_row_size: bytes of a row of n_columns weights."""
    return library().ggml_row_size(_TYPE_IDS[format_name], n_columns)


def dequantize(data: np.ndarray, format_name: str, n_columns: int) -> np.ndarray:
    """dequantize_row_*: uint8 [n_rows, row_bytes] to float32 [n_rows, n_columns]."""
    data = np.ascontiguousarray(data, np.uint8)
    if data.ndim != 2 or data.shape[1] != row_bytes(format_name, n_columns):
        raise ValueError(f"{format_name} data of {n_columns} columns cannot have the shape {data.shape}")
    name = format_name.lower()
    decode = library()[f"dequantize_row_{name[:-1]}K" if name.endswith("_k") else f"dequantize_row_{name}"]
    decode.restype = None
    decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    rows = np.empty((len(data), n_columns), np.float32)
    # The rows of a tensor follow each other without a gap, so one call decodes them all.
    decode(data.ctypes.data, rows.ctypes.data, rows.size)
    return rows
