"""Both files of importance: round trips, llama.cpp's layout as an independent reader sees it, hostile files."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitwright.calibration.statistics.imatrix_file import load_imatrix, save_imatrix
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.formats.errors import ConvertError

IDENTITY = {
    "model": "org/name",
    "revision": "0123abc",
    "corpus": "wikitext-2",
    "corpus_sha256": "ab" * 32,
    "samples": 4,
    "sequence_length": 512,
}
SHAPES = {"blk.0.attn_q.weight": (1, 96), "blk.0.ffn_down_exps.weight": (4, 32), "output.weight": (1, 96)}


def matrix(**identity) -> ImportanceMatrix:
    """Sums that float32 holds exactly; one expert was never reached, one by few tokens."""
    random = np.random.default_rng(0)
    sums = {name: random.random(shape, np.float32).astype(np.float64) * 1000 for name, shape in SHAPES.items()}
    sums = {name: values.astype(np.float32).astype(np.float64) for name, values in sums.items()}
    counts = {name: np.full(shape[0], 2048) for name, shape in SHAPES.items()}
    counts["blk.0.ffn_down_exps.weight"] = np.array([700, 0, 3, 1345])
    sums["blk.0.ffn_down_exps.weight"][1] = 0
    return ImportanceMatrix(sums, counts, **(identity or IDENTITY))


def assert_same(loaded: ImportanceMatrix, saved: ImportanceMatrix) -> None:
    assert list(loaded.sums) == sorted(saved.sums)
    for name, sums in saved.sums.items():
        np.testing.assert_array_equal(loaded.sums[name], sums)
        np.testing.assert_array_equal(loaded.counts[name], saved.counts[name])
    for field in IDENTITY:
        assert getattr(loaded, field) == getattr(saved, field)


def test_gguf_round_trip_loses_nothing(tmp_path):
    save_imatrix(tmp_path / "a.gguf", matrix())
    assert_same(load_imatrix(tmp_path / "a.gguf"), matrix())


def test_unknown_identity_stays_unknown(tmp_path):
    saved = ImportanceMatrix({"blk.0.attn_q.weight": np.ones((1, 32))}, {"blk.0.attn_q.weight": np.array([7])})
    save_imatrix(tmp_path / "a.gguf", saved)
    loaded = load_imatrix(tmp_path / "a.gguf")
    assert (loaded.model, loaded.revision, loaded.corpus_sha256) == (None, None, None)
    assert (loaded.samples, loaded.sequence_length) == (None, None)


@pytest.mark.parametrize(("first", "second"), [("a.gguf", "b.dat"), ("a.dat", "b.gguf")])
def test_turned_into_the_other_format_the_columns_stay(first, second, tmp_path):
    save_imatrix(tmp_path / first, matrix())
    save_imatrix(tmp_path / second, load_imatrix(tmp_path / first))
    turned = load_imatrix(tmp_path / second).shaped_as(SHAPES)
    assert (turned.corpus, turned.samples) == (IDENTITY["corpus"], IDENTITY["samples"])
    for name in SHAPES:
        np.testing.assert_allclose(turned.columns(name), matrix().columns(name), rtol=1e-6)


def test_independent_reader_finds_llama_cpps_layout(tmp_path):
    save_imatrix(tmp_path / "a.gguf", matrix())
    reader = GGUFReader(tmp_path / "a.gguf")
    assert reader.get_field("general.architecture") is None
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.datasets").contents() == ["wikitext-2"]
    assert reader.get_field("imatrix.chunk_count").contents() == 4
    assert reader.get_field("imatrix.chunk_size").contents() == 512
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert list(tensors) == sorted(f"{name}.{kind}" for name in SHAPES for kind in ("counts", "in_sum2"))
    for name, (n_matrices, n_columns) in SHAPES.items():
        sums, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"]
        assert sums.tensor_type == counts.tensor_type == GGMLQuantizationType.F32
        # ggml's order: the fastest dimension first
        assert (sums.shape.tolist(), counts.shape.tolist()) == ([n_columns, n_matrices], [1, n_matrices])
        np.testing.assert_array_equal(sums.data, matrix().sums[name].astype(np.float32))
        np.testing.assert_array_equal(counts.data[:, 0], matrix().counts[name])


def hand_made_dat() -> bytes:
    """One tensor with means 0.5 and 2 over 3 chunks, as llama.cpp writes it."""
    name, corpus = b"blk.0.attn_q.weight", b"calibration.txt"
    entry = struct.pack("<i", len(name)) + name + struct.pack("<ii2f", 3, 2, 1.5, 6.0)
    return struct.pack("<i", 1) + entry + struct.pack("<ii", 3, len(corpus)) + corpus


def test_dat_is_read_and_written_byte_for_byte(tmp_path):
    (tmp_path / "theirs.dat").write_bytes(hand_made_dat())
    loaded = load_imatrix(tmp_path / "theirs.dat")
    np.testing.assert_array_equal(loaded.columns("blk.0.attn_q.weight"), [[0.5, 2.0]])
    assert (loaded.corpus, loaded.samples, loaded.model) == ("calibration.txt", 3, None)
    save_imatrix(tmp_path / "ours.dat", loaded)
    assert (tmp_path / "ours.dat").read_bytes() == hand_made_dat()


def test_dat_counts_chunks(tmp_path):
    save_imatrix(tmp_path / "a.dat", matrix())
    loaded = load_imatrix(tmp_path / "a.dat")
    assert {name: counts.tolist() for name, counts in loaded.counts.items()} == {
        "blk.0.attn_q.weight": [4],
        "blk.0.ffn_down_exps.weight": [3],
        "output.weight": [4],
    }


@pytest.mark.parametrize("suffix", ["gguf", "dat"])
def test_truncated_anywhere_is_refused(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    save_imatrix(path, matrix())
    whole = path.read_bytes()
    # A .dat may end after its last entry: older ones say nothing of the text.
    needed = len(whole) - (4 + 4 + len("wikitext-2")) if suffix == "dat" else len(whole) - 31
    accepted = []
    for length in range(0, needed, 7):
        path.write_bytes(whole[:length])
        try:
            load_imatrix(path)
            accepted.append(length)
        except ConvertError as error:
            assert error.where.startswith(str(path))
    assert accepted == []


@pytest.mark.parametrize("suffix", ["gguf", "dat"])
@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_anywhere_is_refused_or_read_never_a_crash(suffix, tmp_path, data):
    path = tmp_path / f"a.{suffix}"
    save_imatrix(path, matrix())
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        load_imatrix(path)
    except ConvertError as error:
        assert error.where


def dat(*parts: bytes) -> bytes:
    return struct.pack("<i", 1) + b"".join(parts)


NAME = struct.pack("<i", 4) + b"blk."


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "it is empty"),
        (struct.pack("<i", 0), "announces 0 entries"),
        (struct.pack("<i", -1), "announces -1 entries"),
        (dat(struct.pack("<i", 2**31 - 1)), "a name of 2147483647 bytes"),
        (dat(struct.pack("<i", -5)), "a name of -5 bytes"),
        (dat(NAME, struct.pack("<ii", 0, 4), bytes(16)), "4 values of 0 chunks"),
        (dat(NAME, struct.pack("<ii", 1, -4), bytes(16)), "-4 values of 1 chunks"),
        (dat(NAME, struct.pack("<ii", 1, 2**31 - 1)), "it ends at byte"),
        (dat(NAME, struct.pack("<ii2f", 1, 2, 1.0, float("nan"))), "not finite"),
        (dat(NAME, struct.pack("<ii2f", 1, 2, 1.0, -1.0)), "negative"),
        (b"some text that is no imatrix at all", "announces a name|ends at byte"),
    ],
)
def test_hostile_dat_is_refused(content, problem, tmp_path):
    path = tmp_path / "hostile.dat"
    path.write_bytes(content)
    with pytest.raises(ConvertError, match=problem) as caught:
        load_imatrix(path)
    assert caught.value.where.startswith(str(path))


def test_gguf_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    save_imatrix(path, matrix())
    path.write_bytes(path.read_bytes().replace(b"imatrix", b"adapter", 2))
    with pytest.raises(ConvertError, match="no importance matrix"):
        load_imatrix(path)


def test_gguf_without_counts_is_refused(tmp_path):
    path = tmp_path / "a.gguf"
    save_imatrix(path, matrix())
    path.write_bytes(path.read_bytes().replace(b"output.weight.counts", b"output.weight.COUNTS"))
    with pytest.raises(ConvertError, match=r"output\.weight lacks float32 sums and counts"):
        load_imatrix(path)


def test_gguf_with_nan_is_refused(tmp_path):
    path = tmp_path / "a.gguf"
    save_imatrix(path, matrix())
    with path.open("r+b") as file:
        file.seek(-96 * 4, os.SEEK_END)
        file.write(struct.pack("<f", float("nan")))
    with pytest.raises(ConvertError, match=r"'output\.weight' has values that are not finite") as caught:
        load_imatrix(path)
    assert caught.value.where == str(path)


def test_missing_file_and_directory_are_refused(tmp_path):
    with pytest.raises(ConvertError, match="cannot be read"):
        load_imatrix(tmp_path / "absent.gguf")
    with pytest.raises(ConvertError, match="cannot be read"):
        load_imatrix(tmp_path)
    with pytest.raises(ConvertError, match="cannot be written"):
        save_imatrix(tmp_path / "absent" / "a.gguf", matrix())


@pytest.mark.parametrize("suffix", ["gguf", "dat"])
def test_failed_write_leaves_the_old_file_and_nothing_else(suffix, tmp_path, monkeypatch):
    path = tmp_path / f"a.{suffix}"
    save_imatrix(path, matrix())
    before = path.read_bytes()

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(ConvertError, match="No space left on device"):
        save_imatrix(path, matrix(corpus="another"))
    assert path.read_bytes() == before
    assert [p.name for p in Path(tmp_path).iterdir()] == [path.name]
