"""What llama.cpp allocates for keys, values and states: its own words at the making of a context."""

import os
import re
from pathlib import Path

import pytest

from bitwright.converter.advice.shape import ModelShape, model_shape
from bitwright.converter.judge import llama_cpp
from bitwright.converter.model.model_map import describe
from bitwright.converter.source.open import open_checkpoint
from bitwright.profiles.advice.cache import Cells, cache_format

TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8}
"""ggml's ids."""
_SIZES = re.compile(r"llama_(?:kv_cache|memory_recurrent): size = +([\d.]+) MiB")
_MICRO_BATCH = 64
# Of the booleans after the callbacks: whether windows keep the whole context. llama.cpp's programs say no, its library
# yes.
_SWA_FULL = 28


CONTEXT = 4096
CELLS = Cells(256, _MICRO_BATCH)


def shape_of(model: Path) -> ModelShape:
    return model_shape(describe(open_checkpoint(str(model)), with_tokenizer=False))


def check_against_llama_cpp(model: Path, gguf: Path, kv: str = "F16") -> None:
    """The bytes that we count are those that llama.cpp takes, to the digits that it prints."""
    shape = shape_of(model)
    sequences = 32 if shape.cache.state_bytes else 2  # states are small: many of them show in the second digit
    counted = shape.cache.allocated(CONTEXT, sequences, cache_format(kv), CELLS) / 2**20
    assert allocated_mib(gguf, CONTEXT, sequences, kv) == pytest.approx(counted, abs=0.016)  # each cache is rounded


class Refused(Exception):
    """llama.cpp makes no such context."""


def allocated_mib(path: Path, context: int, sequences: int, kv: str) -> float:
    """For so many texts of so many tokens; a micro-batch of 64. llama.cpp tells MiB to two digits, of each of its
    caches. Raises Refused where it makes no context."""
    lib = llama_cpp._library()
    said: list[str] = []
    log = llama_cpp._LogCallback(lambda level, message, _: said.append(message.decode(errors="replace")))
    model = lib.llama_model_load_from_file(os.fsencode(path), lib.llama_model_default_params())
    assert model, path
    params = lib.llama_context_default_params()
    assert params.tail[_SWA_FULL] == 1 and params.tail[_SWA_FULL + 1] == 0, "llama_context_params has changed"
    params.n_ctx, params.n_batch, params.n_ubatch = context * sequences, _MICRO_BATCH, _MICRO_BATCH
    params.n_seq_max, params.type_k, params.type_v = sequences, TYPES[kv], TYPES[kv]
    params.tail[_SWA_FULL] = 0
    lib.llama_log_set(log, None)
    try:
        made = lib.llama_init_from_model(model, params)
    finally:
        lib.llama_log_set(llama_cpp._log, None)
    if made:
        lib.llama_free(made)
    lib.llama_model_free(model)
    if not made:
        raise Refused("".join(said))
    return sum(map(float, _SIZES.findall("".join(said))))
