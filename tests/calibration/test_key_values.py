"""What the layer stream sees of caches is what the whole model's cache holds; what handlers make of it counts."""

import threading

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from calibration.activation_file import load_activations, save_activations
from calibration.key_values import PassingCache
from calibration.stream import LayerStream
from formats.errors import ConvertError
from tests.calibration.streaming import DictSource, load_whole, random_corpus
from tests.calibration.test_activations import compute


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
        stream = LayerStream(source, tiny("llama"), corpus.tokens, work_dir, device="cpu", arithmetic=arithmetic)
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
