"""Keys and values on their way into the cache, without touching the model's code.

An attention hands its keys, with rotary embedding and norms, and its values to the cache's `update`, and goes on with
what comes back. A stand-in for the cache therefore sees exactly what a cache holds, whatever the architecture computes
before, and decides what attention finds in it.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Protocol, runtime_checkable

import torch
from transformers import DynamicCache, PreTrainedConfig

from bitwright.calibration.choices import CacheRounding
from bitwright.calibration.stream.arithmetic import Arithmetic
from bitwright.calibration.stream.rounded_inputs import E2M1_MAX, round_e2m1, round_e4m3
from bitwright.formats.errors import ConvertError

KeysValues = tuple[torch.Tensor, torch.Tensor]
# Of (layer, keys, values), both [n_samples, n_heads, n_positions, head_size]: what stands for keys and values.
Handler = Callable[[int, torch.Tensor, torch.Tensor], KeysValues]


@runtime_checkable
class CacheObserver(Protocol):
    """An Observer that is also shown what the caches hold."""

    def observe_cache(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """keys, values: [n_samples, n_heads, n_positions, head_size]."""


class PassingCache:
    """What a layer gets in the place of its cache in a pass over whole samples: nothing is held, and keys and values
    come back as this thread's handlers leave them, in the order in which they were entered.

    The states of convolutions, of recurrences and of indexers, which no handler sees, are those of the beginning of a
    text: none.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: object, **__: object) -> KeysValues:
        for handler in self._handlers():
            keys, values = handler(layer, keys, values)
        return keys, values

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, **_: object) -> torch.Tensor:
        return conv_states

    def update_recurrent_state(self, recurrent_states: torch.Tensor, layer_idx: int, **_: object) -> torch.Tensor:
        return recurrent_states

    def update_indexer(self, keys: torch.Tensor, layer_idx: int) -> torch.Tensor:
        return keys

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    @contextmanager
    def handled_by(self, handler: Handler) -> Iterator[None]:
        """In this thread."""
        handlers = self._handlers()
        handlers.append(handler)
        try:
            yield
        finally:
            handlers.remove(handler)

    @contextmanager
    def shown_to(self, observer: object) -> Iterator[None]:
        """In this thread, where the observer is one of caches."""
        if not isinstance(observer, CacheObserver):
            yield
            return

        def show(layer: int, keys: torch.Tensor, values: torch.Tensor) -> KeysValues:
            observer.observe_cache(layer, keys, values)
            return keys, values

        with self.handled_by(show):
            yield

    def _handlers(self) -> list[Handler]:
        handlers: list[Handler] = self._local.__dict__.setdefault("handlers", [])
        return handlers


class HandledCache(DynamicCache):
    """transformers' cache for generating, which holds what the handler makes of keys and values."""

    def __init__(self, handler: Handler, config: PreTrainedConfig):
        super().__init__(config=config)
        self._handler = handler

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> KeysValues:
        keys, values = self._handler(layer_idx, key_states, value_states)
        return super().update(keys, values, layer_idx, *args, **kwargs)


# ggml's blocks of 32, and NVFP4's of 16; other formats take any size.
_BLOCKS: dict[CacheRounding, int] = {"Q8_0": 32, "Q4_0": 32, "NVFP4": 16}
# llama.cpp turns keys and values of a quantized cache by Hadamard matrices, so that no channel stands out: of keys as
# large a one as divides the head, of values one of 64. Smaller heads stay as they are.
_LEAST_ROTATION = 64


