"""The stage `source`: what is read comes out right, and nothing broken or hostile gets through."""

import json
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.safetensors import read_header

GENERATOR = np.random.default_rng(3)
MATRIX = GENERATOR.standard_normal((6, 8)).astype(np.float32)
VECTOR = GENERATOR.standard_normal(5).astype(np.float32)


def save_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file with any header, and any length in front of it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def entry(dtype: str = "F32", shape: Any = (2, 2), begin: Any = 0, end: Any = 16) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def make_checkpoint(directory: Path, config: dict[str, Any] | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    save_file({"matrix": MATRIX, "vector": VECTOR}, directory / "model.safetensors")
    return directory


def make_sharded(directory: Path) -> Path:
    make_checkpoint(directory)
    (directory / "model.safetensors").unlink()
    save_file({"matrix": MATRIX}, directory / "a.safetensors")
    save_file({"vector": VECTOR}, directory / "b.safetensors")
    weight_map = {"matrix": "a.safetensors", "vector": "b.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.mark.parametrize("make", [make_checkpoint, make_sharded])
def test_reads_rows_and_vectors(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    checkpoint = open_checkpoint(str(make(tmp_path)))
    assert checkpoint.tensors.keys() == {"matrix", "vector"}
    assert np.array_equal(checkpoint.read("matrix"), MATRIX)
    assert np.array_equal(checkpoint.read("matrix", 2, 5), MATRIX[2:5])
    assert checkpoint.read("matrix", 3, 3).shape == (0, 8)
    assert np.array_equal(checkpoint.read("vector"), VECTOR)
    assert np.array_equal(checkpoint.read_rows("matrix", np.array([4, 0, 4])), MATRIX[[4, 0, 4]])
    with pytest.raises(IndexError):
        checkpoint.read("matrix", 0, 7)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_every_dtype_becomes_float32(tmp_path: Path, dtype: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    if dtype == "BF16":
        values = (MATRIX.view(np.uint32) & 0xFFFF0000).view(np.float32)
        stored = (MATRIX.view(np.uint32) >> 16).astype("<u2")
    else:
        stored = MATRIX.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype])
        values = stored.astype(np.float32)
    # An odd length of the header leaves the data at an unaligned offset.
    header = json.dumps({"t": entry(dtype, (6, 8), 0, stored.nbytes)}).encode()
    save_raw(tmp_path / "model.safetensors", header + b" " * (1 - len(header) % 2), stored.tobytes())
    checkpoint = open_checkpoint(str(tmp_path))
    for rows in (checkpoint.read("t"), checkpoint.read_rows("t", np.arange(6))):
        assert rows.dtype == np.float32
        assert np.array_equal(rows, values)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16"])
def test_a_weight_that_is_not_finite_is_refused_by_whoever_reads_it(tmp_path: Path, value: float, dtype: str) -> None:
    stored = MATRIX.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype])
    stored[4, 3] = value
    save_file({"matrix": stored, "vector": stored[4]}, make_checkpoint(tmp_path) / "model.safetensors")
    checkpoint = open_checkpoint(str(tmp_path))
    assert np.isfinite(checkpoint.read("matrix", 0, 4)).all()
    with pytest.raises(ConvertError, match=f"the weight {value} is not a finite number") as caught:
        checkpoint.read("matrix", 2, 6)
    assert caught.value.where == f"{tmp_path / 'model.safetensors'}: tensor matrix, row 4, column 3"
    with pytest.raises(ConvertError, match="tensor vector, row 0, column 3"):
        checkpoint.read("vector")
    assert np.isfinite(checkpoint.read_rows("matrix", np.array([5, 0]))).all()
    with pytest.raises(ConvertError, match=f"the weight {value} is not a finite number"):
        checkpoint.read_rows("matrix", np.array([5, 4]))


def test_a_weight_beyond_float32_is_refused(tmp_path: Path) -> None:
    save_file({"matrix": np.full((2, 2), 1e300)}, make_checkpoint(tmp_path) / "model.safetensors")
    with pytest.raises(ConvertError, match="the weight inf is not a finite number"):
        open_checkpoint(str(tmp_path)).read("matrix")


def test_reads_from_many_threads(tmp_path: Path) -> None:
    big = GENERATOR.standard_normal((4096, 16)).astype(np.float32)
    make_checkpoint(tmp_path)
    save_file({"big": big}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        parts = pool.map(lambda start: checkpoint.read("big", start, start + 64), range(0, 4096, 64))
    assert np.array_equal(np.concatenate(list(parts)), big)


def test_the_text_model_s_configuration_is_on_top(tmp_path: Path) -> None:
    config = {"model_type": "gemma3", "eos_token_id": 7, "text_config": {"model_type": "gemma3_text", "hidden_size": 8}}
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path, config)))
    assert checkpoint.config["model_type"] == "gemma3_text"
    assert (checkpoint.config["hidden_size"], checkpoint.config["eos_token_id"]) == (8, 7)


