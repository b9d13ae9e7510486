"""The benchmark of the whole job: its table, and how its peer is built."""

from pathlib import Path

from scripts.bench.job import contest
from scripts.peers.llama_cpp import instructions


def test_medians_of_seconds_and_of_the_ratios_of_neighbours():
    ours = iter([{"a": 2.0, "b": 1.0}, {"a": 8.0, "b": 1.0}, {"a": 3.0, "b": 4.0}])
    theirs = iter([{"a": 4.0}, {"a": 4.0}, {"a": 12.0}])
    seen: list[tuple[str, Path]] = []

    def turn(name, seconds):
        return lambda directory: seen.append((name, directory)) or next(seconds)

    rows = contest({"ours": turn("ours", ours), "theirs": turn("theirs", theirs)}, 3).splitlines()
    assert [row.split() for row in rows[2:]] == [["a", "3.0", "4.0", "0.50"], ["b", "1.0"]]
    assert [name for name, _ in seen] == ["ours", "theirs"] * 3
    assert len({directory for _, directory in seen}) == 6 and not any(d.exists() for _, d in seen)


def test_the_peer_is_built_without_amx():
    assert instructions({"avx512f": True, "amx-tile": False}) == {"GGML_NATIVE": "ON"}
    without = instructions({"avx2": True, "avx512f": True, "avx512bf16": False, "amx-tile": True, "amx-bf16": True})
    assert without["GGML_NATIVE"] == "OFF" and without["GGML_AVX512"] == "ON"
    assert without["GGML_AVX512_BF16"] == "OFF" and without["GGML_AMX_TILE"] == "OFF"
