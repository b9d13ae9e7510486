"""Activation statistics by streaming equal what hooks see in the whole model; no stop and no thread changes them."""

import numpy as np
import pytest
import torch
from torch import nn

from bitwright.calibration.control import Interrupted
from bitwright.calibration.passes.activation_observer import _counts
from bitwright.calibration.passes.activation_pass import stream_activations
from bitwright.calibration.statistics.activation_file import is_activations, load_activations, save_activations
from bitwright.calibration.statistics.activations import ActivationStatistics, InputRows
from bitwright.calibration.statistics.histogram import (
    CENTERS,
    EDGES,
    N_BINS,
    N_MAGNITUDES,
    magnitudes,
    mean_square,
    quantile,
)
from bitwright.formats.errors import ConvertError
from tests.calibration.stream.streaming import DictSource, StopAfter, load_whole, on_cpu, random_corpus, stacked_names


def compute(directory, work_dir, corpus=None, *, source=None, rows=None, decay=0.9, **options) -> ActivationStatistics:
    """By the checkpoint's own names."""
    source = source or DictSource.of(directory)
    model, control = on_cpu(source, directory, work_dir, **options)
    names = stacked_names(source.tensors)
    return stream_activations(model, names, corpus or random_corpus(), control, rows=rows, decay=decay)


