"""The architectures that have a data file, and the one of a configuration."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from gguf import MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map

from bitwright.converter.architectures.data_file import read_all
from bitwright.converter.architectures.description import Architecture, TensorRule
from bitwright.converter.architectures.refusal import unsupported
from bitwright.profiles.vocabulary import TensorSpec


def known_architecture(config: Mapping[str, Any]) -> Architecture | None:
    """The architecture of this configuration, by its `model_type`; None where there is none."""
    model_type = config.get("model_type")
    named = architectures_named(model_type) if isinstance(model_type, str) else ()
    return next((found for found in named if found.describes(config)), None)


@cache
def architectures_named(model_type: str) -> tuple[Architecture, ...]:
    """Those that may have this type: to parse every file takes longer than the rest of many a command."""
    return read_all(mentions=f'"{model_type}"')


@cache
def architectures() -> tuple[Architecture, ...]:
    """All of them, by name."""
    return read_all()


def find_architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """The architecture of this configuration, by its `model_type`. Raises ConvertError for one without a data file."""
    if (architecture := known_architecture(config)) is not None:
        return architecture
    raise unsupported(config, where)


def with_scales_applied(known: Collection[Architecture], tensors: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The tensors, marked where llama.cpp applies second-level scales. known: the architectures that it runs as this
    one, whose graph is the same."""
    tensors = tuple(tensors)
    names = {tensor.name for tensor in tensors}
    always = {role for architecture in known for role in architecture.scales_applied}
    without_bias = {role for architecture in known for role in architecture.scales_applied_without_bias}

    def applied(tensor: TensorSpec) -> bool:
        biased = f"{tensor.name.removesuffix('.weight')}.bias" in names
        return tensor.role in always or (tensor.role in without_bias and not biased)

    return tuple(replace(tensor, scale_applied=True) if applied(tensor) else tensor for tensor in tensors)


def gguf_name_map(gguf_architecture: str, n_layers: int) -> TensorNameMap | None:
    """gguf's own table from the names of Hugging Face checkpoints to those of llama.cpp; None where it lacks the
    architecture."""
    found = next((arch for arch, name in MODEL_ARCH_NAMES.items() if name == gguf_architecture), None)
    return None if found is None else get_tensor_name_map(found, n_layers)


def gguf_tensors(architecture: Architecture, n_layers: int) -> Iterator[tuple[str, TensorRule, int | None]]:
    """llama.cpp's names of the tensors that a model of this architecture may have, with their rules and layers."""
    names = gguf_name_map(architecture.gguf_name, n_layers)
    for rule in (*architecture.before, *architecture.after):
        yield rule.gguf_name(names, None), rule, None
    for layer in range(n_layers):
        for rule in architecture.layer:
            yield rule.gguf_name(names, layer), rule, layer
