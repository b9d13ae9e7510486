"""Files that the safetensors library reads, and would have written itself."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from formats.errors import ConvertError
from formats.safetensors_file import NUMPY_DTYPES, lay_out, write_safetensors

TORCH = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
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


def layout_of(tensors, metadata=None):
    return lay_out({name: (dtype, array.shape) for name, (dtype, array) in tensors.items()}, metadata)


def test_bytes_are_those_of_the_library(tmp_path):
    tensors = some_tensors()
    layout = layout_of(tensors, {"format": "pt"})
    with write_safetensors(tmp_path / "ours", layout) as writer:
        for name in sorted(tensors):
            writer.write(name, tensors[name][1])
    save_file(to_torch(tensors), tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert (tmp_path / "ours").stat().st_size == layout.n_bytes
    assert sorted(os.listdir(tmp_path)) == ["ours", "theirs"]


def test_parts_and_metadata_come_back(tmp_path):
    tensors = some_tensors()
    metadata = {"format": "pt", "note": "ü\n"}
    with write_safetensors(tmp_path / "file", layout_of(tensors, metadata)) as writer:
        for name, (_, array) in tensors.items():
            writer.write(name, (array[i : i + 2] for i in range(0, len(array), 2)))
    loaded = load_file(tmp_path / "file")
    for name, expected in to_torch(tensors).items():
        assert loaded[name].dtype == expected.dtype
        assert loaded[name].shape == expected.shape
        assert bytes(loaded[name].contiguous().untyped_storage()) == bytes(expected.untyped_storage())
    with safe_open(tmp_path / "file", "np") as file:
        assert file.metadata() == metadata


def test_a_file_that_is_not_whole_takes_no_name(tmp_path):
    tensors = some_tensors()
    layout = layout_of(tensors)
    path = tmp_path / "file"
    path.write_bytes(b"old")
    name, (_, array) = next(iter(tensors.items()))
    with pytest.raises(ValueError, match="never written"), write_safetensors(path, layout) as writer:
        writer.write(name, array)
    for bad, message in [
        (lambda w: w.write("other", array), "no tensor of this file"),
        (lambda w: [w.write(name, array), w.write(name, array)], "written already"),
        (lambda w: w.write(name, array.astype(np.float16)), "came"),
        (lambda w: w.write(name, [array, array]), "more came"),
        (lambda w: w.write(name, array[:1]), "bytes, and"),
    ]:
        with pytest.raises(ValueError, match=message), write_safetensors(path, layout) as writer:
            bad(writer)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    # A limit of the file's size stands for the disk's.
    code = f"""
import resource, signal, numpy as np
from pathlib import Path
from formats.errors import ConvertError
from formats.safetensors_file import lay_out, write_safetensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, {resource.RLIM_INFINITY}))
try:
    with write_safetensors(Path({str(tmp_path)!r}) / "file", lay_out({{"a": ("F32", (100_000,))}})) as writer:
        writer.write("a", np.ones(100_000, np.float32))
except ConvertError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "cannot be written (File too large)" in result.stdout
    assert not os.listdir(tmp_path)


def test_unknown_dtype_is_refused():
    with pytest.raises(ConvertError, match="F8_E5M2"):
        lay_out({"a": ("F8_E5M2", (2, 2))})