def test_tensors_of_a_shard_outside_of_the_index_are_left_out(tmp_path: Path) -> None:
    make_sharded(tmp_path)
    save_file({"matrix": MATRIX, "vector": VECTOR + 1}, tmp_path / "a.safetensors")
    assert np.array_equal(open_checkpoint(str(tmp_path)).read("vector"), VECTOR)


def test_the_files_identity_changes_with_their_content(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    before = open_checkpoint(str(tmp_path)).files()
    assert [name for name, _, _ in before] == ["config.json", "model.safetensors"]
    assert [size for _, size, _ in before] == [path.stat().st_size for path in sorted(tmp_path.iterdir())]
    assert open_checkpoint(str(tmp_path)).files() == before
    (tmp_path / "config.json").write_text('{"model_type": "gemma"}')
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    after = open_checkpoint(str(tmp_path)).files()
    assert [old[2] != new[2] for old, new in zip(before, after, strict=True)] == [True, True]


def test_a_file_that_is_cut_short_later_is_an_error(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path)))
    os.truncate(tmp_path / "model.safetensors", checkpoint.tensors["matrix"].offset + 40)
    assert np.array_equal(checkpoint.read("matrix", 0, 1), MATRIX[:1])
    with pytest.raises(ConvertError, match="the file ends inside the tensor 'matrix'"):
        checkpoint.read("matrix", 0, 2)


@pytest.mark.parametrize("through_link", [False, True])
def test_a_snapshot_of_the_hub_s_cache_is_what_the_hub_calls_it(tmp_path: Path, through_link: bool) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    directory = tmp_path / "models--org--My-Model-2B" / "snapshots" / commit
    directory.mkdir(parents=True)
    make_checkpoint(directory)
    if through_link:
        (tmp_path / "link").symlink_to(directory)
        directory = tmp_path / "link"
    checkpoint = open_checkpoint(str(directory))
    assert (checkpoint.model_id, checkpoint.revision) == ("org/My-Model-2B", commit)


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="no such directory or file"):
        open_checkpoint(str(tmp_path / "absent"))


def test_no_config(tmp_path: Path) -> None:
    (make_checkpoint(tmp_path) / "config.json").unlink()
    with pytest.raises(ConvertError, match=r"no config\.json"):
        open_checkpoint(str(tmp_path))


def test_malformed_config(tmp_path: Path) -> None:
    (make_checkpoint(tmp_path) / "config.json").write_text("{")
    with pytest.raises(ConvertError, match=r"config\.json is no JSON"):
        open_checkpoint(str(tmp_path))


def test_pickles_are_refused_with_the_command_that_converts_them(tmp_path: Path) -> None:
    (make_checkpoint(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConvertError, match="pickles") as caught:
        open_checkpoint(str(tmp_path))
    assert f"save_pretrained('{tmp_path}')" in caught.value.remedy


def test_no_weights(tmp_path: Path) -> None:
    (make_checkpoint(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(ConvertError, match=r"neither model\.safetensors nor"):
        open_checkpoint(str(tmp_path))


def test_missing_shard(tmp_path: Path) -> None:
    (make_sharded(tmp_path) / "b.safetensors").unlink()
    with pytest.raises(ConvertError, match=r"1 of 2 shards are missing, the first is b\.safetensors"):
        open_checkpoint(str(tmp_path))


def test_index_naming_an_absent_tensor(tmp_path: Path) -> None:
    save_file({"other": VECTOR}, make_sharded(tmp_path) / "b.safetensors")
    with pytest.raises(ConvertError, match=r"b\.safetensors lacks the tensor 'vector' that the index promises"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", 5])
def test_index_naming_a_file_elsewhere(tmp_path: Path, name: Any) -> None:
    index = make_sharded(tmp_path) / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"matrix": name}}))
    with pytest.raises(ConvertError, match="outside of its directory"):
        open_checkpoint(str(tmp_path))


