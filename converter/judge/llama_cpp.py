"""llama.cpp itself, through its C API: the shared object of the optional `xllamacpp` wheel exports it.

The true runtime of a GGUF: the coherence guard generates with it, tests and benchmarks hold artifacts against it.
Whatever llama.cpp cannot recover from ends its process, so a conversion runs it in one of its own (judge.child).

    with LlamaCpp(path) as model:
        tokens = model.tokenize("Once upon a time")
        logits = model.logits(tokens)          # float32 [n_tokens, n_vocab]
        text = model.detokenize(model.generate(tokens, 40))
"""

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol, TypeVar

import numpy as np

Item = TypeVar("Item")
Result = TypeVar("Result")

_N_CTX_DEFAULT, _N_BATCH_DEFAULT, _N_UBATCH_DEFAULT = 512, 2048, 512
_N_CTX_STEP = 256  # llama.cpp's contexts are of a multiple of so many tokens a sequence
_F32, _F16 = 0, 1
_FLASH_ATTENTION_AUTO, _FLASH_ATTENTION_OFF = -1, 0
_LOG_ERROR = 4

_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class _ModelParams(ctypes.Structure):
    """llama_model_params as far as it is used. The tail is longer than any build's: the callee writes and reads its own
    size of it."""

    _fields_ = (
        ("pointers_and_numbers", ctypes.c_uint8 * 72),
        ("vocab_only", ctypes.c_bool),
        ("tail", ctypes.c_uint8 * 183),
    )


class _ContextParams(ctypes.Structure):
    """llama_context_params, in the order of include/llama.h."""

    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("n_rs_seq", ctypes.c_uint32),
        ("n_outputs_max", ctypes.c_uint32),
        ("experimental", ctypes.c_uint32),
        ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32),
        ("ctx_type", ctypes.c_int32),
        ("rope_scaling_type", ctypes.c_int32),
        ("pooling_type", ctypes.c_int32),
        ("attention_type", ctypes.c_int32),
        ("flash_attn_type", ctypes.c_int32),
        ("rope_and_yarn", ctypes.c_float * 8),
        ("cb_eval", ctypes.c_void_p),
        ("cb_eval_user_data", ctypes.c_void_p),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("tail", ctypes.c_uint8 * 144),
    )


