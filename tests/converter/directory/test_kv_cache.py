"""FP8 caches of keys and values: the scales that a directory stores, and what its evaluation makes of them."""

import json
import shutil

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from bitwright.calibration.evaluation.generation import generate_greedily
from bitwright.calibration.statistics.smoothing import SmoothQuantConfig
from bitwright.calibration.text.corpus import load_corpus
from bitwright.converter.directory.artifact import DirectoryArtifact
from bitwright.converter.directory.products import SchemeProducts
from bitwright.converter.measure.running import load_tokenizer
from bitwright.converter.smoothing.stage import smoothed_caches
from bitwright.formats.errors import ConvertError
from bitwright.formats.schemes.cache_scheme import encode_cache_scale
from tests.calibration.stream.streaming import load_whole, on_cpu, random_corpus
from tests.converter.directory.test_directory import convert, invoke, ours, theirs
from tests.converter.smoothing.smoothing_models import observe, observe_again

FP8_KV = 'extends = "fp8"\n[activations]\nkv_cache = "FP8"'


def scales(artifact) -> dict[str, torch.Tensor]:
    with safe_open(artifact / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.endswith((".k_scale", ".v_scale"))}  # noqa: SIM118


def plain(quantization: dict) -> dict:
    """The configuration without the cache's scheme."""
    return {**quantization, "kv_cache_scheme": None}


