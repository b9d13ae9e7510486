"""Reading a safetensors directory of schemes: its weights as a runtime decodes them, and its products as one computes
them."""

import re
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

import numpy as np

from bitwright.converter.artifact.directory_record import read_recipe
from bitwright.converter.source.checkpoint import block_spans
from bitwright.formats.bfloat16 import bfloat16
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.safetensors import read_headers
from bitwright.formats.files.stored_tensor import to_float32
from bitwright.formats.schemes.cache_scheme import SCALE_DTYPE, SCALE_SHAPE
from bitwright.formats.schemes.registry import Scheme, get_scheme
from bitwright.formats.schemes.scheme import Tensors
from bitwright.profiles.planning.plan_modules import ModulePlan
from bitwright.profiles.reading.target import KEPT
from bitwright.profiles.vocabulary import ModelMap

_CACHE_SCALE = re.compile(r"layers\.(\d+)\..*\.([kv])_scale")


class DirectoryArtifact:
    """A directory's weights under the checkpoint's names, as the source of a layer stream.

    tensors: name -> (format, shape), of every tensor of the plan. cache_scales: names of the scales of caches.
    Raises ConvertError for what is damaged or absent.
    """

    def __init__(
        self, directory: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], cache_scales: Iterable[str] = ()
    ):
        self.directory, self.tensors, self._cache_scales = directory, dict(tensors), tuple(cache_scales)
        self._stored = read_headers(directory, "write the artifact again")

    @classmethod
    def of_plan(cls, directory: Path, plan: ModulePlan) -> "DirectoryArtifact":
        tensors = {row.tensor.name: (row.format, row.tensor.shape) for row in plan.tensors}
        return cls(directory, tensors, [name for row in plan.tensors for name in row.cache_scales])

    @classmethod
    def of_recipe(cls, directory: Path) -> "DirectoryArtifact":
        stored = read_recipe(directory)["tensors"]
        tensors = {t["tensor"]: (t["format"], tuple(t["shape"])) for t in stored}
        return cls(directory, tensors, [name for t in stored for name in t.get("cache_scales", ())])

    def check_model(self, model_map: ModelMap) -> None:
        """Raises ConvertError when a matrix of this model is absent or has another shape."""
        for spec in model_map.tensors:
            for name in spec.sources:
                shape = spec.shape[-2:] if len(spec.shape) > 1 else spec.shape
                stored = self.tensors[name][1] if name in self.tensors else None
                if stored is None or tuple(stored) != shape:
                    raise ConvertError(
                        f"the artifact is of another model: {name} should be {list(shape)}, and there is"
                        f" {list(stored) if stored else 'nothing'}",
                        str(self.directory),
                        "name the model that this artifact was made from",
                    )

    def scheme(self, name: str) -> Scheme | None:
        format_name, _ = self.tensors[name]
        return None if format_name in KEPT else get_scheme(format_name, name)

    @property
    def unreadable(self) -> str | None:
        """Why transformers does not read the directory, which vLLM does; None where it should."""
        for name in self.tensors:
            scheme = self.scheme(name) if ".experts." in name else None
            if scheme is not None and scheme.activations is not None and scheme.activations.type == "int":
                return "transformers has no experts whose inputs are rounded to integers, as vLLM has"
        return None

    def n_bytes(self, name: str) -> int:
        """Of everything that stands for this tensor."""
        format_name, shape = self.tensors[name]
        scheme = self.scheme(name)
        return KEPT[format_name] * prod(shape) if scheme is None else scheme.n_bytes(shape[0], shape[1])

    def encoded(self, name: str, scheme: Scheme) -> Tensors:
        """By suffix everything that is stored of a matrix in this scheme."""
        (_, shape), module = self.tensors[name], name.removesuffix(".weight")
        return {
            suffix: self._read(f"{module}.{suffix}", dtype, stored_shape)
            for suffix, (dtype, stored_shape) in scheme.tensors(*shape).items()
        }

    def read(self, name: str) -> np.ndarray:
        """float32 in its own shape; a matrix in a scheme is decoded."""
        format_name, shape = self.tensors[name]
        scheme = self.scheme(name)
        if scheme is not None:
            return scheme.decode(self.encoded(name, scheme), (shape[0], shape[1]))
        return to_float32(self._read(name, format_name, shape), format_name)

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """What `read` has, in parts of the rows that a checkpoint's blocks have."""
        format_name, shape = self.tensors[name]
        n_columns = shape[-1] if shape else 1
        n_rows = prod(shape) // n_columns
        whole = None if self.scheme(name) is None else self.read(name)
        for start, stop in block_spans(n_rows, n_columns):
            if whole is not None:
                yield whole[start:stop]
            else:
                part = self._values(name, format_name, shape, start * n_columns, (stop - start) * n_columns)
                yield to_float32(part, format_name).reshape(-1, n_columns)

    def cache_scales(self) -> dict[int, tuple[float, float]]:
        """Layer -> the scales of its keys and of its values; empty where caches stay in 16 bits."""
        by_layer: dict[int, dict[str, float]] = {}
        for name in self._cache_scales:
            place = _CACHE_SCALE.search(name)
            value = float(bfloat16(self._read(name, SCALE_DTYPE, SCALE_SHAPE))[0])
            if place is None or not 0 < value < float("inf"):
                raise self._damaged(f"has a scale {name!r} of {value:g}")
            by_layer.setdefault(int(place[1]), {})[place[2]] = value
        if any(len(scales) != 2 for scales in by_layer.values()):
            raise self._damaged("has a layer with a scale of keys or of values alone")
        return {layer: (scales["k"], scales["v"]) for layer, scales in by_layer.items()}

    def _read(self, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        return self._values(name, dtype, shape, 0, prod(shape)).reshape(shape)

    def _values(self, name: str, dtype: str, shape: tuple[int, ...], first: int, n_values: int) -> np.ndarray:
        """Some values of a tensor that is stored as this dtype and shape."""
        if name not in self._stored:
            raise self._damaged(f"lacks the tensor {name!r}")
        stored = self._stored[name]
        if (stored.dtype, stored.shape) != (dtype, shape):
            raise self._damaged(f"has {name!r} as {stored.dtype} {list(stored.shape)}, and not {dtype} {list(shape)}")
        return stored.read(name, first, n_values)

    def _damaged(self, what: str) -> ConvertError:
        return ConvertError(f"the directory {what}", str(self.directory), "write the artifact again")
