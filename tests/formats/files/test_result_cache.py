"""The cache of results: what is damaged, cut short or another's is a miss, and processes do not hurt each other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import observed
from bitwright.formats.files.result_cache import ResultCache

KEY = {"model": "org/name", "files": [["a", 1, "sha256:0"]], "samples": 8}


@pytest.fixture
def cache(tmp_path) -> ResultCache:
    return ResultCache(tmp_path / "cache", 1 << 20)


@pytest.fixture
def result(tmp_path) -> Path:
    path = tmp_path / "result.bin"
    path.write_bytes(bytes(range(256)) * 10)
    return path


def only_entry(cache: ResultCache) -> Path:
    (entry,) = cache.directory.iterdir()
    return entry


def test_a_file_comes_back_as_it_was(cache, result, tmp_path):
    assert not cache.fetch("kind", KEY, tmp_path / "got") and cache.entries() == []
    cache.store("kind", KEY, result)
    assert cache.fetch("kind", KEY, tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == result.read_bytes()
    (entry,) = cache.entries()
    assert (entry.kind, entry.key, entry.n_bytes) == ("kind", KEY, only_entry(cache).stat().st_size)


def test_a_directory_comes_back_as_it_was(cache, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name, content in (("b.bin", b"\0" * 5000), ("a.json", b"{}"), ("empty", b"")):
        (source / name).write_bytes(content)
    cache.store("kind", KEY, source)
    assert cache.fetch("kind", KEY, target)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == {p.name: p.read_bytes() for p in source.iterdir()}


@pytest.mark.parametrize("differing", [{"samples": 9}, {"files": []}, {"more": None}])
def test_another_key_is_another_result(cache, result, tmp_path, differing):
    cache.store("kind", KEY, result)
    assert not cache.fetch("kind", KEY | differing, tmp_path / "got")
    assert not cache.fetch("other", KEY, tmp_path / "got")


def cut(data: bytes) -> bytes:
    return data[:-1]


def grown(data: bytes) -> bytes:
    return data + b"x"


def flipped(data: bytes) -> bytes:
    return data[:-7] + bytes([data[-7] ^ 1]) + data[-6:]


def without_header(data: bytes) -> bytes:
    return data.partition(b"\n")[2]


def of_another_key(data: bytes) -> bytes:
    header, _, rest = data.partition(b"\n")
    return json.dumps(json.loads(header) | {"key": KEY | {"samples": 9}}).encode() + b"\n" + rest


def leading_out(data: bytes) -> bytes:
    header, _, rest = data.partition(b"\n")
    described = json.loads(header)
    described["files"][0][0] = "../got"
    return json.dumps(described).encode() + b"\n" + rest


def empty(_: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [cut, grown, flipped, without_header, of_another_key, leading_out, empty])
def test_what_is_not_what_was_written_is_a_miss_and_goes(cache, result, tmp_path, damage):
    cache.store("kind", KEY, result)
    entry = only_entry(cache)
    entry.write_bytes(damage(entry.read_bytes()))
    before = {path.name for path in tmp_path.iterdir()}
    assert not cache.fetch("kind", KEY, tmp_path / "target")
    assert {path.name for path in tmp_path.iterdir()} == before and not entry.exists()
    cache.store("kind", KEY, result)
    assert cache.fetch("kind", KEY, tmp_path / "target")


def test_what_was_used_longest_ago_goes_first(tmp_path, result):
    cache = ResultCache(tmp_path / "cache", 13_000)  # four entries
    for i in range(4):
        cache.store("kind", KEY | {"i": i}, result)
        os.utime(next(e.path for e in cache.entries() if e.key["i"] == i), (1000 + i, 1000 + i))
    assert cache.fetch("kind", KEY | {"i": 0}, tmp_path / "got")  # used again
    cache.store("kind", KEY | {"i": 4}, result)
    assert sorted(e.key["i"] for e in cache.entries()) == [0, 2, 3, 4]


def test_what_would_take_too_much_is_left_out(tmp_path, result):
    cache = ResultCache(tmp_path / "cache", 12_000)
    assert cache.store("kind", KEY, result)
    assert len(cache.entries()) == 1
    result.write_bytes(bytes(3100))
    assert not cache.store("kind", KEY | {"large": True}, result)
    assert len(cache.entries()) == 1


def test_clearing_leaves_the_files_of_others(cache, result):
    cache.store("kind", KEY, result)
    for name in ("notes.txt", "kind-1.entry", ".of-others.tmp"):
        (cache.directory / name).write_text("mine")
    (cache.directory / f"draft-{'0' * 32}").write_bytes(b"left by a kill")
    assert cache.clear() > len(result.read_bytes())
    assert sorted(p.name for p in cache.directory.iterdir()) == [".of-others.tmp", "kind-1.entry", "notes.txt"]


def test_a_kill_at_any_step_leaves_a_whole_entry_or_none(cache, result, tmp_path):
    class Killed(BaseException):
        pass

    for n in range(100):
        steps = iter(range(n))

        def die(*_, steps=steps) -> None:
            if next(steps, None) is None:
                raise Killed

        try:
            with observed(die):
                cache.store("kind", KEY, result)
            break
        except Killed:
            assert all(e.key == KEY for e in cache.entries())
            if cache.fetch("kind", KEY, tmp_path / "got"):
                assert (tmp_path / "got").read_bytes() == result.read_bytes()
    assert n > 5
    cache.clear()
    assert list(cache.directory.iterdir()) == []


def test_a_cache_that_cannot_be_written_says_so(tmp_path, result):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConvertError):
        ResultCache(tmp_path / "file" / "cache", 1 << 20).store("kind", KEY, result)


_AT_ONCE = """
import sys
from pathlib import Path
from bitwright.formats.files.result_cache import ResultCache
directory, number = Path(sys.argv[1]), int(sys.argv[2])
cache = ResultCache(directory / "cache", 30_000)
source = directory / f"source-{number}"
target = directory / f"target-{number}"
for i in range(60):
    key = {"i": i % 7}
    source.write_bytes(bytes([i % 7]) * 4000)
    if cache.fetch("kind", key, target):
        assert target.read_bytes() == bytes([i % 7]) * 4000
    cache.store("kind", key, source)
"""


def test_two_processes_at_once(tmp_path):
    children = [subprocess.Popen([sys.executable, "-c", _AT_ONCE, str(tmp_path), str(n)]) for n in (1, 2)]
    assert [child.wait() for child in children] == [0, 0]
    entries = ResultCache(tmp_path / "cache", 30_000).entries()
    assert 0 < sum(e.n_bytes for e in entries) <= 30_000 + 4500
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".entry"}
