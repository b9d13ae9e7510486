"""`bitwright evaluate --kv`: what a cache in fewer bits costs."""

import json

import pytest

from bitwright import converter
from tests.converter.commands import convert, refused

TEXT = ["--samples", 2, "--sequence-length", 48, "--device", "cpu", "--text", "embedded"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    from tests import tiny_models

    path = tmp_path_factory.mktemp("cache") / "m.gguf"
    model = tiny_models.checkpoint("llama-256")
    converter.convert(str(model), profile="fp16-baseline", output=path, judge="off", quiet=True)
    return path, model


def test_fewer_bits_diverge_more_and_the_length_is_told(artifact):
    path, model = artifact
    found = {}
    for kv in ("F16", "Q4_0"):
        result = convert("evaluate", path, "--against", model, "--kv", kv, *TEXT, "--json")
        assert result.exit_code == 0, result.stderr
        found[kv] = json.loads(result.stdout)
        assert found[kv]["kv"] == kv and found[kv]["agreement"] is None
    assert 0 <= found["F16"]["mean_kld"] < found["Q4_0"]["mean_kld"] / 10
    spans = found["Q4_0"]["by_position"]
    assert spans[0]["first"] == 24 and spans[-1]["last"] == 46 and len(spans) == 8
    lengths = [span["last"] - span["first"] + 1 for span in spans]
    mean = sum(span["mean_kld"] * length for span, length in zip(spans, lengths, strict=True)) / sum(lengths)
    assert mean == pytest.approx(found["Q4_0"]["mean_kld"])
    text = convert("evaluate", path, "--against", model, "--kv", "Q4_0", *TEXT).stdout
    assert "keys and values in Q4_0; mean KLD after so many tokens:" in text and "\n  25 to 27: " in text


def test_a_latent_is_no_key(tiny, tmp_path):
    converter.convert(
        str(tiny("deepseek_v2")), profile="fp16-baseline", output=tmp_path / "m.gguf", judge="off", quiet=True
    )
    arguments = ["evaluate", tmp_path / "m.gguf", "--against", tiny("deepseek_v2"), "--kv", "Q8_0", *TEXT]
    assert "keeps a latent" in refused(*arguments)
