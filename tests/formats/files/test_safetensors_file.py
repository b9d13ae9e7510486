"""Files that the safetensors library reads, and would have written itself."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bitwright.formats.errors import ConvertError
from bitwright.formats.files.safetensors import header
from bitwright.formats.files.stored_tensor import NUMPY_DTYPES

TORCH = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}


def some_tensors() -> dict[str, tuple[str, np.ndarray]]:
    """One odd-sized tensor of each dtype, named against the file's order, and an empty one."""
    rng = np.random.default_rng(0)
    tensors = {}
    for i, (dtype, numpy_dtype) in enumerate(NUMPY_DTYPES.items()):
        shape = [(3, 5), (1,), (7,), (2, 3, 3)][i % 4]
        bits = rng.integers(0, 2 if dtype == "BOOL" else 100, shape)
        tensors[f"model.layers.{9 - i}.é{dtype}"] = dtype, bits.astype(numpy_dtype)
    tensors["empty"] = "F32", np.zeros((0, 4), np.float32)
    return tensors


def to_torch(tensors):
    return {name: torch.from_numpy(array.copy()).view(TORCH[dtype]) for name, (dtype, array) in tensors.items()}


def write(path, tensors, metadata=None):
    shapes = {name: (dtype, array.shape) for name, (dtype, array) in tensors.items()}
    path.write_bytes(header(shapes, metadata) + b"".join(array.tobytes() for _, array in tensors.values()))


def test_bytes_are_those_of_the_library(tmp_path):
    """Where tensors come in its order: the widest dtypes first, then by name."""
    tensors = some_tensors()
    widths = [*NUMPY_DTYPES]
    ordered = sorted(tensors.items(), key=lambda item: (-widths.index(item[1][0]), item[0].encode()))
    write(tmp_path / "ours", dict(ordered))
    save_file(to_torch(tensors), tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_and_metadata_come_back(tmp_path):
    tensors = some_tensors()
    metadata = {"format": "pt", "note": "ü\n"}
    write(tmp_path / "file", tensors, metadata)
    loaded = load_file(tmp_path / "file")
    for name, expected in to_torch(tensors).items():
        assert loaded[name].dtype == expected.dtype
        assert loaded[name].shape == expected.shape
        assert bytes(loaded[name].contiguous().untyped_storage()) == bytes(expected.untyped_storage())
    with safe_open(tmp_path / "file", "np") as file:
        assert file.metadata() == metadata


def test_unknown_dtype_is_refused():
    with pytest.raises(ConvertError, match="F6_E2M3"):
        header({"a": ("F6_E2M3", (2, 2))})
