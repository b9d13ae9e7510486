"""Products of a safetensors directory, computed as the schemes define: INT8 by integers, FP8 and FP4 with rounded
inputs; and its caches, as their scales round keys and values."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Protocol

import numpy as np

from bitwright.converter.artifact.candidate import Candidate
from bitwright.converter.directory.artifact import DirectoryArtifact
from bitwright.formats.bfloat16 import bfloat16
from bitwright.formats.kernels.int8_matmul import int8_linear, quantize, quantize_per_token
from bitwright.formats.schemes.cache_scheme import CACHE_SCHEMES
from bitwright.formats.schemes.registry import Scheme
from bitwright.formats.schemes.scheme import ActivationScheme, Tensors

if TYPE_CHECKING:
    import torch

    from bitwright.calibration.stream.device.int8_products import Int8Matrix

# Of encoded matrices that are held beside the layer that uses them.
_HELD_BYTES = 1 << 29


@dataclass(frozen=True)
class _Integers:
    """Weights of an INT8 scheme: int8 [n_rows, n_columns], with the scales float32 [n_rows] of the rows. there: the
    same on the GPUs that have asked for it."""

    weights: np.ndarray
    row_scales: np.ndarray
    there: "dict[torch.device, Int8Matrix]" = field(default_factory=dict)


@dataclass(frozen=True)
class _Matrix:
    """inputs: the stored scale of the input (of NVFP4 the divisor), None where it is measured; zero_point: None where
    symmetric. integers: None for weights that are no integers."""

    activations: ActivationScheme
    inputs: float | None
    zero_point: int | None = None
    integers: _Integers | None = None

    @property
    def n_bytes(self) -> int:
        return 0 if self.integers is None else self.integers.weights.nbytes


class EncodedMatrices(Protocol):
    """What is stored of a directory's matrices and caches; a DirectoryArtifact has it."""

    def scheme(self, name: str) -> Scheme | None:
        """None for a matrix that is kept."""

    def encoded(self, name: str, scheme: Scheme) -> Tensors:
        """By suffix everything that is stored of a matrix in this scheme."""

    def cache_scales(self) -> dict[int, tuple[float, float]]:
        """Layer -> the scales of its keys and of its values; empty where caches stay in 16 bits."""


class SchemeProducts:
    """The arithmetic of a directory, see calibration.stream.arithmetic.Arithmetic."""

    def __init__(self, artifact: EncodedMatrices):
        self.artifact = artifact
        self._held: OrderedDict[tuple[str, ...], _Matrix | None] = OrderedDict()
        self._lock = Lock()
        self._cache_scales = artifact.cache_scales()

    def product(
        self, names: Sequence[str], inputs: "torch.Tensor", weight: "torch.Tensor", bias: "torch.Tensor | None"
    ) -> "torch.Tensor | None":
        import torch

        from bitwright.calibration.stream.rounded_inputs import rounded

        matrix = self._matrix(tuple(names))
        if matrix is None:
            return None
        if matrix.integers is not None:
            rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
            if rows.device.type == "cpu":
                values = rows.contiguous().numpy()
                products = torch.from_numpy(_integer_product(values, matrix, matrix.integers))
            else:
                with self._lock:
                    there = _there(matrix.integers, rows.device)
                products = _integer_product_there(rows, matrix, there)
            if bias is not None:
                products += bias
            return products.reshape(*inputs.shape[:-1], -1).to(inputs.dtype)
        stored = None if matrix.inputs is None else torch.tensor([matrix.inputs], device=inputs.device)
        rounded_inputs = rounded(inputs.float(), matrix.activations, stored).to(inputs.dtype)
        return torch.nn.functional.linear(rounded_inputs, weight, bias)

    def cached(self, layer: int, keys: "torch.Tensor", values: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        import torch

        from bitwright.calibration.stream.rounded_inputs import rounded

        if layer not in self._cache_scales:
            return keys, values

        def kept(states: torch.Tensor, scale: float) -> torch.Tensor:
            stored = torch.tensor([scale], device=states.device)
            return rounded(states.float(), CACHE_SCHEMES["FP8"], stored).to(states.dtype)

        of_keys, of_values = self._cache_scales[layer]
        return kept(keys, of_keys), kept(values, of_values)

    def _matrix(self, names: tuple[str, ...]) -> _Matrix | None:
        with self._lock:
            if names not in self._held:
                self._held[names] = self._load(names)
                while len(self._held) > 1 and sum(m.n_bytes for m in self._held.values() if m) > _HELD_BYTES:
                    self._held.popitem(last=False)
            self._held.move_to_end(names)
            return self._held[names]

    def _load(self, names: tuple[str, ...]) -> _Matrix | None:
        scheme = self.artifact.scheme(names[0])
        if scheme is None or scheme.activations is None:
            return None
        parts = [self.artifact.encoded(name, scheme) for name in names]
        inputs, zero_point = _stored_input(scheme, parts[0])
        if scheme.activations.type != "int":
            return _Matrix(scheme.activations, inputs)
        weights = np.concatenate([part["weight"] for part in parts])
        scales = np.concatenate([bfloat16(part["weight_scale"]).reshape(-1) for part in parts])
        return _Matrix(scheme.activations, inputs, zero_point, _Integers(weights, scales))


def _stored_input(scheme: Scheme, tensors: Tensors) -> tuple[float | None, int | None]:
    """The scale (of NVFP4 the divisor) and the zero point that are stored of a matrix's input."""
    if "input_global_scale" in tensors:
        return float(tensors["input_global_scale"][0]), None
    if "input_scale" not in tensors:
        return None, None
    zero_point = int(tensors["input_zero_point"][0]) if "input_zero_point" in tensors else None
    return float(bfloat16(tensors["input_scale"])[0]), zero_point


def _integer_product(rows: np.ndarray, matrix: _Matrix, integers: _Integers) -> np.ndarray:
    """float32 [n, n_rows] of rows float32 [n, n_columns]: exact integers, then the scales of token and channel."""
    if matrix.inputs is None:
        values = quantize_per_token(rows, matrix.activations.symmetric)
    else:
        zero_point = None if matrix.zero_point is None else np.array(matrix.zero_point, np.int32)
        values = quantize(rows, np.array(matrix.inputs, np.float32), zero_point)
    return int8_linear(values, integers.weights, integers.row_scales)


def _there(integers: _Integers, device: "torch.device") -> "Int8Matrix":
    from bitwright.calibration.stream.device.int8_products import Int8Matrix

    if device not in integers.there:
        integers.there[device] = Int8Matrix.on(device, integers.weights, integers.row_scales)
    return integers.there[device]


def _integer_product_there(rows: "torch.Tensor", matrix: _Matrix, integers: "Int8Matrix") -> "torch.Tensor":
    """The same on a GPU."""
    import torch

    from bitwright.calibration.stream.device import int8_products

    if matrix.inputs is None:
        values = int8_products.quantize_per_token(rows, matrix.activations.symmetric)
    else:
        scale = torch.tensor([matrix.inputs], device=rows.device)
        zero_point = None if matrix.zero_point is None else torch.full_like(scale, matrix.zero_point, dtype=torch.int32)
        values = int8_products.quantize(rows, scale, zero_point)
    return int8_products.int8_linear(values, integers)


def directory_candidate(artifact: DirectoryArtifact) -> Candidate:
    """A directory as something to run."""
    return Candidate(artifact, SchemeProducts(artifact), artifact.directory, artifact.unreadable)
