"""Directories of architectures whose data files describe what transformers has in no linear module, or elsewhere."""

import json

import numpy as np
import pytest

from bitwright import converter
from bitwright.converter.architectures.architecture import known_architecture
from tests.converter.commands import refused
from tests.converter.directory.test_any_decoder import OPTIONS, logits, schemes
from tests.tiny_architectures import TINY_ARCHITECTURES
from tests.tiny_models import build_model

# Kept beside what is quantized: experts stored as one tensor, a router and a head that transformers calls otherwise.
KNOWN = {
    "phimoe": ("model.layers.1.block_sparse_moe.gate.weight", "model.layers.1.mlp.router"),
    "gpt_neox": ("embed_out.weight", "lm_head"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_transformers_loads_what_a_data_file_describes_otherwise(name, tmp_path):
    build_model(TINY_ARCHITECTURES[name], name, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert known_architecture(config) is not None
    converter.convert(str(tmp_path / "model"), profile="fp8", output=tmp_path / "artifact", **OPTIONS)
    kept, ignored = KNOWN[name]
    assert schemes(tmp_path / "artifact")[kept] in ("F32", "BF16")
    stated = json.loads((tmp_path / "artifact" / "config.json").read_text())["quantization_config"]
    assert ignored in stated["ignore"]
    expected = logits(tmp_path / "model")
    assert np.linalg.norm(logits(tmp_path / "artifact") - expected) / np.linalg.norm(expected) < 0.5


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("gemma4_text-moe", "in one tensor and reads no single ones"),
        ("gpt2", "no directory is made of the architecture 'gpt2'"),
        ("gpt_oss", "its experts are stored as one tensor with the inputs first"),
    ],
)
def test_what_no_runtime_would_read_is_refused(name, what, tmp_path):
    build_model(TINY_ARCHITECTURES[name], name, tmp_path / "model")
    assert what in refused(tmp_path / "model", "--profile", "fp8", "--judge", "off", "--output", tmp_path / "out")


def test_a_directory_does_not_ask_what_llama_cpp_implements(tmp_path):
    name = "cohere-qk-norm"
    build_model(TINY_ARCHITECTURES[name], name, tmp_path / "model")
    assert "llama.cpp does not implement" in refused(tmp_path / "model", "--output", tmp_path / "out.gguf")
    converter.convert(str(tmp_path / "model"), profile="fp8", output=tmp_path / "artifact", **OPTIONS)
    assert {"FP8"} == {
        kind for tensor, kind in schemes(tmp_path / "artifact").items() if tensor.endswith("proj.weight")
    }
    expected = logits(tmp_path / "model")
    assert np.linalg.norm(logits(tmp_path / "artifact") - expected) / np.linalg.norm(expected) < 0.5


def test_what_lies_inside_of_the_text_model_ignores_nothing_else(tmp_path):
    """Gemma 4 stores keys and values of layers that use those of others: no part of the model, and no tower."""
    name = "gemma4_text-small"
    build_model(TINY_ARCHITECTURES[name], name, tmp_path / "model")
    converter.convert(str(tmp_path / "model"), profile="fp8", output=tmp_path / "artifact", **OPTIONS)
    stated = json.loads((tmp_path / "artifact" / "config.json").read_text())["quantization_config"]
    assert not {"re:.*layers.*", "re:.*language_model.*"} & {*stated["ignore"]}
    expected = logits(tmp_path / "model")
    assert np.linalg.norm(logits(tmp_path / "artifact") - expected) / np.linalg.norm(expected) < 0.5