class _Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class LlamaCpp:
    """A GGUF loaded by llama.cpp on the CPU; attention caches in float32, so that nothing but the file is rounded."""

    def __init__(self, path: Path | str, *, n_ctx: int = 512, n_threads: int | None = None, vocab_only: bool = False):
        self._lib = _library()
        params = self._lib.llama_model_default_params()
        params.vocab_only = vocab_only
        self._model = self._lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {path}: {_take_errors()}")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.n_vocab: int = self._lib.llama_vocab_n_tokens(self._vocab)
        self.n_ctx = n_ctx
        self._owner = True
        self._context = None if vocab_only else self._new_context(n_threads or os.cpu_count() or 1)

    def sibling(self, n_threads: int = 1, n_sequences: int = 1) -> "LlamaCpp":
        """The same model with another context, for another thread or so many sequences side by side; to be closed
        before this one."""
        other = copy(self)
        other._context, other._owner = self._new_context(n_threads, n_sequences), False
        return other

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        if self._model and self._owner:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """add_special: put the beginning-of-sequence token where the model wants it. parse_special: read special
        tokens' names in the text as those tokens."""
        raw = text.encode()
        buffer = (ctypes.c_int32 * (len(raw) + 8))()
        n = self._lib.llama_tokenize(self._vocab, raw, len(raw), buffer, len(buffer), add_special, parse_special)
        if n < 0:
            raise ValueError(f"llama_tokenize returned {n}")
        return list(buffer[:n])

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text, special tokens included."""
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        size = 256 * len(tokens) + 1
        buffer = ctypes.create_string_buffer(size)
        n = self._lib.llama_detokenize(self._vocab, ids, len(tokens), buffer, size, False, True)
        if n < 0:
            raise ValueError(f"llama_detokenize returned {n}")
        return buffer.raw[:n].decode(errors="replace")

    def logits(self, tokens: Sequence[int], n_last: int | None = None) -> np.ndarray:
        """float32 [n, n_vocab]: the logits after each of the tokens, which start an empty context, or after the last
        n_last of them."""
        self._clear()
        return self._decode([_Fed(0, 0, tokens, len(tokens) if n_last is None else n_last)])

    def generate(
        self, tokens: Sequence[int], n_tokens: int, seen: Callable[[np.ndarray], bool] | None = None
    ) -> list[int]:
        """Up to n_tokens that follow, each the most probable one; ends before an end-of-generation token.

        seen: is shown the logits [n_vocab] of every step, the last one's too; False from it ends the generation there.
        """
        self._clear()
        generated: list[int] = []
        pending, position = list(tokens), 0
        while len(generated) < n_tokens:
            logits = self._decode([_Fed(0, position, pending)])[-1]
            token = int(logits.argmax())
            if (seen is not None and not seen(logits)) or token in self.end_tokens:
                break
            position += len(pending)
            generated.append(token)
            pending = [token]
        return generated

    def generate_together(
        self,
        prompts: Sequence[Sequence[int]],
        n_tokens: int,
        seen: Callable[[int, np.ndarray], bool],
        begin_step: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Continue all prompts side by side, each in a sequence of its own, by up to n_tokens, each the most probable
        one: every step is one product with the weights for all of them.

        seen: is shown a prompt's index and the logits [n_vocab] of every step of it; False from it ends that prompt.
        begin_step: is told the number of a step before it begins.
        """
        self._clear()
        fed = [_Fed(i, 0, prompt) for i, prompt in enumerate(prompts)]
        for step in range(n_tokens):
            if not fed:
                return
            begin_step(step)
            logits = zip(fed, self._decode(fed), strict=True)
            fed = [of.followed_by(int(row.argmax())) for of, row in logits if seen(of.sequence, row)]

    def cache_bytes(self) -> int:
        """Memory of the attention caches of one sequence, about: what a head's width is said to be, some models
        exceed."""
        lib, model = self._lib, self._model
        heads, heads_kv = max(1, lib.llama_model_n_head(model)), lib.llama_model_n_head_kv(model)
        width: int = lib.llama_model_n_embd(model) * max(1, heads_kv) // heads
        layers: int = lib.llama_model_n_layer(model)
        return 2 * 4 * width * layers * -(-self.n_ctx // _N_CTX_STEP) * _N_CTX_STEP

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a generation."""
        return frozenset(i for i in range(self.n_vocab) if self._lib.llama_vocab_is_eog(self._vocab, i))

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _decode(self, fed: "Sequence[_Fed]") -> np.ndarray:
        """float32 [n, n_vocab]: the outputs that were asked for, in the order of what is fed."""
        n, n_outputs = sum(len(of.tokens) for of in fed), sum(of.n_outputs for of in fed)
        batch = self._lib.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        rows = iter(range(n))
        for of in fed:
            if of.stop > self.n_ctx:
                raise ValueError(f"{of.stop} tokens do not fit into the context of {self.n_ctx}")
            for position, token in enumerate(of.tokens, of.start):
                i = next(rows)
                batch.token[i], batch.pos[i] = token, position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, of.sequence
                batch.logits[i] = position >= of.stop - of.n_outputs
        status = self._lib.llama_decode(self._context, batch)
        self._lib.llama_batch_free(batch)
        if status != 0:
            raise ValueError(f"llama_decode returned {status}: {_take_errors()}")
        raw = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(raw, (n_outputs, self.n_vocab)).copy()

    def _new_context(self, n_threads: int, n_sequences: int = 1) -> int:
        params = self._lib.llama_context_default_params()
        params.n_ctx = params.n_batch = self.n_ctx * n_sequences
        params.n_seq_max = n_sequences
        params.n_threads = params.n_threads_batch = n_threads
        params.type_k = params.type_v = _F32
        params.flash_attn_type = _FLASH_ATTENTION_OFF
        context: int | None = self._lib.llama_init_from_model(self._model, params)
        if not context:
            raise ValueError(f"llama.cpp cannot make a context: {_take_errors()}")
        return context


@dataclass(frozen=True)
class _Fed:
    """Tokens that a sequence is fed from position `start` on; the logits after the last n_outputs of them are asked
    for."""

    sequence: int
    start: int
    tokens: Sequence[int]
    n_outputs: int = 1

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)

    def followed_by(self, token: int) -> "_Fed":
        return _Fed(self.sequence, self.stop, [token])


class RunEach(Protocol):
    """What `workers` gives: work(context, item) for each item, in order."""

    def __call__(self, work: Callable[[LlamaCpp, Item], Result], items: Iterable[Item], /) -> Iterator[Result]: ...


@contextmanager
def workers(model: LlamaCpp, n_threads: int) -> Iterator[RunEach]:
    """Threads that share the model. Each takes whole items, with a context of its own that computes on one core: the
    results do not depend on the number of threads."""
    free: SimpleQueue[LlamaCpp] = SimpleQueue()
    with ExitStack() as stack, ThreadPoolExecutor(n_threads) as pool:
        for _ in range(n_threads):
            free.put(stack.enter_context(model.sibling()))

        def run_each(work: Callable[[LlamaCpp, Item], Result], items: Iterable[Item]) -> Iterator[Result]:
            def one(item: Item) -> Result:
                context = free.get()
                try:
                    return work(context, item)
                finally:
                    free.put(context)

            return pool.map(one, items)

        yield run_each


_errors: list[str] = []


def _take_errors() -> str:
    text = "".join(_errors).strip() or "no message"
    _errors.clear()
    return text


def _remember_error(level: int, message: bytes, _: object) -> None:
    if level >= _LOG_ERROR:
        _errors.append(message.decode(errors="replace"))


_log = _LogCallback(_remember_error)


def installed() -> bool:
    """Whether the package that brings llama.cpp is there."""
    return find_spec("xllamacpp") is not None


def version_text() -> str:
    """Which llama.cpp it is, for people."""
    return f"llama.cpp (xllamacpp {version('xllamacpp')})"


def patience(artifact: Path, n_tokens: int) -> float:
    """Seconds after which a run of so many tokens has surely got stuck: loading takes a while, and the slowest machine
    goes through a tenth of a gigabyte of weights a second."""
    return 120 + n_tokens * max(1.0, artifact.stat().st_size / 1e8)


@cache
def shared_object() -> ctypes.CDLL:
    """llama.cpp and ggml as the wheel has them, no function declared yet. Raises ImportError when it is not there."""
    spec = find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise ImportError("llama.cpp comes with the package xllamacpp: pip install 'bitwright[llama-cpp]'")
    (path,) = Path(spec.origin).parent.glob("xllamacpp*.so")
    return ctypes.CDLL(str(path))


@cache
def _library() -> ctypes.CDLL:
    """The shared object, its functions declared, its log silenced (errors are kept for the exceptions)."""
    lib = shared_object()
    pointer, text, number, flag = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_bool
    tokens = ctypes.POINTER(ctypes.c_int32)
    for name, result, arguments in (
        ("llama_backend_init", None, ()),
        ("llama_log_set", None, (_LogCallback, pointer)),
        ("llama_model_default_params", _ModelParams, ()),
        ("llama_context_default_params", _ContextParams, ()),
        ("llama_model_load_from_file", pointer, (text, _ModelParams)),
        ("llama_model_free", None, (pointer,)),
        ("llama_init_from_model", pointer, (pointer, _ContextParams)),
        ("llama_free", None, (pointer,)),
        ("llama_model_get_vocab", pointer, (pointer,)),
        ("llama_model_n_embd", number, (pointer,)),
        ("llama_model_n_layer", number, (pointer,)),
        ("llama_model_n_head", number, (pointer,)),
        ("llama_model_n_head_kv", number, (pointer,)),
        ("llama_vocab_n_tokens", number, (pointer,)),
        ("llama_vocab_is_eog", flag, (pointer, number)),
        ("llama_tokenize", number, (pointer, text, number, tokens, number, flag, flag)),
        ("llama_detokenize", number, (pointer, tokens, number, text, number, flag, flag)),
        ("llama_batch_init", _Batch, (number, number, number)),
        ("llama_batch_free", None, (_Batch,)),
        ("llama_decode", number, (pointer, _Batch)),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), (pointer,)),
        ("llama_get_memory", pointer, (pointer,)),
        ("llama_memory_clear", None, (pointer, flag)),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set(_log, None)
    lib.llama_backend_init()
    _check_layout(lib)
    return lib


def _check_layout(lib: ctypes.CDLL) -> None:
    """llama.cpp's structs change between builds; its defaults tell whether the fields still lie where they are set."""
    params = lib.llama_context_default_params()
    sizes = (params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max, params.n_threads_batch)
    expected = (_N_CTX_DEFAULT, _N_BATCH_DEFAULT, _N_UBATCH_DEFAULT, 1, params.n_threads)
    types = (params.type_k, params.type_v, params.flash_attn_type, params.rope_scaling_type)
    if sizes != expected or types != (_F16, _F16, _FLASH_ATTENTION_AUTO, -1) or not 0 < params.n_threads < 1024:
        raise ImportError(
            "this build of xllamacpp has another llama_context_params: adapt converter/judge/llama_cpp.py"
        )