class RoundedCache:
    """The arithmetic of an artifact whose runtime keeps keys and values in a format: F16, Q8_0 and Q4_0 as llama.cpp
    does, BF16, FP8 as vLLM does (a directory's own scales where it has them, else one), and NVFP4 with a scale of FP8
    for 16 values. inner: how products are computed, None for as torch does it. key_rows: the rows of transformers' key
    projection in the order that the runtime has them in, where that is another (an interleaved rotary embedding).

    Raises ConvertError, when it first sees them, for heads that the format's blocks do not divide."""

    def __init__(self, kv: CacheRounding, inner: Arithmetic | None = None, key_rows: Sequence[int] | None = None):
        self.kv, self.inner, self.key_rows = kv, inner, key_rows

    def product(
        self, names: Sequence[str], inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        return None if self.inner is None else self.inner.product(names, inputs, weight, bias)

    def cached(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> KeysValues:
        if self.kv == "FP8" and self.inner is not None:
            scaled = self.inner.cached(layer, keys, values)
            if scaled[0] is not keys:
                return scaled
        order = list(range(keys.shape[-1])) if self.key_rows is None else list(self.key_rows[: keys.shape[-1]])
        back = sorted(range(len(order)), key=order.__getitem__)
        kept = self._kept(keys[..., order], keys.shape[-1])[..., back]
        return kept, self._kept(values, _LEAST_ROTATION)

    def _kept(self, states: torch.Tensor, rotation: int) -> torch.Tensor:
        """states [..., head_size]; rotation: the largest matrix that turns them."""
        size, block = states.shape[-1], _BLOCKS.get(self.kv, 1)
        if size % block:
            raise ConvertError(
                f"heads of {size} numbers are no multiple of {self.kv}'s block of {block}",
                f"--kv {self.kv}",
                "runtimes keep such keys and values in 16 bits",
            )
        exact = states.float()
        if self.kv not in ("Q8_0", "Q4_0"):
            return _ROUNDINGS[self.kv](exact).to(states.dtype)
        turn = _rotation(size, min(rotation, size))
        if turn is None:
            return _ROUNDINGS[self.kv](exact).to(states.dtype)
        turn = turn.to(states.device)
        turned = _in_blocks(exact, len(turn)) @ turn
        rounded = _ROUNDINGS[self.kv](turned.reshape(exact.shape))
        return (_in_blocks(rounded, len(turn)) @ turn.T).reshape(exact.shape).to(states.dtype)


def _in_blocks(states: torch.Tensor, size: int) -> torch.Tensor:
    """states [..., n], cut into [..., n // size, size]."""
    return states.reshape(*states.shape[:-1], -1, size)


@cache
def _rotation(size: int, largest: int) -> torch.Tensor | None:
    """The Hadamard matrix of the largest power of two, at most `largest`, that divides a head; None below 64."""
    order = _LEAST_ROTATION
    if size % order:
        return None
    while order * 2 <= largest and size % (order * 2) == 0:
        order *= 2
    matrix: torch.Tensor = torch.ones(1, 1)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.div(order**0.5)


def _round_q8_0(states: torch.Tensor) -> torch.Tensor:
    """As ggml's quantize_row_q8_0: a float16 scale for 32 numbers, whose largest is 127."""
    blocks = _in_blocks(states, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    return (torch.round(blocks * inverse) * scale.half().float()).reshape(states.shape)


def _round_q4_0(states: torch.Tensor) -> torch.Tensor:
    """As ggml's quantize_row_q4_0: a float16 scale of either sign for 32 numbers, whose largest is -8."""
    blocks = _in_blocks(states, 32)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = largest / -8
    inverse = torch.where(scale != 0, 1 / scale, torch.zeros_like(scale))
    codes = torch.floor(blocks * inverse + 8.5).clamp(0, 15)
    return ((codes - 8) * scale.half().float()).reshape(states.shape)


def _round_nvfp4(states: torch.Tensor) -> torch.Tensor:
    """E2M1 with a scale of E4M3 for 16 numbers."""
    blocks = _in_blocks(states, 16)
    scale = round_e4m3(blocks.abs().amax(-1, keepdim=True) / E2M1_MAX)
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    return (round_e2m1(blocks * inverse) * scale).reshape(states.shape)


_ROUNDINGS: dict[CacheRounding, Callable[[torch.Tensor], torch.Tensor]] = {
    "F16": lambda states: states.half().float(),
    "BF16": lambda states: states.bfloat16().float(),
    "Q8_0": _round_q8_0,
    "Q4_0": _round_q4_0,
    "FP8": round_e4m3,
    "NVFP4": _round_nvfp4,
}
