"""Layouts are exact and readable by the gguf package; damaged files are refused in words."""

import os
import struct
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, Keys
from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue

from bitwright.formats.errors import ConvertError
from bitwright.formats.files.gguf import TensorEntry, lay_out, padded, read_gguf

METADATA = {
    Keys.General.ARCHITECTURE: GGUFValue("llama", GGUFValueType.STRING),
    "llama.block_count": GGUFValue(2, GGUFValueType.UINT32),
    "tokenizer.ggml.tokens": GGUFValue(["a", "ü", "漢"], GGUFValueType.ARRAY, GGUFValueType.STRING),
}
ENTRIES = [
    TensorEntry("a.weight", (3, 5), GGMLQuantizationType.F32, 60),
    TensorEntry("b.weight", (2, 2, 32), GGMLQuantizationType.Q8_0, 4 * 34),
    TensorEntry("c.weight", (7,), GGMLQuantizationType.F32, 28),
]


def write(directory, layout, seed=0):
    """A file of this layout with random data; returns its path and the data of each tensor."""
    random = np.random.default_rng(seed)
    path = directory / layout.file_name
    content = bytearray(layout.header)
    data = {}
    for entry, offset in zip(layout.tensors, layout.offsets, strict=True):
        content.extend(bytes(offset - len(content)))
        data[entry.name] = random.integers(0, 60, entry.n_bytes, dtype=np.uint8).tobytes()
        content.extend(data[entry.name])
    content.extend(bytes(layout.n_bytes - len(content)))
    path.write_bytes(content)
    return path, data


def test_a_file_of_the_layout_reads_back(tmp_path):
    (layout,) = lay_out("m.gguf", METADATA, ENTRIES)
    path, data = write(tmp_path, layout)
    assert path.stat().st_size == layout.n_bytes
    reader = read_gguf(path)
    assert reader.contents("tokenizer.ggml.tokens") == ["a", "ü", "漢"]
    assert [(t.name, t.shape) for t in reader.tensors] == [(e.name, e.shape) for e in ENTRIES]
    tensors = reader.tensors
    for tensor in tensors:
        assert tensor.read(0, tensor.n_rows).tobytes() == data[tensor.name]
    assert tensors[1].read(1, 3).tobytes() == data["b.weight"][34 : 3 * 34]
    assert tensors[1].decode(1, 3).shape == (2, 32)


def test_shards_hold_every_tensor_once_and_count_each_other(tmp_path):
    layouts = lay_out("m.gguf", METADATA, ENTRIES, shard_bytes=140)
    assert [layout.file_name for layout in layouts] == [f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    names = []
    for i, layout in enumerate(layouts):
        reader = read_gguf(write(tmp_path, layout, i)[0])
        assert reader.value("split.no", int) == i
        assert reader.value("split.count", int) == 3
        assert reader.value("split.tensors.count", int) == 3
        assert ("general.architecture" in reader.fields) == (i == 0)
        names += [tensor.name for tensor in reader.tensors]
    assert names == [entry.name for entry in ENTRIES]


@pytest.mark.parametrize("shard_bytes", [1500, 2000, 4000, 10_000, 60_000])
def test_no_shard_is_larger_than_asked_for(shard_bytes):
    """The whole file counts: header, padding and all. And none is so small that the next one's first tensor fits."""
    random = np.random.default_rng(shard_bytes)
    entries = [
        TensorEntry(f"blk.{i}.{'x' * int(random.integers(1, 40))}", (n,), GGMLQuantizationType.F32, 4 * n)
        for i, n in enumerate(random.integers(1, 120, 60).tolist())
    ]
    layouts = lay_out("m.gguf", METADATA, entries, shard_bytes)
    assert [entry for layout in layouts for entry in layout.tensors] == entries
    for layout in layouts:
        assert layout.n_bytes <= shard_bytes
    for layout, following in pairwise(layouts):
        first = following.tensors[0]
        assert layout.n_bytes + padded(first.n_bytes) + len(first.name) + 32 + 2 * 32 > shard_bytes


def test_a_missing_file(tmp_path):
    with pytest.raises(ConvertError, match="cannot be read"):
        read_gguf(tmp_path / "none.gguf")


@pytest.mark.parametrize("keep", [0, 3, 20, 60, 150, -40])
def test_a_truncated_file_is_refused(tmp_path, keep):
    (layout,) = lay_out("m.gguf", METADATA, ENTRIES)
    path, _ = write(tmp_path, layout)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConvertError, match="complete GGUF"):
        read_gguf(path)