def divergence(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean KL divergence of the second logits from the first, nats a token."""
    p, q = (torch.from_numpy(logits).double().log_softmax(-1) for logits in (ours, theirs))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", ["llama-256", "phi3"])
def test_a_scale_is_the_largest_magnitude_over_448(tiny, tmp_path, name):
    model = tiny(name)
    artifact, report = convert(model, tmp_path, FP8_KV)
    corpus = load_corpus("embedded", load_tokenizer(model), 128, 16)
    cache = DynamicCache()
    with torch.inference_mode():
        load_whole(model)(torch.from_numpy(corpus.tokens).long(), past_key_values=cache, use_cache=True)
    stored = scales(artifact)
    assert len(stored) == 2 * len(cache.layers) == len(report["kv_cache"])
    for i, layer in enumerate(cache.layers):
        for key, states in (("k", layer.keys), ("v", layer.values)):
            scale = stored[f"model.layers.{i}.self_attn.{key}_scale"]
            assert scale.shape == (1,) and scale.dtype == torch.bfloat16
            assert float(scale) == pytest.approx(float(states.abs().max()) / 448, rel=2**-8)
    assert {row["tensor"]: row["scale"] for row in report["kv_cache"]} == {n: float(s) for n, s in stored.items()}


@pytest.mark.parametrize("name", ["llama-256", "qwen3", "gemma3"])
def test_transformers_rounds_caches_to_the_bit_as_we_do(tiny, tmp_path, name):
    model = tiny(name)
    artifact, report = convert(model, tmp_path, FP8_KV)
    data = json.loads((artifact / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(data).kv_cache_scheme
    assert (scheme.num_bits, scheme.type, scheme.strategy, scheme.dynamic, scheme.symmetric) == (
        *(8, "float", "tensor", False, True),
    )
    evaluated = ours(artifact, model, tmp_path / "a")
    np.testing.assert_array_equal(evaluated, theirs(artifact))
    in_16_bits = tmp_path / "in-16-bits"
    shutil.copytree(artifact, in_16_bits)
    (in_16_bits / "config.json").write_text(
        json.dumps(json.loads((artifact / "config.json").read_text()) | {"quantization_config": plain(data)})
    )
    recipe = json.loads((artifact / "bitwright.json").read_text())
    for tensor in recipe["tensors"]:
        tensor.pop("cache_scales", None)
    (in_16_bits / "bitwright.json").write_text(json.dumps(recipe))
    without = ours(in_16_bits, model, tmp_path / "b")
    np.testing.assert_array_equal(without, theirs(in_16_bits))
    source = theirs(model)
    assert 0 < divergence(without, evaluated) < 0.05
    assert divergence(source, without) < divergence(source, evaluated)
    planned = json.loads(invoke("plan", "--profile", tmp_path / "p.toml", "--json", model).stdout)
    assert planned["bytes"] == report["artifact"]["bytes"]


def test_generation_and_the_report_have_rounded_caches(tiny, tmp_path):
    model = tiny("llama-256")
    artifact, report = convert(model, tmp_path, "fp8-kv", judge="full", sequence_length=32)
    assert 0 < report["quality"]["mean_kld"] < 0.2 and report["verdict"] in ("near-lossless", "good", "fair", "lossy")
    weights = DirectoryArtifact.of_recipe(artifact)
    prompts = np.random.default_rng(1).integers(3, 400, (3, 6)).tolist()

    class In16Bits(SchemeProducts):
        def cached(self, layer, keys, values):
            return keys, values

    def generated(arithmetic, resident):
        work_dir = tmp_path / f"{type(arithmetic).__name__}-{resident}"
        streamable, control = on_cpu(weights, model, work_dir, arithmetic=arithmetic)
        return generate_greedily(streamable, prompts, 8, frozenset(), control, resident=resident)

    # By steps, from a cache that holds rounded values, as in one pass over all; sums in another order round otherwise.
    resident, streamed = generated(SchemeProducts(weights), True), generated(SchemeProducts(weights), False)
    assert [g.tokens for g in resident] == [g.tokens for g in streamed]
    apart = np.abs(np.subtract([g.surprises for g in resident], [g.surprises for g in streamed]))
    assert np.median(apart) < 1e-4 and apart.max() < 0.1
    otherwise = generated(In16Bits(weights), True)
    effects = [abs(g.surprises[0] - other.surprises[0]) for g, other in zip(resident, otherwise, strict=True)]
    assert min(effects) > 1e-3


def test_an_outlier_of_the_keys_shows(tiny, tmp_path):
    """One channel of the keys is far larger than the others, and queries are zero there and in the one that it turns
    with: attention does not see it, and the scale of all keys has to span it."""
    model = tmp_path / "model"
    shutil.copytree(tiny("qwen2"), model)
    (path,) = model.glob("*.safetensors")
    tensors = load_file(path)
    head = tensors["model.layers.0.self_attn.k_proj.bias"].numel() // 2
    of_heads = {"q": 4, "k": 2}
    for key, n_heads in of_heads.items():
        for kind in ("weight", "bias"):
            values = tensors[f"model.layers.0.self_attn.{key}_proj.{kind}"]
            for channel in (head // 2 - 1, head - 1):  # the pair that turns most slowly
                values.view(n_heads, head, -1)[:, channel] = 0
    clean = {name: values.clone() for name, values in tensors.items()}
    found = []
    for outlier, tensors_of in ((0.0, clean), (2.0**21, tensors)):
        tensors_of["model.layers.0.self_attn.k_proj.bias"].view(2, head)[:, head // 2 - 1] = outlier
        save_file(tensors_of, path, {"format": "pt"})
        directory = tmp_path / str(outlier)
        directory.mkdir()
        artifact, report = convert(model, directory, FP8_KV)
        source = theirs(model)
        found.append((divergence(source, ours(artifact, model, directory / "work")), report["kv_cache"][0], directory))
    (without, small, _), (with_outlier, large, directory) = found
    assert small["absmax"] < 100 < 2.0**20 < large["absmax"] and large["outlier_ratio"] > 2**14 > small["outlier_ratio"]
    assert large["tensor"] == "model.layers.0.self_attn.k_scale"
    assert with_outlier > 3 * without
    options = ["--calibration", "embedded", "--samples", 128, "--sequence-length", 16, "--judge", "off", "--fresh"]
    said = invoke("--profile", directory / "p.toml", *options, "--output", directory / "again", model)
    assert (
        "layers.0.self_attn.k_scale: the largest channel is 2**" in said.stderr and 'kv_cache = "BF16"' in said.stderr
    )
    assert (
        "the cache of keys and values is FP8, with 4 scales" in said.stderr
        and "kv cache     FP8, 4 scales" in said.output
    )


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_scales_are_those_of_the_smoothed_model(tiny, tmp_path, name):
    """Factors between values and output projection change what the cache holds."""
    seen = observe(tiny(name), tmp_path, random_corpus(name, 2))
    view, smoother, _ = seen.smooth(SmoothQuantConfig().alpha)
    again = observe_again(view, seen.model_map, seen.corpus, tmp_path / "again")
    derived, changed = smoothed_caches(seen.activations.caches, seen.model_map, smoother.folder.foldings), 0
    for layer, cached in again.caches.items():
        np.testing.assert_allclose(derived[layer].keys, cached.keys, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(derived[layer].values, cached.values, rtol=1e-3, atol=1e-4)
        changed += not np.allclose(cached.values, seen.activations.caches[layer].values, rtol=0.05)
    assert changed == len(again.caches)


def test_a_scale_that_is_absent_or_zero_is_told(tiny, tmp_path):
    artifact, _ = convert(tiny("llama-256"), tmp_path, FP8_KV)
    assert len(DirectoryArtifact.of_recipe(artifact).cache_scales()) == 4
    path, name = artifact / "model.safetensors", "model.layers.2.self_attn.v_scale"
    tensors = load_file(path)
    for change in ({name: torch.zeros(1, dtype=torch.bfloat16)}, {name: torch.ones(1)}):
        save_file({**tensors, **change}, path, {"format": "pt"})
        failed = invoke("verify", artifact, "--against", tiny("llama-256"))
        assert failed.exit_code == 1 and name in failed.stderr
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    failed = invoke("evaluate", artifact, "--against", tiny("llama-256"))
    assert failed.exit_code == 1 and name in failed.stderr


@pytest.mark.parametrize("peak", [0.0, 1e-9, float("inf"), float("nan")])
def test_what_gives_no_scale_is_an_error(peak):
    with pytest.raises(ConvertError, match=r"no scale[\s\S]*tensor x"):
        encode_cache_scale(peak, "tensor x")