def test_index_without_weight_map(tmp_path: Path) -> None:
    (make_sharded(tmp_path) / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(ConvertError, match="no weight_map"):
        open_checkpoint(str(tmp_path))


def test_truncated_shard(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path) / "model.safetensors"
    os.truncate(path, path.stat().st_size - 3)
    with pytest.raises(ConvertError, match="the file ends 3 bytes before the end of the tensor 'vector'"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        ({}, b"", 10**18, "header of 1000000000000000000 bytes does not fit"),
        ({}, b"", 2**64 - 1, "does not fit"),
        (b"{", b"", None, "its header is no JSON"),
        (b"\xff\xfe", b"", None, "its header is no JSON"),
        ([], b"", None, "its header is no JSON object"),
        (b"[" * 100_000, b"", None, "its header is no JSON"),
        ({"t": 5}, b"", None, "entry for 't' lacks"),
        ({"t": {"dtype": "F32"}}, b"", None, "entry for 't' lacks"),
        ({"t": entry(shape=(-1, 2))}, bytes(16), None, "sizes that are no whole numbers"),
        ({"t": entry(begin=0.5)}, bytes(16), None, "sizes that are no whole numbers"),
        ({"t": entry(dtype="F7", end=4)}, bytes(4), None, "'t' is stored as F7, which safetensors does not know"),
        ({"t": entry(dtype=["F32"])}, bytes(16), None, "'t' is stored as"),
        ({"t": entry(end=12)}, bytes(12), None, "takes 16 bytes, its entry says 12"),
        ({"t": entry(), "u": entry(begin=8, end=24)}, bytes(24), None, "'u' overlaps"),
        ({"t": entry(), "u": entry(begin=20, end=36)}, bytes(36), None, "'u' leaves a gap"),
        ({"t": entry()}, bytes(20), None, "4 bytes after the last tensor belong to none"),
        ({"t": entry(begin=2**62, end=2**62 + 16)}, bytes(16), None, "before the end of the tensor 't'"),
    ],
)
def test_hostile_headers(tmp_path: Path, header: Any, data: bytes, length: int | None, message: str) -> None:
    save_raw(make_checkpoint(tmp_path) / "model.safetensors", header, data, length)
    with pytest.raises(ConvertError, match=message):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_files_without_room_for_a_header(tmp_path: Path, content: bytes) -> None:
    (make_checkpoint(tmp_path) / "model.safetensors").write_bytes(content)
    with pytest.raises(ConvertError, match="does not fit into a file of"):
        open_checkpoint(str(tmp_path))


@settings(deadline=None)  # it writes files, on whatever disk there is
@given(position=st.integers(0, 200), value=st.binary(min_size=1, max_size=9))
def test_a_damaged_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_raw(path, {"t": entry(), "u": entry(shape=(4,), begin=16, end=32), "v": entry(begin=32, end=48)}, bytes(48))
    content = bytearray(path.read_bytes())
    content[position : position + len(value)] = value
    path.write_bytes(content)
    try:
        tensors, _ = read_header(path)
    except ConvertError:
        return
    assert all(t.offset >= 0 and t.offset + t.n_bytes <= len(content) for t in tensors.values())


def write_gguf(path: Path, raw_dtype: GGMLQuantizationType, data: np.ndarray, **metadata: int) -> None:
    writer = GGUFWriter(path, "llama")
    for key, value in metadata.items():
        writer.add_uint16(key.replace("_", "."), value)
    writer.add_tensor("token_embd.weight", data, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_reads_a_gguf(tmp_path: Path, dtype: str) -> None:
    stored = gguf.quants.quantize(MATRIX, GGMLQuantizationType[dtype])
    write_gguf(tmp_path / "model.gguf", GGMLQuantizationType[dtype], stored)
    checkpoint = open_checkpoint(str(tmp_path / "model.gguf"))
    assert (checkpoint.model_id, checkpoint.tensors["token_embd.weight"].dtype) == ("model", dtype)
    expected = gguf.quants.dequantize(stored, GGMLQuantizationType[dtype])
    assert np.array_equal(checkpoint.read("token_embd.weight", 1, 4), expected[1:4])
    assert [entry[0] for entry in checkpoint.files()] == ["model.gguf"]


def test_a_quantized_gguf_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", GGMLQuantizationType.Q8_0, np.zeros((2, 34), np.uint8))
    with pytest.raises(ConvertError, match=r"'token_embd.weight' is quantized already \(Q8_0\)"):
        open_checkpoint(str(tmp_path / "model.gguf"))


def test_one_split_of_a_gguf_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", GGMLQuantizationType.F32, MATRIX, split_count=3)
    with pytest.raises(ConvertError, match="one of several splits"):
        open_checkpoint(str(tmp_path / "model.gguf"))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"PK\x03\x04 something")
    with pytest.raises(ConvertError, match="this file is no GGUF"):
        open_checkpoint(str(tmp_path / "model.bin"))


def test_a_truncated_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, GGMLQuantizationType.F32, MATRIX)
    os.truncate(path, path.stat().st_size - 32)
    with pytest.raises(ConvertError, match=r"complete GGUF file|the tensor's data would end"):
        open_checkpoint(str(path))
