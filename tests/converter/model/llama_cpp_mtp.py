"""What llama.cpp computes with the layer that predicts several tokens (MTP), as its drafting does: in a context of its
own, which takes the next token and the model's last hidden state together."""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.converter.judge import llama_cpp
from bitwright.converter.judge.llama_cpp import LlamaCpp

_CONTEXT_TYPE_MTP = 1
# Of llama_model_params, counted from what follows `vocab_only`: load_mtp.
_LOAD_MTP = 4
# llama-ext.h declares it for C++.
_SET_EMBEDDINGS_NEXTN = "_Z26llama_set_embeddings_nextnP13llama_contextbb"


def drafted_logits(path: Path, tokens: Sequence[int], hidden: np.ndarray) -> np.ndarray:
    """float32 [n_tokens, n_vocab]. hidden: float32 [n_tokens, n_columns], the output of the model's last norm at the
    token before each."""
    library = llama_cpp._library()
    switch_on = getattr(library, _SET_EMBEDDINGS_NEXTN)
    switch_on.argtypes, switch_on.restype = (ctypes.c_void_p, ctypes.c_bool, ctypes.c_bool), None
    n, n_columns = hidden.shape
    hidden = np.ascontiguousarray(hidden, np.float32)
    with (
        _defaults(library, "llama_model_default_params", _loads_mtp),
        _defaults(library, "llama_context_default_params", _runs_mtp),
        LlamaCpp(path, n_ctx=256, n_threads=1) as model,
    ):
        switch_on(model._context, True, True)
        batch = library.llama_batch_init(n, n_columns, 1)
        ids = (ctypes.c_int32 * n)(*tokens)
        batch.n_tokens, batch.token = n, ctypes.cast(ids, ctypes.POINTER(ctypes.c_int32))
        ctypes.memmove(batch.embd, hidden.ctypes.data, hidden.nbytes)
        for i in range(n):
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = i, 1, 0, True
        status = library.llama_decode(model._context, batch)
        batch.token = None  # ours, and llama.cpp has allocated none beside the hidden states
        library.llama_batch_free(batch)
        assert status == 0
        return np.ctypeslib.as_array(library.llama_get_logits(model._context), (n, model.n_vocab)).copy()


def _loads_mtp(params: Any) -> None:
    params.tail[_LOAD_MTP] = True


def _runs_mtp(params: Any) -> None:
    params.ctx_type = _CONTEXT_TYPE_MTP


@contextmanager
def _defaults(library: ctypes.CDLL, name: str, change: Callable[[Any], None]) -> Iterator[None]:
    """The library's default parameters, changed."""
    function = getattr(library, name)

    def changed() -> Any:
        params = function()
        change(params)
        return params

    setattr(library, name, changed)
    try:
        yield
    finally:
        setattr(library, name, function)
