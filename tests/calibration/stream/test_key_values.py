"""What the layer stream sees of caches is what the whole model's cache holds; what handlers make of it counts."""

import threading

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from bitwright import converter
from bitwright.calibration.control import PassControl
from bitwright.calibration.statistics.activation_file import load_activations, save_activations
from bitwright.calibration.stream.forward import LayerStream
from bitwright.calibration.stream.key_values import PassingCache, RoundedCache
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.converter.judge import llama_cpp
from bitwright.converter.judge.quality import _key_rows
from bitwright.converter.model.model_map import describe
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from scripts.peers import ggml
from tests.calibration.passes.test_activation_pass import compute
from tests.calibration.stream.streaming import DictSource, load_whole, on_cpu, random_corpus
from tests.tiny_models import VOCAB_SIZE


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi3", "qwen3_moe"])
def test_magnitudes_are_those_of_the_whole_models_cache(name, tiny, tmp_path):
    corpus = random_corpus(name)
    found = compute(tiny(name), tmp_path, corpus).caches
    cache = DynamicCache()  # of whole length for layers with a sliding window, too
    with torch.inference_mode():
        load_whole(tiny(name))(torch.from_numpy(corpus.tokens).long(), past_key_values=cache, use_cache=True)
    assert list(found) == list(range(len(cache.layers)))
    for layer, cached in found.items():
        for peaks, states in ((cached.keys, cache.layers[layer].keys), (cached.values, cache.layers[layer].values)):
            assert states.shape[0] == len(corpus.tokens) and states.shape[2] == corpus.tokens.shape[1]
            np.testing.assert_allclose(peaks, states.abs().amax(dim=(0, 2)).numpy(), rtol=2e-4, atol=1e-5)


def test_damage_to_what_is_stored_of_caches_is_told(tiny, tmp_path):
    found, path = compute(tiny("llama"), tmp_path / "work"), tmp_path / "a.safetensors"
    save_activations(path, found)
    data = path.read_bytes()
    for before, after in (
        (b'"cached values/1"', b'"cached values/7"'),
        (b'"cached keys/1"', b'"cached keys/x"'),
        (b'"cached keys/0"', b'"cached_keys/0"'),
    ):
        assert data.count(before) == 1
        path.write_bytes(data.replace(before, after))
        with pytest.raises(ConvertError, match="damaged"):
            load_activations(path)


class Doubling:
    """Keys as they are, values twice as large."""

    def product(self, *_):
        return None

    def cached(self, layer, keys, values):
        return keys, values * 2


def test_attention_computes_with_what_the_arithmetic_keeps(tiny, tmp_path):
    """Values that are doubled in the cache are values of a projection that is doubled."""
    corpus, source, doubled = random_corpus(), DictSource.of(tiny("llama")), DictSource.of(tiny("llama"))
    for name in doubled.tensors:
        if name.endswith("v_proj.weight"):
            doubled.tensors[name] = doubled.tensors[name] * 2

    def states(source, work_dir, arithmetic=None):
        model, control = on_cpu(source, tiny("llama"), work_dir, arithmetic=arithmetic)
        stream = LayerStream(model, corpus.tokens, control)
        stream.run()
        return stream.hidden_states(0, len(corpus.tokens)).numpy()

    found = states(source, tmp_path / "a", Doubling())
    np.testing.assert_array_equal(found, states(doubled, tmp_path / "b"))
    assert np.abs(found - states(source, tmp_path / "c")).max() > 0.1


def test_handlers_are_those_of_their_thread():
    cache, one = PassingCache(), torch.ones(1)
    seen = []
    with cache.handled_by(lambda layer, keys, values: (keys + layer, values)):
        assert cache.update(one, one, 3)[0] == 4
        other = threading.Thread(target=lambda: seen.append(float(cache.update(one, one, 3)[0])))
        other.start()
        other.join()
    assert seen == [1.0] and cache.update(one, one, 3)[0] == 1