def hooked_inputs(directory, corpus, stored=lambda name: [f"{name}.weight"]) -> dict[tuple[str, int], np.ndarray]:
    """(stored tensor, matrix) -> its inputs [n, n_columns], in float64, as the whole model computes them."""
    model, seen = load_whole(directory), {}

    def add(names, matrix, rows):
        for name in names:
            seen.setdefault((name, matrix), []).append(rows.reshape(-1, rows.shape[-1]).double().numpy())

    def experts(name):
        def hook(module, args):
            hidden, index, _ = args
            for expert in range(module.num_experts):
                rows = hidden[(index == expert).any(dim=1)]
                gate, up = (rows @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
                add([f"{name}.gate_proj.weight", f"{name}.up_proj.weight"], expert, rows)
                add([f"{name}.down_proj.weight"], expert, module.act_fn(gate) * up)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or name.endswith("mlp.gate"):
            module.register_forward_pre_hook(lambda _, args, name=name: add(stored(name), 0, args[0]))
        elif name.endswith("mlp.experts"):
            module.register_forward_pre_hook(experts(name))
    with torch.inference_mode():
        model(torch.from_numpy(corpus.tokens).long(), use_cache=False)
    return {key: np.concatenate(rows) for key, rows in seen.items()}


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3"])
def test_statistics_equal_the_whole_models(name, tiny, tmp_path):
    corpus = random_corpus(name)
    found = compute(tiny(name), tmp_path, corpus)
    seen = hooked_inputs(tiny(name), corpus)
    for (name_of, matrix), rows in seen.items():
        tied = name_of == "lm_head.weight" and name_of not in found.inputs
        inputs = found.inputs["model.embed_tokens.weight" if tied else name_of]
        assert inputs.counts[matrix] == len(rows)
        if not len(rows):
            assert not inputs.absmax()[matrix].any() and not inputs.values[matrix].any()
            continue
        close = dict(rtol=2e-4, atol=1e-5)
        np.testing.assert_allclose(inputs.minima[matrix], rows.min(axis=0), **close)
        np.testing.assert_allclose(inputs.maxima[matrix], rows.max(axis=0), **close)
        np.testing.assert_allclose(inputs.squares[matrix], np.square(rows).sum(axis=0), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(inputs.totals[matrix], rows.sum(), rtol=1e-3, atol=0.05)
        assert inputs.values[matrix].sum() == rows.size and inputs.peaks[matrix].sum() == len(rows)
        sizes = np.abs(rows)
        for share in (0.5, 0.99, 0.999):
            exact = np.quantile(sizes, share, method="inverted_cdf")
            assert quantile(magnitudes(inputs.values[matrix]), share) == pytest.approx(exact, rel=0.035)
        assert mean_square(inputs.peaks[matrix]) == pytest.approx(np.square(sizes.max(axis=1)).mean(), rel=0.035)


def test_figures_are_those_of_the_values(tiny, tmp_path):
    corpus = random_corpus()
    found = compute(tiny("llama"), tmp_path, corpus)
    name = "model.layers.1.mlp.down_proj.weight"
    rows, figures = hooked_inputs(tiny("llama"), corpus)[name, 0], found.inputs[name].figures()
    peaks, rms = np.abs(rows).max(axis=0), np.sqrt(np.square(rows).mean(axis=0))
    expected = {
        "absmax": peaks.max(),
        "mean": rows.mean(),
        "std": rows.std(),
        "percentile_99": np.quantile(np.abs(rows), 0.99),
        "percentile_99_9": np.quantile(np.abs(rows), 0.999),
        "outlier_ratio": peaks.max() / np.median(peaks),
        "typical": np.median(rms),
        "dynamic_range": np.log2(peaks.max() / np.median(rms)),
        "token_range": np.log2(np.sqrt(np.square(np.abs(rows).max(axis=1)).mean()) / np.median(rms)),
    }
    for key, value in expected.items():
        assert getattr(figures, key) == pytest.approx(value, rel=0.035, abs=1e-3), key


def file_bytes(statistics: ActivationStatistics, path) -> bytes:
    save_activations(path, statistics)
    return path.read_bytes()


def test_threads_and_interruptions_change_no_byte(tiny, tmp_path):
    corpus = random_corpus("qwen3_moe", 6)
    whole_rows, rows = InputRows(tmp_path / "whole-rows"), InputRows(tmp_path / "rows")
    whole = compute(tiny("qwen3_moe"), tmp_path / "whole", corpus, rows=whole_rows, threads=1)
    with pytest.raises(Interrupted):
        compute(tiny("qwen3_moe"), tmp_path / "a", corpus, rows=rows, threads=3, should_stop=StopAfter(1))
    resumed = compute(tiny("qwen3_moe"), tmp_path / "a", corpus, rows=rows, threads=2)
    assert file_bytes(resumed, tmp_path / "a.safetensors") == file_bytes(whole, tmp_path / "b.safetensors")
    kept = sorted(path.name for path in whole_rows.directory.iterdir())
    assert kept == sorted(path.name for path in rows.directory.iterdir())
    for name in kept:
        assert (rows.directory / name).read_bytes() == (whole_rows.directory / name).read_bytes()


def test_a_checkpoint_of_other_settings_is_refused(tiny, tmp_path):
    with pytest.raises(Interrupted):
        compute(tiny("llama"), tmp_path / "work", should_stop=StopAfter(1))
    for change, named in (({"decay": 0.5}, "decay"), ({"rows": InputRows(tmp_path / "rows")}, "rows")):
        with pytest.raises(ConvertError, match=f"another run's: {named} is"):
            compute(tiny("llama"), tmp_path / "work", **change)


def test_in_bfloat16_they_are_nearly_the_same(tiny, tmp_path):
    corpus = random_corpus("llama", 6)
    exact = compute(tiny("llama"), tmp_path / "exact", corpus)
    single, two = (
        compute(tiny("llama"), tmp_path / str(threads), corpus, dtype="bfloat16", threads=threads) for threads in (1, 2)
    )
    assert file_bytes(single, tmp_path / "a.safetensors") == file_bytes(two, tmp_path / "b.safetensors")
    for tensor, inputs in exact.inputs.items():
        np.testing.assert_allclose(
            single.of(tensor).absmax(), inputs.absmax(), rtol=0.1, atol=0.05 * inputs.absmax().max()
        )


def test_kept_rows_are_few_and_are_inputs(tiny, tmp_path):
    corpus, rows = random_corpus("llama", 60), InputRows(tmp_path / "rows")
    compute(tiny("llama"), tmp_path / "a", corpus, rows=rows)
    name = "model.layers.1.self_attn.o_proj.weight"
    kept = rows.read(name)[0]
    assert 128 <= len(kept) <= 256 and kept.dtype == np.float32
    inputs = hooked_inputs(tiny("llama"), corpus)[name, 0]
    distances = [np.abs(inputs - row).max(axis=1).min() for row in kept[:20]]
    assert max(distances) < 1e-3
    places = {int(np.abs(inputs - row).max(axis=1).argmin()) for row in kept}
    assert len(places) > 0.9 * len(kept)  # no row stands for many
    # Queries, keys and values see the same: kept once.
    assert rows.has("model.layers.1.self_attn.q_proj.weight")
    assert not rows.has("model.layers.1.self_attn.k_proj.weight")


def test_smoothed_ranges_follow_the_batches(tiny, tmp_path):
    """Of samples as long as a micro-batch, so that each is one."""
    corpus, name = random_corpus("phi3-longrope-long", 3), "model.layers.0.mlp.down_proj.weight"
    found = compute(tiny("phi3-longrope-long"), tmp_path, corpus, decay=0.75)
    rows = hooked_inputs(tiny("phi3-longrope-long"), corpus)[name, 0].reshape(3, -1)
    expected = np.array([rows[0].min(), rows[0].max()])
    for batch in rows[1:]:
        expected = 0.75 * expected + 0.25 * np.array([batch.min(), batch.max()])
    np.testing.assert_allclose(found.inputs[name].ranges[0], expected, rtol=1e-4)


def test_bins_are_where_they_are_said_to_be():
    values = np.concatenate(
        [EDGES[:-1], CENTERS, np.nextafter(EDGES[1:].astype(np.float32), 0), [1e9, -1e9, 1e-9, -0.0]]
    )
    counted = _counts(torch.from_numpy(values.astype(np.float32)))
    expected = np.zeros(N_BINS, np.int64)
    for value in values.astype(np.float32).astype(np.float64):
        size = abs(value)
        place = 0 if size < EDGES[0] else min(int(np.searchsorted(EDGES, size, side="right")), N_MAGNITUDES)
        expected[N_MAGNITUDES + (place if value > 0 else -place)] += 1
    np.testing.assert_array_equal(counted, expected)
    assert (EDGES[1:] / EDGES[:-1]).max() <= 1 + 1 / 32


def test_values_that_are_not_finite_are_an_error(tiny, tmp_path):
    source = DictSource.of(tiny("llama"))
    source.tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = np.nan
    with pytest.raises(ConvertError, match=r"not finite[\s\S]*layers.0.mlp.down_proj"):
        compute(tiny("llama"), tmp_path, source=source)


def test_the_file_comes_back_and_damage_is_told(tiny, tmp_path):
    found, path = compute(tiny("llama"), tmp_path / "work"), tmp_path / "a.safetensors"
    data = file_bytes(found, path)
    loaded = load_activations(path)
    assert file_bytes(loaded, tmp_path / "b.safetensors") == data
    assert is_activations(path) and not is_activations(tmp_path / "none.safetensors")
    assert rb"\"version\": 2" in data
    for damage in (data[: len(data) // 2], data[:40], data.replace(rb"\"version\": 2", rb"\"version\": 9"), b""):
        path.write_bytes(damage)
        with pytest.raises(ConvertError):
            load_activations(path)
    broken = bytearray(data)
    broken[-8:] = b"\xff" * 8  # a negative count, or no number
    path.write_bytes(bytes(broken))
    with pytest.raises(ConvertError):
        load_activations(path)
    with pytest.raises(ConvertError, match="no such file"):
        load_activations(tmp_path / "none.safetensors")
