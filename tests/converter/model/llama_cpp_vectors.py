"""What llama.cpp computes of a model without a head: the vector of every token."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bitwright.converter.judge import llama_cpp
from bitwright.converter.judge.llama_cpp import LlamaCpp

_POOLING_NONE = 0


def token_vectors(path: Path, tokens: Sequence[int], n_columns: int) -> np.ndarray:
    """float32 [n_tokens, n_columns]: the last layer's output, as it is before any pooling."""
    library = llama_cpp._library()
    library.llama_set_embeddings.argtypes = (ctypes.c_void_p, ctypes.c_bool)
    library.llama_get_embeddings.argtypes = (ctypes.c_void_p,)
    library.llama_get_embeddings.restype = ctypes.POINTER(ctypes.c_float)
    with _Unpooled(path, n_ctx=256, n_threads=1) as model:
        library.llama_set_embeddings(model._context, True)
        model.logits(tokens)
        vectors = library.llama_get_embeddings(model._context)
        return np.ctypeslib.as_array(vectors, (len(tokens), n_columns)).copy()


class _Unpooled(LlamaCpp):
    """A model whose context does not pool, whatever its file says."""

    def _new_context(self, n_threads: int) -> int:
        defaults = self._lib.llama_context_default_params

        def unpooled() -> object:
            params = defaults()
            params.pooling_type = _POOLING_NONE
            return params

        self._lib.llama_context_default_params = unpooled
        try:
            return super()._new_context(n_threads)
        finally:
            self._lib.llama_context_default_params = defaults
