"""An artifact judged by many machines: the figures of one."""

import json
from pathlib import Path

import pytest

from tests.converter.commands import convert, done, refused

HOW = ["--text", "embedded", "--samples", "18", "--sequence-length", "512", "--device", "cpu", "--threads", "2", "-q"]


@pytest.fixture(scope="module")
def artifact(tiny, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("evaluated") / "m.gguf"
    done("-p", "uniform-8bit", "--set", "mlp_*=Q4_0", "--judge", "off", "--output", output, "-q", tiny("llama"))
    return output


def test_any_number_of_parts_finds_what_one_machine_finds(artifact, tiny, tmp_path):
    evaluate = ["evaluate", artifact, "--against", tiny("llama"), *HOW]
    whole = json.loads(convert(*evaluate, "--json").stdout)
    for n in (1, 3):
        parts = [tmp_path / f"{i}-of-{n}.safetensors" for i in range(1, n + 1)]
        for i, part in enumerate(parts, start=1):
            done(*evaluate, "--part", f"{i}/{n}", "--output", part)
        said = convert("evaluate", "--merge", *reversed(parts), "--json")
        merged = json.loads(said.stdout)
        assert merged.pop("agreement") is None
        assert merged == {key: value for key, value in whole.items() if key != "agreement"}
        assert merged["samples"] == 18 and merged["mean_kld"] > 0 and merged["words"] >= 0
    assert "Verdict:" in convert("evaluate", "--merge", *parts).stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("1-of-1.safetensors", "1-of-3.safetensors", "2-of-3.safetensors", "3-of-3.safetensors")
    ]
    said = refused("evaluate", "--merge", parts[0], parts[2])
    assert "part 2 of 3 is missing" in said and f"--part 2/3 --output {parts[1]}" in said
    content = bytearray(parts[1].read_bytes())
    content[-1] ^= 1
    parts[1].write_bytes(content)
    assert "its scores are not what was written" in refused("evaluate", "--merge", *parts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "1/17"], "cannot be cut into 17 parts"),
        (["--part", "1/2", "--kv", "Q8_0"], "on one machine only"),
        (["--scratch", "x"], "are of a part"),
        (["other.gguf"], "one artifact is evaluated"),
    ],
)
def test_what_goes_with_no_part_is_refused(arguments, message, artifact, tiny):
    assert message in refused("evaluate", artifact, "--against", tiny("llama"), *HOW, *arguments)