def test_random_damage_never_escapes_as_another_exception(tmp_path):
    (layout,) = lay_out("m.gguf", METADATA, ENTRIES)
    path, _ = write(tmp_path, layout)
    sound = path.read_bytes()
    random = np.random.default_rng(1)
    for _ in range(300):
        damaged = bytearray(sound)
        for position in random.integers(0, len(layout.header), 4):
            damaged[position] = random.integers(0, 256)
        path.write_bytes(damaged)
        try:
            for tensor in read_gguf(path).tensors:
                tensor.read(0, tensor.n_rows)
        except ConvertError:
            pass


@pytest.mark.parametrize("shape", [(0, 1), (3, 0), (0,)])
def test_a_tensor_without_elements_is_refused(tmp_path, shape):
    (layout,) = lay_out("m.gguf", METADATA, [TensorEntry("a.weight", shape, GGMLQuantizationType.F32, 0)])
    path, _ = write(tmp_path, layout)
    with pytest.raises(ConvertError, match=r"'a\.weight' has no elements"):
        read_gguf(path)


ARRAY, TEXT, BYTE = (int(kind) for kind in (GGUFValueType.ARRAY, GGUFValueType.STRING, GGUFValueType.UINT8))


def header(n_fields=0, n_tensors=0, version=3, order="<"):
    return b"GGUF" + struct.pack(f"{order}IQQ", version, n_tensors, n_fields)


def key_value(key, value_type, value):
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", value_type) + value


def info(name=b"t", dimensions=(32,), ggml_type=0, offset=0):
    sizes = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return struct.pack("<Q", len(name)) + name + sizes + struct.pack("<IQ", ggml_type, offset)


def array(item_type, count, items=b""):
    return key_value("a", ARRAY, struct.pack("<IQ", item_type, count) + items)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(1) + array(BYTE, 2**60, bytes(60)), "announces 1152921504606846976 values"),
        (header(1) + array(TEXT, 2**60, bytes(60)), "announces 1152921504606846976 texts"),
        (header(1) + array(TEXT, 1, struct.pack("<Q", 2**60)), "a text of 1152921504606846976 bytes"),
        (header(1) + array(ARRAY, 1, struct.pack("<IQ", ARRAY, 1) * 5000), "an array of arrays"),
        (header(1) + array(99, 1), "unknown type 99"),
        (header(2**60), "announces 1152921504606846976 key-values"),
        (header(0, 2**60), "announces 1152921504606846976 tensors"),
        (header(1) + struct.pack("<Q", 2**63) + bytes(40), "a key of 9223372036854775808 bytes"),
        (header(2) + key_value("a", BYTE, b"\1") * 2, "the key 'a' is there twice"),
        (header(1) + key_value("a", int(GGUFValueType.BOOL), b"\2"), "neither 0 nor 1"),
        (header(1) + key_value(Keys.General.ALIGNMENT, int(GGUFValueType.UINT32), bytes(4)), "alignment is 0"),
        (header(1) + key_value(Keys.General.ALIGNMENT, TEXT, struct.pack("<Q", 1) + b"x"), "alignment is 'x'"),
        (header(version=1), "of version 1"),
        (header(0, 1) + info(dimensions=(2,) * 5) + bytes(256), "has 5 dimensions"),
        (header(0, 1) + info(dimensions=()) + bytes(256), "has 0 dimensions"),
        (header(0, 1) + info(name=b"n" * 64) + bytes(256), "a tensor's name of 64 bytes"),
        (header(0, 1) + info(dimensions=(2**63, 2**63)) + bytes(256), "would end at byte"),
        (header(0, 1) + info(offset=2**63) + bytes(256), "would end at byte"),
        (header(0, 1) + info(ggml_type=999) + bytes(256), "999 is not a valid"),
        (header(0, 2) + info() + info(name=b"u", offset=64) + bytes(512), "'u' overlaps that of 't'"),
    ],
)
def test_what_a_header_claims_is_held_against_the_file(tmp_path, content, message):
    """At once, and in no more memory than the file has bytes, which tells a bomb from a file."""
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ConvertError, match=message):
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(content) + 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("version", [2, 3])
def test_a_big_endian_file_is_named_as_such(tmp_path, version):
    (tmp_path / "m.gguf").write_bytes(header(version=version, order=">") + bytes(64))
    with pytest.raises(ConvertError, match="the file is big-endian"):
        read_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize("version", [2, 3])
