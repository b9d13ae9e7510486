"""Every pass on a GPU that is pretended: no mixed devices, few waits, full memory; and the pretence itself."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bitwright import converter
from bitwright.calibration.stream.build import others_alike
from bitwright.calibration.stream.rounded_inputs import round_e4m3
from bitwright.formats.errors import ConvertError
from scripts.bench import gpu

MODELS = {"llama": 2, "qwen3_moe": 2, "gemma3": 6, "qwen3_5": 4, "deepseek_v3": 3}
"""With their layers."""
EXPERTS = {"qwen3_moe": 8, "deepseek_v3": 8}
GPUS = ("cuda", "mps")
# Of a layer and micro-batch: hidden states go to a file; and a model's own code asks which experts have tokens, and for
# each of them which tokens.
WAITS, OF_EXPERTS, OF_EXPERT = 1, 2, 5
# Of a layer: statistics come over, in a copy for every dtype, and matrices of second moments, with what is held out,
# in two of its own: those of experts, too.
OF_LAYER = {"importance": 9, "activations": 4, "gradients": 5, "peaks": 2}
# The model is run twice, without layers, to see what depends on the tokens: what every layer is given is compared.
ARGUMENTS, OF_A_PASS = 4, 12


def assert_alike(there, here):
    """As computed on a CPU, but for the last bits: sums are pairs of float32 there, and values on the bound of a bin
    may be counted in the next."""
    assert there.keys() == here.keys()
    for key, expected in here.items():
        if key.startswith(("values ", "peaks ")):
            assert np.abs(there[key] - expected).sum() <= 0.02 * expected.sum()
        else:
            np.testing.assert_allclose(there[key], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max(initial=0))


def test_the_pretence_refuses_what_a_gpu_refuses(pretend):
    assert pretend("rules") == {
        "mixed": "MixedDevices",
        "numpy": "TypeError",
        "float64": "TypeError",
        "float8": "TypeError",
        "full": "OutOfMemoryError",
        "race": "Race",
        "inference": "RuntimeError",
        "waits": "{'_local_scalar_dense': 1, 'copy back': 1}",
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("of", ["importance", "activations", "gradients", "peaks"])
def test_a_pass_waits_for_the_device_no_more_than_it_must(of, name, pretend):
    n_batches = 2
    seen, here = pretend("observed", of, name, [(kind, n_batches) for kind in GPUS])
    layers, experts = MODELS[name], EXPERTS.get(name, 0)
    of_batch = WAITS + (OF_EXPERTS + OF_EXPERT * experts if experts else 0)
    ways, outside = (2, 12) if of == "gradients" else (1, 2)
    for (kind, _), (counts, figures) in seen.items():
        assert_alike(figures, here)
        of_layer = OF_LAYER[of] + ARGUMENTS + (2 * experts if of == "importance" else 0)
        most = n_batches * (ways * layers * of_batch + outside) + layers * of_layer + OF_A_PASS
        assert sum(counts.waits.values()) <= most, counts.waits
        assert counts.peak > 0 and counts.refused == 0
        if kind == "cuda":  # tokens alone, and what stands for embeddings when the model is taken apart
            assert counts.pageable < 16 << 10 < counts.bytes_there


@pytest.mark.parametrize("of", ["quality", "generation"])
def test_what_judges_computes_the_same_there(of, pretend):
    seen, here = pretend("observed", of, "llama", [(kind, 4) for kind in GPUS])
    for _, figures in seen.values():
        assert_alike(figures, here)


# 64 samples of 16 tokens make tensors of 96 columns, 393216 bytes; the largest weight has 102400. What is summed by
# groups takes no more samples at once than a group has: 32 of 512, but for those that are held out.
@pytest.mark.parametrize(
    ("kind", "number", "of", "n_samples"),
    [("mps", 1, "peaks", 64), ("cuda", 1, "peaks", 64), ("cuda", 2, "importance", 512)],
)
def test_where_memory_is_full_micro_batches_are_halved(kind, number, of, n_samples, pretend):
    counts, there, here = pretend("with_little_memory", of, kind, n_samples, number=number, largest=120_000)
    assert counts.refused > 0 and min(counts.made[i] for i in range(number)) > 0
    assert_alike(there, here)


def test_a_layer_for_which_there_is_no_room_yet_is_read_again(pretend):
    counts, there, here = pretend("with_little_memory", "peaks", "cuda", refused_copy=25)
    assert counts.refused == 1
    assert_alike(there, here)


@pytest.mark.parametrize(
    ("kind", "limits"), [("mps", {"largest": 3000}), ("cuda", {"largest": 3000}), ("cuda", {"memory": 100_000})]
)
def test_where_nothing_fits_the_user_is_told(kind, limits, pretend):
    what, where, remedy = pretend("refused", kind, **limits)
    assert what.startswith(f"the memory of the {kind} device is full") and "out of memory" in what
    assert where == "--device" and "--device cpu" in remedy


def test_the_micro_batch_is_fitted_once_and_kept(pretend):
    little, much = pretend("micro_batches_of", [3 << 20, 3 << 20, 1 << 30]), pretend("micro_batches_of", [1 << 30])
    assert little[0] == little[1] == little[2] and little[0]["fitted"]
    assert 1 <= little[0]["samples"] < much[0]["samples"] == 512


def test_a_gpu_continues_many_texts_together(pretend):
    assert [pretend("generation_batches", kind) for kind in ("cpu", "mps", "cuda")] == [[4] * 5, [16, 4], [20]]


@pytest.mark.parametrize(
    ("of", "name"),
    [("importance", "qwen3_moe"), ("activations", "llama"), ("gradients", "llama"), ("peaks", "qwen3_5")],
)
def test_several_gpus_share_the_samples_and_give_the_same(of, name, pretend):
    (alone, expected), *shared = pretend("on_several", of, name, [1, 2, 3], 5)
    assert alone.made.keys() == {0}
    for (counts, figures), number in zip(shared, (2, 3), strict=True):
        layer_work = [counts.made[i] for i in range(number)]
        assert min(layer_work) > 0.1 * sum(layer_work)
        assert figures.keys() == expected.keys()
        for key, there in figures.items():
            np.testing.assert_array_equal(there, expected[key], strict=True)


def test_a_pass_goes_on_with_another_number_of_gpus(pretend):
    ((_, expected),) = pretend("on_several", "peaks", "llama", [1], 8)
    continued = pretend("continued_on", [2, 1, 3])
    assert continued.keys() == expected.keys()
    for key, there in continued.items():
        np.testing.assert_array_equal(there, expected[key], strict=True)


def test_gpus_of_another_kind_are_left_out(monkeypatch):
    kinds = ["a", "b", "a", "a"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(kinds))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", kinds.__getitem__)
    assert others_alike(torch.device("cuda")) == [torch.device("cuda", 0), torch.device("cuda", 3)]
    assert others_alike(torch.device("cpu")) == others_alike(torch.device("mps")) == []


SHORT = {"samples": 128, "sequence_length": 16, "calibration": "embedded", "effort": "fast", "threads": 1}
BY_RULES = {"analysis": False, "error_feedback": "off"}


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("llama", "cuda", {"profile": "mlp-low-precision", "error_feedback": "quick"}),
        ("qwen3_moe", "mps", BY_RULES | {"profile": "balanced-4bit"}),
        ("deepseek_v3", "cuda", BY_RULES | {"profile": "balanced-4bit"}),
    ],
)
def test_a_whole_job_is_measured_in_float32(name, kind, options, pretend):
    report = pretend("converted", name, kind, SHORT | {"judge": "fast"} | options)
    assert (report["quality"]["device"], report["quality"]["dtype"]) == (kind, "float32")
    assert report["quality"]["mean_kld"] > 0 and report["coherence"] is not None


@pytest.mark.parametrize(
    ("name", "kind", "number", "profile"),
    [("gemma3", "mps", 1, "fp8-kv"), ("qwen3_5", "mps", 1, "nvfp4-vllm"), ("llama", "cuda", 2, "smoothquant-w8a8")],
)
def test_a_whole_job_to_a_directory_is_computed_by_its_schemes(name, kind, number, profile, pretend):
    options = SHORT | BY_RULES | {"profile": profile, "judge": "off"}
    there, here = pretend("converted_directory", name, kind, options, number=number)
    assert (there["device"], here["device"]) == (kind, "cpu") and there["not_finite"] == 0
    assert there["mean_kld"] == pytest.approx(here["mean_kld"], rel=0.05, abs=1e-7)


@pytest.mark.parametrize("kind", GPUS)
def test_products_of_integers_are_the_cpus_to_the_last_bit(kind, pretend):
    for there, here in pretend("products_of_integers", kind):
        assert there.dtype == here.dtype == np.float32
        np.testing.assert_array_equal(there.view(np.int32), here.view(np.int32))


def test_factors_are_chosen_on_the_gpu_as_on_the_cpu(pretend):
    chosen = pretend("smoothed", "cuda")
    for (there, errors), (here, expected) in zip(chosen[::2], chosen[1::2], strict=True):
        assert there == here and 0 < min(errors.values()) < errors["off"]
        assert errors == pytest.approx(expected, rel=1e-5)


def test_layers_are_tuned_on_the_gpu(pretend):
    options = SHORT | {"profile": "mlp-low-precision", "analysis": False, "judge": "off", "tune": 4}
    tuning = pretend("converted", "llama-256", "cuda", options)["tuning"]
    assert 0 < tuning["kept"] <= tuning["layers"] == 4 and 0 < tuning["ratio"] < 1


def test_e4m3_by_float32_arithmetic_is_torchs_own():
    """Every float32 of 16 leading bits, and its neighbours."""
    bits = torch.arange(1 << 16, dtype=torch.int64) << 16
    values = torch.cat([(bits + step).to(torch.int32).view(torch.float32) for step in (0, 1, 0x7FFF, 0x8000, 0xFFFF)])
    values = values[~values.isnan()]
    expected = values.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(round_e4m3(values).view(torch.int32), expected.view(torch.int32))
    assert round_e4m3(torch.tensor([torch.nan])).isnan().all()


def test_the_preflight_looks_at_the_memory_of_the_gpu(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("bitwright.calibration.stream.device.memory.free_bytes", lambda _: 10_000)
    with pytest.raises(ConvertError, match="of the cpu device's memory are free") as refused:
        converter.convert(
            str(tiny("llama")), profile="balanced-4bit", output=tmp_path / "m.gguf", device="cpu", quiet=True, **SHORT
        )
    assert refused.value.where == "--device" and not (tmp_path / "m.gguf").exists()


def test_speed_is_measured_on_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(gpu.main, [])
    assert result.exit_code == 1 and "torch finds no GPU of CUDA here" in result.output