@pytest.mark.parametrize("kv", ["Q8_0", "Q4_0"])
def test_blocks_round_as_ggml_rounds_them(kv):
    """Heads of 32, which are not turned; a block of zeros, and one that reaches far."""
    states = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 40, 32)).astype(np.float32))
    states[0, 0, 0], states[0, 0, 1] = 0, states[0, 0, 1] * 1000
    kept, _ = RoundedCache(kv).cached(0, states, states)
    rows = states.reshape(-1, 32).numpy()
    expected = ggml.dequantize(ggml.quantize(rows, kv), kv, 32)
    found = kept.reshape(-1, 32).numpy()
    # Halves go to the even code here, and away from zero in C: a code in some thousands.
    assert (np.abs(found - expected) > 1e-6 * np.abs(expected)).mean() < 1e-3
    np.testing.assert_allclose(found, expected, atol=np.abs(rows).max() / 100)


@pytest.mark.parametrize(
    ("kv", "largest_error"),
    [("F16", 5e-4), ("BF16", 4e-3), ("FP8", 0.04), ("Q8_0", 0.008), ("Q4_0", 0.12), ("NVFP4", 0.12)],
)
def test_every_format_keeps_the_shape_and_most_of_the_numbers(kv, largest_error):
    states = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 3, 5, 128)).astype(np.float32))
    keys, values = RoundedCache(kv).cached(0, states, states)
    assert keys.shape == values.shape == states.shape and keys.dtype == states.dtype
    for kept in (keys, values):
        error = float((kept - states).norm() / states.norm())
        assert 0 < error < largest_error


def test_turned_heads_bear_an_outlier():
    """One channel a hundred times as large: a block of four bits loses the others, unless they are turned first."""
    states = torch.from_numpy(np.random.default_rng(2).standard_normal((1, 1, 64, 64)).astype(np.float32))
    states[..., 3] *= 100
    keys, _ = RoundedCache("Q4_0").cached(0, states, states)
    rows = states.reshape(-1, 64).numpy()
    plain = ggml.dequantize(ggml.quantize(rows, "Q4_0"), "Q4_0", 64).reshape(states.shape)
    others = [channel for channel in range(32) if channel != 3]
    lost = [float(np.linalg.norm((kept - states.numpy())[..., others])) for kept in (keys.numpy(), plain)]
    assert lost[0] < lost[1]


def test_heads_that_no_block_divides_are_refused():
    states = torch.zeros(1, 1, 1, 48)
    with pytest.raises(ConvertError, match="no multiple of Q8_0's block of 32"):
        RoundedCache("Q8_0").cached(0, states, states)
    assert RoundedCache("F16").cached(0, states, states)[0].shape == states.shape


def test_llama_cpp_keeps_them_alike(tiny, tmp_path, monkeypatch):
    """Its logits with such a cache are ours with it, but for its queries, which it rounds to Q8_0: not ours without it,
    nor without turning, nor with keys in another order than the GGUF has them in."""
    model = tiny("llama-256")
    converter.convert(str(model), profile="fp16-baseline", output=tmp_path / "m.gguf", judge="off", quiet=True)
    tokens = np.random.default_rng(3).integers(3, VOCAB_SIZE, (1, 120))
    monkeypatch.setattr(llama_cpp, "_F32", 2)  # ggml's Q4_0
    monkeypatch.setattr(llama_cpp, "_FLASH_ATTENTION_OFF", 1)
    with llama_cpp.LlamaCpp(tmp_path / "m.gguf") as runtime:
        expected = runtime.logits(tokens[0].tolist())

    def error(arithmetic, name):
        streamable = StreamableModel(open_checkpoint(str(model)), model, device="cpu", arithmetic=arithmetic)
        stream = LayerStream(streamable, tokens, PassControl(tmp_path / name))
        stream.run()
        with stream.head() as head, torch.inference_mode():
            found = head(stream.hidden_states(0, 1)[0]).numpy()
        return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))

    rows = _key_rows(describe(open_checkpoint(str(model))))
    assert rows is not None and rows[:64] != list(range(64))
    kept = error(RoundedCache("Q4_0", key_rows=rows), "kept")
    others = [error(None, "exact"), error(RoundedCache("Q4_0"), "other order")]
    unturned = RoundedCache("Q4_0", key_rows=rows)
    monkeypatch.setattr("bitwright.calibration.stream.key_values._rotation", lambda *_: None)
    others.append(error(unturned, "unturned"))
    assert kept < 0.5 * min(others), (kept, others)
