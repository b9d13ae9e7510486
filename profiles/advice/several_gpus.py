"""Several GPUs of one kind: how runtimes split a model over them, and what a split leaves room for.

vLLM cuts every matrix, and keys and values by their heads (tensor parallel): the GPUs compute a step together.
llama.cpp gives each some layers (its split mode "layer"): memory adds up, and for one text they work in turn, so that
no step is faster than on one of them. None of this is measured here: speeds are stated as a class, from what one GPU
would reach to what an ideal split would.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from bitwright.profiles.advice.cache import Cache
from bitwright.profiles.advice.hardware import Device
from bitwright.profiles.advice.roofline import PromptTime, StepTime


def all_together(device: Device, gpus: int) -> Device:
    """An ideal device of so many: their memory, bandwidth and rates added up."""
    rates: Mapping[str, float] = {name: gpus * rate for name, rate in device.rates.items()}
    usable = None if device.usable is None else gpus * device.usable
    return replace(device, memory=gpus * device.memory, usable=usable, bandwidth=gpus * device.bandwidth, rates=rates)


def heads_refusal(cache: Cache, gpus: int) -> str | None:
    """Why vLLM cannot cut the heads of this attention into so many parts; None where it can."""
    for layer in cache.layers:
        if layer.heads % gpus:
            return f"vLLM cuts attention by its heads, and {gpus} GPUs do not divide {layer.heads}"
        if layer.kv_heads % gpus and gpus % layer.kv_heads:
            return f"vLLM cuts keys and values by their heads, and {layer.kv_heads} do not go with {gpus} GPUs"
    return None


def repeated(cache: Cache, gpus: int) -> Cache:
    """The cache of all GPUs together in vLLM: where there are fewer heads of keys and values than GPUs, each has one,
    and a latent is kept by all."""
    return replace(cache, layers=tuple(replace(layer, kv_heads=max(layer.kv_heads, gpus)) for layer in cache.layers))


@dataclass(frozen=True)
class LayerSplit:
    """A file that llama.cpp spreads over GPUs by layers, the output counting as one more. layers: of the model;
    in_layers: bytes of their tensors; outside: of all else."""

    layers: int
    in_layers: int
    outside: int

    def room(self, budget: int, gpus: int) -> int:
        """Bytes that are left for keys and values, where each GPU has `budget` bytes: the fullest one decides, with as
        many layers as any, or one less and the output. Negative where not even the weights fit."""
        most = -(-(self.layers + 1) // gpus)
        of_layers = budget * self.layers // most
        if most > 1:
            of_layers = min(of_layers, (budget - self.outside) * self.layers // (most - 1))
        elif self.outside > budget:
            return budget - self.outside
        return of_layers - self.in_layers


def class_of_step(alone: StepTime, together: StepTime) -> StepTime:
    """From the speed of one GPU to that of an ideal split."""
    return replace(together, low=min(alone.low, together.low), is_class=True)


def class_of_prompt(alone: PromptTime, together: PromptTime) -> PromptTime:
    return replace(together, low=min(alone.low, together.low))
