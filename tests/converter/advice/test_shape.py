"""Keys, values and states of every kind of model, against what llama.cpp allocates for them."""

import pytest

from bitwright import converter
from bitwright.converter.advice.shape import model_shape
from bitwright.converter.model.model_map import describe
from bitwright.converter.source.open import open_checkpoint
from tests import tiny_models
from tests.converter.advice.llama_cpp_cache import (
    CONTEXT,
    Refused,
    allocated_mib,
    check_against_llama_cpp,
    shape_of,
)
from tests.tiny_architectures import ALL_TINY_MODELS

# tests/converter/test_architectures_end_to_end.py has the others. Grouped queries; latent; windows of one size, of
# another head's size and shared; Mamba beside attention in a layer, and in the place of it; gated delta rules; KDA
# beside latents; short convolutions; no attention at all; chunks.
KINDS = [
    *("llama-256", "deepseek_v2", "gemma3", "gemma4_text-small", "falcon_h1", "nemotron_h", "mamba2"),
    *("qwen3_next", "kimi_linear", "lfm2", "llama4_text", "gpt_oss"),
]


@pytest.mark.parametrize("name", KINDS)
def test_bytes_are_those_that_llama_cpp_allocates(name, tmp_path):
    model = tiny_models.checkpoint(name, ALL_TINY_MODELS[name])
    gguf = tmp_path / "m.gguf"
    converter.convert(str(model), profile="uniform-8bit", output=gguf, judge="off", quiet=True, effort="fast")
    check_against_llama_cpp(model, gguf)
    heads = {size for layer in shape_of(model).cache.layers for size in (layer.key, layer.value)}
    for kv in ("Q8_0", "Q4_0"):
        if all(size % 32 == 0 for size in heads):
            check_against_llama_cpp(model, gguf, kv)
        else:
            with pytest.raises(Refused):
                allocated_mib(gguf, CONTEXT, 2, kv)


@pytest.mark.parametrize(
    ("name", "experts", "used", "context"), [("qwen3_moe", 8, 3, 1024), ("llama", 0, 0, 1024), ("mixtral", 4, 2, 1024)]
)
def test_experts_and_context(name, experts, used, context, tiny):
    shape = shape_of(tiny(name))
    assert (shape.experts.count, shape.experts.used, shape.context) == (experts, used, context)
    assert shape.generates and len(shape.cache.layers) == shape.layers == 2


def test_a_model_that_embeds_keeps_no_cache(tiny):
    for name in ("bert", "modernbert", "embeddinggemma"):
        shape = shape_of(tiny(name))
        assert not shape.generates and not shape.cache.layers


def test_a_gguf_says_the_same_as_its_checkpoint(tiny, tmp_path):
    converter.convert(str(tiny("gemma3")), profile="fp16-baseline", output=tmp_path / "m.gguf", judge="off", quiet=True)
    of_file = model_shape(describe(open_checkpoint(str(tmp_path / "m.gguf"))))
    assert of_file == shape_of(tiny("gemma3"))
