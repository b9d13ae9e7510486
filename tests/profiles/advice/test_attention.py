"""Attention kernels: the figures of the papers, by hand."""

import pytest

from bitwright.formats.errors import ConvertError
from bitwright.profiles.advice.attention import choose_kernel, decode_intensity, prompt_bytes
from bitwright.profiles.advice.cache import AttentionLayer, cache_format
from bitwright.profiles.advice.hardware import find_device

LLAMA_8B = AttentionLayer(32, 8, 128, 128)


def test_the_standard_kernel_moves_the_scores_four_times():
    """4.3 GB a layer at 4096 tokens and 32 heads, beside 84 MB of ends."""
    assert prompt_bytes(LLAMA_8B, 4096, "standard") == pytest.approx(4.3e9 + 84e6, rel=0.01)


def test_a_tiled_kernel_moves_its_ends_and_keys_once_a_tile():
    ends = 2 * 4096 * (2 * 32 * 128 + 2 * 8 * 128)
    assert ends == pytest.approx(84e6, rel=0.01)
    moved = prompt_bytes(LLAMA_8B, 4096, "fa2")
    assert ends < moved < prompt_bytes(LLAMA_8B, 4096, "standard") / 4
    assert prompt_bytes(LLAMA_8B, 4096, "fa3") < moved, "larger tiles, fewer passes"
    assert prompt_bytes(LLAMA_8B, 16, "fa2") == 2 * 16 * (2 * 32 * 128 + 2 * 8 * 128)


@pytest.mark.parametrize(
    ("kv_heads", "kv", "intensity"), [(32, "F16", 1), (8, "F16", 4), (8, "FP8", 8), (1, "F16", 32)]
)
def test_decode_has_few_operations_a_byte(kv_heads, kv, intensity):
    assert decode_intensity(AttentionLayer(32, kv_heads, 128, 128), cache_format(kv)) == intensity


@pytest.mark.parametrize(
    ("hardware", "kernel"),
    [("A100", "fa2"), ("H200", "fa3"), ("B200", "fa4"), ("GB10", "fa2"), ("RTX 5090", "fa2"), ("T4", "fa1")],
)
def test_the_best_kernel_is_the_hardwares(hardware, kernel):
    assert choose_kernel("auto", find_device(hardware).architecture) == kernel


@pytest.mark.parametrize(("hardware", "asked"), [("GB10", "fa3"), ("A100", "fa3"), ("H100", "fa4"), ("GB10", "fa4")])
def test_a_kernel_that_does_not_run_there_is_refused(hardware, asked):
    with pytest.raises(ConvertError, match="the best there is"):
        choose_kernel(asked, find_device(hardware).architecture)
    assert choose_kernel("fa2", find_device(hardware).architecture) == "fa2"
