"""Sliding windows: which layers see how many tokens, as transformers reads it out of a configuration."""

from collections.abc import Collection
from typing import Any

from bitwright.converter.architectures.refusal import NotInLlamaCpp
from bitwright.converter.source.values import count, is_count, unusable
from bitwright.formats.errors import ConvertError

_FULL, _SLIDING = "full_attention", "sliding_attention"


def sliding_layers(
    values: dict[str, Any], read: Collection[str], n_layers: int, where: str
) -> tuple[int, tuple[bool, ...]]:
    """(window, whether each layer has it): a token sees so many, itself among them; (0, ...) where none has a window.

    read: the keys that the architecture's implementation goes by, of sliding_window, use_sliding_window (a switch),
    layer_types, max_window_layers (the layers before have none) and sliding_window_pattern (every so-manieth has none).
    Another key in a configuration has no effect.
    Raises ConvertError for values that transformers refuses, too.
    """
    none = 0, (False,) * n_layers
    stated = {key: values[key] for key in read if key in values}
    off = "sliding_window" not in stated or not stated.get("use_sliding_window", True)
    types = stated.get("layer_types")
    if types is not None:
        layers = _by_types(types, n_layers, where)
    elif off:
        return none
    elif "max_window_layers" in stated:
        first = stated["max_window_layers"]
        if first != 0 and not is_count(first):
            raise unusable("max_window_layers", first, "which is no number of layers", where)
        layers = tuple(layer >= first for layer in range(n_layers))
    elif "sliding_window_pattern" in stated:
        period = count(stated, "sliding_window_pattern", where)
        layers = tuple((layer + 1) % period != 0 for layer in range(n_layers))
    else:
        layers = (True,) * n_layers
    if not any(layers):
        return none
    if off:
        raise ConvertError(
            "layer_types gives layers a sliding window, and the configuration has no window",
            f"{where}: layer_types",
            "fetch config.json of the same revision again",
        )
    return count(stated, "sliding_window", where), layers


def _by_types(types: Any, n_layers: int, where: str) -> tuple[bool, ...]:
    if not isinstance(types, list) or len(types) != n_layers:
        raise unusable(
            "layer_types", types, f"which is no list of {n_layers}, one for each of num_hidden_layers", where
        )
    for kind in types:
        if kind not in (_FULL, _SLIDING):
            raise NotInLlamaCpp(
                f"layer_types has {kind!r}, and llama.cpp implements {_FULL} and {_SLIDING} only",
                f"{where}: layer_types",
                "no GGUF of this model would run correctly in llama.cpp",
            )
    return tuple(kind == _SLIDING for kind in types)
