"""The roofline of a plan: what no prediction may do, on any device, and what limits what."""

import pytest

from bitwright.profiles.advice.cache import AttentionLayer, Cache, cache_format
from bitwright.profiles.advice.efficiency import decode_constants, prefill_constants
from bitwright.profiles.advice.hardware import devices, find_device
from bitwright.profiles.advice.operators import Experts, Row, prompt_operations, step_operators
from bitwright.profiles.advice.roofline import bottlenecks, prompt_time, step_time
from bitwright.profiles.advice.support import scheme_family, supported
from bitwright.profiles.vocabulary import Role
from tests.profiles.advice.test_operators import CACHE, F16, LAYERS, rows, total


def step(hardware, bits=16.0, context=4096, batch=1, kv=F16, runtime="llama.cpp", scheme=""):
    device = find_device(hardware)
    operators = step_operators(rows(bits), CACHE, Experts(), kv, context, batch)
    return step_time(operators, LAYERS, batch, device, decode_constants(device, runtime, scheme), False)


@pytest.mark.parametrize("device", devices(), ids=lambda device: device.name)
@pytest.mark.parametrize("runtime", ["llama.cpp", "vLLM"])
def test_no_prediction_is_above_the_ceiling(device, runtime):
    for bits, batch in ((16, 1), (4.5, 1), (4.5, 64)):
        operators = step_operators(rows(bits), CACHE, Experts(), F16, 4096, batch)
        time = step_time(operators, LAYERS, batch, device, decode_constants(device, runtime, "fp8"), False)
        assert time.seconds > time.floor >= sum(o.n_bytes for o in operators) / device.bandwidth
        assert time.low < time.high <= batch / time.floor
        assert sum(time.shares.values()) == pytest.approx(1)


def test_fewer_bits_are_faster_by_less_than_the_ratio_of_bytes():
    sixteen, four = step("GB10"), step("GB10", bits=4.5)
    assert 2 < sixteen.seconds / four.seconds < 16 / 4.5


def test_on_fast_memory_overhead_takes_what_bits_save():
    slow = step("GB10").seconds / step("GB10", bits=4.5).seconds
    fast = step("A100").seconds / step("A100", bits=4.5).seconds
    assert fast < slow


def test_the_floors_of_a_gb10():
    """56.9 ms in 16 bits at 4096 tokens: the 45.8 ms that a specification may state are impossible."""
    assert step("GB10").floor == pytest.approx(56.9e-3, rel=0.005)
    assert step("GB10", context=32768).floor == pytest.approx(70.7e-3, rel=0.005)
    fp8 = step("GB10", context=32768, kv=cache_format("FP8"))
    assert fp8.floor == pytest.approx(62.8e-3, rel=0.005)


def test_one_text_is_bound_by_memory_in_every_operator():
    for hardware in ("GB10", "H100", "RTX 4090", "M2 Ultra"):
        operators = step_operators(rows(), CACHE, Experts(), F16, 4096, 1)
        found = bottlenecks(operators, find_device(hardware))
        assert {row.limit for row in found} == {"memory"}
        assert sum(row.share for row in found) == pytest.approx(1)


def test_the_ceiling_of_a_batch_lets_it_share_its_experts():
    """Qwen3-30B-A3B in Q8_0 wrote 163 tokens a second on a GB10 with 16 texts, more than if each reached experts of its
    own would be possible."""
    expert = [Row(Role.EXPERT_UP, 30_000_000_000, 30_000_000_000, 1)]
    operators = step_operators(expert, Cache(()), Experts(128, 8), F16, 1, 16)
    device = find_device("GB10")
    time = step_time(operators, 1, 16, device, decode_constants(device, "llama.cpp"), True)
    assert time.floor == pytest.approx(30e9 / 16 / device.bandwidth)
    assert total(operators) / device.bandwidth > 10 * time.floor


def test_many_texts_are_bound_by_arithmetic():
    operators = step_operators(rows(), Cache(()), Experts(), F16, 1, 1024)
    assert next(row for row in bottlenecks(operators, find_device("RTX 4090"))).limit == "compute"
    device = find_device("RTX 4090")
    time = step_time(operators, LAYERS, 1024, device, decode_constants(device, "llama.cpp"), False)
    assert time.floor == pytest.approx(sum(o.operations for o in operators) / device.rates["fp16"])


def test_a_prompt_is_a_class_and_attention_counts():
    device = find_device("A100")
    times = {}
    for kernel in ("fa2", "standard"):
        for tokens in (512, 32768):
            operations = prompt_operations(rows(), CACHE, Experts(), tokens)
            constants = prefill_constants(device, "llama.cpp")
            times[kernel, tokens] = prompt_time(
                operations, tokens, 16e9, CACHE, device, device.prompt_rate, constants, kernel
            )
    assert times["standard", 32768].seconds > 1.3 * times["fa2", 32768].seconds
    for time in times.values():
        assert time.low < time.high and time.limit == "compute"


def test_no_rate_no_class():
    device = find_device("RTX 2080")
    assert prompt_time(1e12, 100, 1e9, CACHE, device, device.prompt_rate, None, "fa1") is None


@pytest.mark.parametrize(
    ("hardware", "runtime", "formats", "support"),
    [
        ("B300", "vLLM", ["W8A8"], "none"),
        ("B200", "vLLM", ["W8A8"], "native"),
        ("H100", "vLLM", ["NVFP4"], "weights"),
        ("B200", "vLLM", ["NVFP4"], "native"),
        ("A100", "vLLM", ["FP8"], "weights"),
        ("RTX 4090", "vLLM", ["FP8_BLOCK"], "native"),
        ("M2 Ultra", "vLLM", ["W4A16"], "none"),
        ("RTX 4090", "llama.cpp", ["NVFP4"], "weights"),
        ("GB10", "llama.cpp", ["NVFP4"], "native"),
        ("GB10", "llama.cpp", ["Q4_K", "IQ2_XXS"], "native"),
    ],
)
def test_what_runs_where(hardware, runtime, formats, support):
    verdict = supported(find_device(hardware), runtime, formats)
    assert verdict.support == support
    assert bool(verdict.why) == (support != "native")


@pytest.mark.parametrize(
    ("scheme", "family"), [("FP8_BLOCK", "FP8"), ("W4A16_ASYM_G32", "W4A16"), ("NVFP4A16", "NVFP4"), ("BF16", "BF16")]
)
def test_families_of_schemes(scheme, family):
    assert scheme_family(scheme) == family


def test_attention_layers_of_one_head_are_possible():
    operators = step_operators(rows(), Cache((AttentionLayer(1, 1, 8, 8),)), Experts(), F16, 1, 1)
    assert all(operator.n_bytes >= 0 for operator in operators)