def test_a_large_array_of_bytes_and_an_empty_one(tmp_path, version):
    (tmp_path / "m.gguf").write_bytes(header(1, version=version) + array(BYTE, 3_000_000, bytes(3_000_000)))
    tracemalloc.start()
    try:
        field = read_gguf(tmp_path / "m.gguf").fields["a"]
        assert tracemalloc.get_traced_memory()[1] < 3_500_000
    finally:
        tracemalloc.stop()
    assert field.size == 3_000_000 and not field.stored.any()
    (tmp_path / "m.gguf").write_bytes(header(1, version=version) + array(TEXT, 0))
    assert read_gguf(tmp_path / "m.gguf").value("a", list) == []


def test_every_type_is_read_as_the_package_reads_it_and_written_again(tmp_path):
    numbers = {kind: 7 for kind in GGUFValueType if kind not in (GGUFValueType.STRING, GGUFValueType.ARRAY)}
    numbers |= {GGUFValueType.BOOL: True, GGUFValueType.FLOAT32: 0.1, GGUFValueType.INT8: -3}
    metadata = dict(METADATA)
    for kind, value in [*numbers.items(), (GGUFValueType.STRING, "ü\n")]:
        metadata[f"x.{kind.name}"] = GGUFValue(value, kind)
        metadata[f"x.{kind.name}s"] = GGUFValue([value] * 3, GGUFValueType.ARRAY, kind)
    (layout,) = lay_out("m.gguf", metadata, ENTRIES)
    path, _ = write(tmp_path, layout)
    ours, theirs = read_gguf(path), GGUFReader(path)
    expected = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert {key: ours.contents(key) for key in ours.fields} == expected
    assert lay_out("m.gguf", ours.metadata(), ENTRIES) == [layout]
    ours_of = {t.name: (t.shape, t.ggml_type, t.offset, t.n_bytes) for t in ours.tensors}
    assert ours_of == {
        t.name: (tuple(t.shape[::-1].tolist()), t.tensor_type, t.data_offset, t.n_bytes) for t in theirs.tensors
    }


@pytest.mark.parametrize("kind", [GGUFValueType.STRING, GGUFValueType.UINT32])
def test_an_empty_array_is_written(tmp_path, kind):
    metadata = {**METADATA, "x.empty": GGUFValue([], GGUFValueType.ARRAY, kind)}
    path, _ = write(tmp_path, lay_out("m.gguf", metadata, ENTRIES)[0])
    reader = read_gguf(path)
    assert reader.contents("x.empty") == [] and reader.metadata()["x.empty"].sub_type is kind
    assert reader.value("llama.block_count", int) == 2


def test_a_text_that_is_no_utf_8_harms_no_other_key(tmp_path):
    fields = key_value("a", TEXT, struct.pack("<Q", 2) + b"\xff\xfe") + key_value("b", BYTE, b"\x05")
    (tmp_path / "m.gguf").write_bytes(header(2) + fields)
    reader = read_gguf(tmp_path / "m.gguf")
    assert reader.value("b", int) == 5
    with pytest.raises(ConvertError, match="the value of a is no UTF-8"):
        reader.contents("a")
    with pytest.raises(ConvertError, match="the value of b is '5'"):
        reader.value("b", str)


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(ConvertError, match="it is a pipe and no regular file"):
        read_gguf(tmp_path / "m.gguf")
