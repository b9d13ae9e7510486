"""Layouts are exact and readable by the gguf package; damaged files are refused in words."""

from itertools import pairwise

import numpy as np
import pytest
from gguf import GGMLQuantizationType, Keys
from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue

from formats.errors import ConvertError
from formats.gguf_file import TensorEntry, lay_out, padded, read_gguf

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
    assert reader.get_field("tokenizer.ggml.tokens").contents() == ["a", "ü", "漢"]
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
        assert reader.get_field("split.no").contents() == i
        assert reader.get_field("split.count").contents() == 3
        assert reader.get_field("split.tensors.count").contents() == 3
        assert (reader.get_field("general.architecture") is not None) == (i == 0)
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
