"""Bytes of keys and values: by hand, for what llama.cpp is asked in tests/converter/advice."""

import pytest

from bitwright.formats.errors import ConvertError
from bitwright.profiles.advice.cache import (
    CACHE_FORMATS,
    LLAMA_CPP_CELLS,
    VLLM_CELLS,
    AttentionLayer,
    Cache,
    Cells,
    cache_format,
)

MIB = 1 << 20
LLAMA_8B = Cache((AttentionLayer(32, 8, 128, 128),) * 32)


@pytest.mark.parametrize(
    ("kv", "mib"), [("F16", 4096), ("BF16", 4096), ("FP8", 2048), ("NVFP4", 1152), ("Q8_0", 2176), ("Q4_0", 1152)]
)
def test_llama_8b_at_32768_tokens(kv, mib):
    assert LLAMA_8B.allocated(32768, 1, CACHE_FORMATS[kv]) == mib * MIB
    assert LLAMA_8B.read(32768, CACHE_FORMATS[kv]) == mib * MIB
    assert LLAMA_8B.token_bytes(CACHE_FORMATS[kv]) == mib * MIB // 32768


def test_a_window_keeps_what_it_sees():
    f16 = cache_format("F16")
    layer = AttentionLayer(8, 4, 64, 64, window=1024)
    row = layer.row_bytes(f16)
    cache = Cache((layer,))
    assert cache.read(512, f16) == 512 * row and cache.read(4096, f16) == 1024 * row
    assert cache.allocated(4096, 2, f16) == 2 * 1536 * row  # the window and a micro-batch of 512, in pages of 256
    assert cache.allocated(1000, 1, f16) == 1024 * row
    assert cache.allocated(4096, 1, f16, VLLM_CELLS) == 1024 * row
    assert cache.token_bytes(f16) == 0


def test_a_latent_stands_for_values_too():
    """DeepSeek-V3: 512 of the latent and 64 of rotary keys, in 61 layers: 70 KB a token in 16 bits."""
    cache = Cache((AttentionLayer(128, 1, 576, 512, latent=True),) * 61)
    assert cache.token_bytes(cache_format("F16")) == 61 * 576 * 2


def test_layers_that_share_keep_nothing_and_are_read():
    f16 = cache_format("F16")
    own, shared = AttentionLayer(8, 2, 64, 64), AttentionLayer(8, 2, 64, 64, shared=True)
    cache = Cache((own, shared))
    assert cache.allocated(256, 1, f16) == 256 * own.row_bytes(f16)
    assert cache.read(256, f16) == 2 * 256 * own.row_bytes(f16)


def test_a_state_does_not_grow():
    cache = Cache((), state_bytes=1000)
    f16 = cache_format("F16")
    assert cache.allocated(10, 3, f16) == cache.allocated(1 << 20, 3, f16) == 3000
    assert cache.read(10, f16) == 2000, "it is written back"


@pytest.mark.parametrize("cells", [LLAMA_CPP_CELLS, VLLM_CELLS, Cells(1, 0)])
def test_the_longest_context_fits_and_the_next_does_not(cells):
    f16 = cache_format("F16")
    room = LLAMA_8B.allocated(5000, 2, f16, cells)
    longest = LLAMA_8B.longest(room, 2, f16, cells, 1 << 20)
    assert LLAMA_8B.allocated(longest, 2, f16, cells) <= room < LLAMA_8B.allocated(longest + 1, 2, f16, cells)
    assert LLAMA_8B.longest(room, 2, f16, cells, 3000) == 3000
    assert LLAMA_8B.longest(0, 2, f16, cells, 3000) == 0


def test_an_unknown_format_is_refused():
    with pytest.raises(ConvertError, match="Q8_0"):
        cache_format("Q8")
