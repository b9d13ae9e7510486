"""What a step of a model costs beside its weights, from the keys that llama.cpp reads: its attention, layer by layer,
the states of its other layers, its experts, its context."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitwright.converter.model.gguf_map import architectures_of_gguf
from bitwright.profiles.advice.cache import AttentionLayer, Cache
from bitwright.profiles.advice.operators import Experts
from bitwright.profiles.vocabulary import ModelMap

# llama.cpp has these in its code, and not in a key: the attention of chunks that Llama 4 has in all but every fourth
# layer, and the period of windows in a file that does not state it.
_LLAMA4, _CHUNK, _CHUNK_PERIOD = "llama4", 8192, 4
_FLOAT = 4  # bytes of a number of a state
# Architectures whose attention sees the whole text, without a key that says so.
_SEE_ALL = ("gemma-embedding",)


@dataclass(frozen=True)
class ModelShape:
    """layers: all, also those without attention. context: the longest that the model was made for, None where it does
    not say. generates: it writes text, token by token."""

    layers: int
    cache: Cache
    experts: Experts
    context: int | None
    generates: bool


def model_shape(model_map: ModelMap) -> ModelShape:
    """Of a map that has the keys of a GGUF: of any GGUF, and of a checkpoint whose architecture has a data file."""
    keys = _Keys(model_map.architecture, {key: value.value for key, value in model_map.metadata.items()})
    n_layers = keys.number("block_count", model_map.n_layers) - keys.number("nextn_predict_layers", 0)
    is_causal = keys.value("attention.causal", True) is not False and keys.architecture not in _SEE_ALL
    layers = [_attention(keys, layer, n_layers) for layer in range(n_layers)] if is_causal else []
    state = sum(_state_numbers(keys, layer) for layer in range(n_layers)) if is_causal else 0
    experts = Experts(keys.number("expert_count", 0), keys.number("expert_used_count", 0))
    return ModelShape(
        n_layers,
        Cache(tuple(layer for layer in layers if layer is not None), _FLOAT * state),
        experts,
        keys.value("context_length", None),
        model_map.predicts_tokens,
    )


@dataclass(frozen=True)
class _Keys:
    """The keys of an architecture, without its name."""

    architecture: str
    values: Mapping[str, Any]

    def value(self, key: str, default: Any) -> Any:
        return self.values.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: int) -> int:
        return int(self.value(key, default))

    def of_layer(self, key: str, layer: int, default: int) -> int:
        """A value that may be a list, one for each layer."""
        value = self.value(key, default)
        return int(value[layer] if isinstance(value, list) else value)


def _attention(keys: _Keys, layer: int, n_layers: int) -> AttentionLayer | None:
    """None of a layer that has no attention."""
    heads = keys.of_layer("attention.head_count", layer, 0)
    kv_heads = keys.of_layer("attention.head_count_kv", layer, heads)
    if not kv_heads or _is_recurrent(keys, layer):
        return None
    width = keys.number("embedding_length", 0) // max(heads, 1)
    window = keys.of_layer("attention.sliding_window", layer, 0)
    windowed = bool(window) and _is_windowed(keys, layer)
    if keys.architecture == _LLAMA4:
        window, windowed = _CHUNK, (layer + 1) % _CHUNK_PERIOD != 0
    suffix = "_swa" if windowed and keys.value("attention.key_length_swa", None) is not None else ""
    key = keys.number(f"attention.key_length{suffix}", width)
    value = keys.number(f"attention.value_length{suffix}", width)
    latent = keys.number("attention.key_length_mla", 0) > 0
    if latent:  # the products are with the latent itself, which stands for the values of all heads
        value = keys.number("attention.kv_lora_rank", value)
    shared = layer >= n_layers - keys.number("attention.shared_kv_layers", 0)
    return AttentionLayer(heads, kv_heads, key, value, window if windowed else 0, latent, shared)


def _is_windowed(keys: _Keys, layer: int) -> bool:
    pattern = keys.value("attention.sliding_window_pattern", None)
    if isinstance(pattern, list):
        return bool(pattern[layer])
    known = architectures_of_gguf(keys.architecture)
    period = known[0].window_period if known else 0
    return (layer + 1) % period != 0 if period else True


def _is_recurrent(keys: _Keys, layer: int) -> bool:
    """Whether the layer has a recurrence in the place of its attention."""
    interval = keys.value("full_attention_interval", None)
    return interval is not None and (layer + 1) % int(interval) != 0


def _state_numbers(keys: _Keys, layer: int) -> int:
    """Of a layer, as llama.cpp's n_embd_r and n_embd_s count them: the last inputs of its convolution, and its
    recurrence."""
    hidden = keys.number("embedding_length", 0)
    kernel, inner = keys.number("ssm.conv_kernel", 0), keys.number("ssm.inner_size", 0)
    kda, short = keys.number("kda.head_dim", 0), keys.number("shortconv.l_cache", 0)
    wkv = keys.number("wkv.head_size", 0)
    if not (kernel or short or wkv) or not _has_state(keys, layer):
        return 0
    if wkv:
        return keys.number("token_shift_count", 2) * hidden + hidden * wkv
    if short:
        return hidden * (short - 1)
    if kda:
        heads = keys.of_layer("attention.head_count", layer, 0)
        return 3 * (kernel - 1) * heads * kda + kda * kda * heads
    groups, states = keys.number("ssm.group_count", 0), keys.number("ssm.state_size", 0)
    return (kernel - 1) * (inner + 2 * groups * states) + states * inner


def _has_state(keys: _Keys, layer: int) -> bool:
    """Whether the layer has a convolution or a recurrence: all of a model without attention or with both in a layer,
    else those that have no attention, and where MLPs are layers of their own, no MLP."""
    if keys.value("full_attention_interval", None) is not None:
        return _is_recurrent(keys, layer)
    if not isinstance(keys.value("attention.head_count_kv", None), list):
        return True
    mlp = keys.value("feed_forward_length", 0)
    is_mlp = isinstance(mlp, list) and mlp[layer] > 0 and keys.architecture.startswith("nemotron_h")
    return not keys.of_layer("attention.head_count_kv", layer, 0) and not is_mlp
