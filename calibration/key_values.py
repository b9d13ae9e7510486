"""Keys and values on their way into the cache, without touching the model's code.

An attention hands its keys, with rotary embedding and norms, and its values to the cache's `update`, and goes on with
what comes back. A stand-in for the cache therefore sees exactly what a cache holds, whatever the architecture computes
before, and decides what attention finds in it.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol, runtime_checkable

import torch
from transformers import DynamicCache, PreTrainedConfig

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
    come back as this thread's handlers leave them, in the order in which they were entered."""

    def __init__(self) -> None:
        self._local = threading.local()

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: object, **__: object) -> KeysValues:
        for handler in self._handlers():
            keys, values = handler(layer, keys, values)
        return keys, values

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

        def show(layer: int, keys: torch.Tensor, values: torch.Tensor) -> KeysValues:
            assert isinstance(observer, CacheObserver)
            observer.observe_cache(layer, keys, values)
            return keys, values

        with ExitStack() as stack:
            if isinstance(observer, CacheObserver):
                stack.enter_context(self.handled_by(show))
            yield

    def _handlers(self) -> list[Handler]:
        if not hasattr(self._local, "handlers"):
            self._local.handlers = []
        return self._local.handlers


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
