"""The products and caches of the layer of a directory that was encoded last, as a runtime computes them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bitwright.converter.directory.products import SchemeProducts
from bitwright.converter.directory.sequence.stored import tensors_of
from bitwright.formats.bfloat16 import bfloat16
from bitwright.formats.schemes.registry import Scheme
from bitwright.formats.schemes.scheme import Tensors
from bitwright.profiles.planning.plan_modules import ModulePlan, PlannedModule

if TYPE_CHECKING:
    import torch


class LayerProducts:
    """See sequence.layers.LayerArithmetic. cache_scales: name -> bits uint16 [1] of every scale of a cache."""

    def __init__(self, plan: ModulePlan, cache_scales: Mapping[str, np.ndarray]):
        self._modules = {row.tensor.name: row for row in plan.tensors}
        self._cache_scales = cache_scales
        self._products: SchemeProducts | None = None

    def take_over(self, data: Mapping[str, np.ndarray]) -> None:
        """As LayerArithmetic.take_over."""
        modules = [self._modules[name] for name in data]
        self._products = SchemeProducts(_EncodedModules(modules, data, self._cache_scales))

    def product(
        self, names: Sequence[str], inputs: "torch.Tensor", weight: "torch.Tensor", bias: "torch.Tensor | None"
    ) -> "torch.Tensor | None":
        return None if self._products is None else self._products.product(names, inputs, weight, bias)

    def cached(self, layer: int, keys: "torch.Tensor", values: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        return (keys, values) if self._products is None else self._products.cached(layer, keys, values)


def rounds_values(plan: ModulePlan) -> bool:
    """Whether a runtime rounds inputs of matrices, or what goes into caches."""
    schemes = [row.scheme for row in plan.tensors]
    rounds_inputs = any(scheme is not None and scheme.activations is not None for scheme in schemes)
    return rounds_inputs or any(row.cache_scales for row in plan.tensors)


class _EncodedModules:
    """See products.EncodedMatrices."""

    def __init__(
        self, modules: Sequence[PlannedModule], data: Mapping[str, np.ndarray], cache_scales: Mapping[str, np.ndarray]
    ):
        self._modules, self._data = {row.tensor.name: row for row in modules}, data
        self._scales = {
            (row.tensor.layer, name.rpartition(".")[2]): float(bfloat16(cache_scales[name])[0])
            for row in modules
            for name in row.cache_scales
        }

    def scheme(self, name: str) -> Scheme | None:
        return self._modules[name].scheme if name in self._modules else None

    def encoded(self, name: str, scheme: Scheme) -> Tensors:
        return tensors_of(self._modules[name], scheme, self._data[name])

    def cache_scales(self) -> dict[int, tuple[float, float]]:
        layers = {layer for layer, _ in self._scales if layer is not None}
        return {layer: (self._scales[layer, "k_scale"], self._scales[layer, "v_scale"]) for layer in layers}
