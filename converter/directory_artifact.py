"""Reading a safetensors directory of schemes: its weights as a runtime decodes them, and its products as one computes
them."""

import re
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from converter.checkpoint import block_spans
from converter.safetensors_source import read_weight_map, shard_names
from formats.bfloat16 import bfloat16
from formats.cache_scheme import SCALE_DTYPE, SCALE_SHAPE
from formats.errors import ConvertError
from formats.plain import decode_bf16
from formats.regular_file import read_json
from formats.safetensors_file import StoredArray, read_header
from formats.schemes import Scheme, get_scheme
from formats.typed import is_a
from formats.weight_scheme import Tensors
from profiles.plan import Plan
from profiles.target import KEPT
from profiles.vocabulary import ModelMap

RECIPE_NAME = "bitwright.json"
"""The recipe of a directory, with the scheme of every tensor and the hash of every file."""

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
        self._stored = read_headers(directory)

    @classmethod
    def of_plan(cls, directory: Path, plan: Plan) -> "DirectoryArtifact":
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
                found = self.tensors[name][1] if name in self.tensors else None
                if found is None or tuple(found) != shape:
                    raise ConvertError(
                        f"the artifact is of another model: {name} should be {list(shape)}, and there is"
                        f" {list(found) if found else 'nothing'}",
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

    def encoded(self, name: str) -> Tensors:
        """By suffix everything that is stored of a matrix in a scheme."""
        scheme, (_, shape) = self.scheme(name), self.tensors[name]
        assert scheme is not None
        module = name.removesuffix(".weight")
        return {
            suffix: self._read(f"{module}.{suffix}", dtype, of)
            for suffix, (dtype, of) in scheme.tensors(*shape).items()
        }

    def read(self, name: str) -> np.ndarray:
        """float32 in its own shape; a matrix in a scheme is decoded."""
        format_name, shape = self.tensors[name]
        scheme = self.scheme(name)
        if scheme is not None:
            return scheme.decode(self.encoded(name), (shape[0], shape[1]))
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
        found: dict[int, dict[str, float]] = {}
        for name in self._cache_scales:
            place = _CACHE_SCALE.search(name)
            value = float(bfloat16(self._read(name, SCALE_DTYPE, SCALE_SHAPE))[0])
            if place is None or not 0 < value < float("inf"):
                raise self._damaged(f"has a scale {name!r} of {value:g}")
            found.setdefault(int(place[1]), {})[place[2]] = value
        if any(len(scales) != 2 for scales in found.values()):
            raise self._damaged("has a layer with a scale of keys or of values alone")
        return {layer: (scales["k"], scales["v"]) for layer, scales in found.items()}

    def _read(self, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        return self._values(name, dtype, shape, 0, prod(shape)).reshape(shape)

    def _values(self, name: str, dtype: str, shape: tuple[int, ...], first: int, n_values: int) -> np.ndarray:
        """Some values of a tensor that is stored as this dtype and shape."""
        if name not in self._stored:
            raise self._damaged(f"lacks the tensor {name!r}")
        found = self._stored[name]
        if (found.dtype, found.shape) != (dtype, shape):
            raise self._damaged(f"has {name!r} as {found.dtype} {list(found.shape)}, and not {dtype} {list(shape)}")
        return found.read(first, n_values)

    def _damaged(self, what: str) -> ConvertError:
        return ConvertError(f"the directory {what}", str(self.directory), "write the artifact again")


def to_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values of a kept tensor, of BF16 the bits, as float32 of the same shape."""
    if dtype == "BF16":
        return decode_bf16(values.reshape(-1).view(np.uint8)).reshape(values.shape)
    return values.astype(np.float32)


def read_recipe(directory: Path) -> dict[str, Any]:
    """What the directory says of its making. Raises ConvertError where it says nothing, or nothing that makes sense."""
    path = directory / RECIPE_NAME
    remedy = "name a directory that this tool wrote"
    if not path.is_file():
        raise ConvertError(f"the directory has no {RECIPE_NAME}", str(directory), remedy)
    recipe = read_json(path, remedy=remedy)
    tensors = recipe.get("tensors")
    if not isinstance(tensors, list) or not all(_describes_a_tensor(entry) for entry in tensors):
        raise ConvertError("its list of tensors is absent or damaged", str(path), remedy)
    if not isinstance(recipe.get("recipe"), dict):
        raise ConvertError("its recipe is absent or damaged", str(path), remedy)
    return recipe


def listed_files(recipe: dict[str, Any]) -> dict[str, str]:
    """The SHA-256 of every file that the recipe lists, by its path in the directory; empty where the list is absent or
    damaged, or leads out of the directory."""
    files: Any = recipe.get("files")
    if not is_a(files, list[dict[str, str | int]]):
        return {}
    listed = {file.get("path"): file.get("sha256") for file in files}
    return listed if is_a(listed, dict[str, str]) and all(map(_stays_inside, listed)) else {}


def _stays_inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts and "\0" not in path


def _describes_a_tensor(entry: Any) -> bool:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("tensor", "format")):
        return False
    shape, scales = entry.get("shape"), entry.get("cache_scales", [])
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        return False
    # A scheme is of matrices.
    known = len(shape) == 2 or (entry["format"] in KEPT and 0 < len(shape) <= 4)
    return known and isinstance(scales, list) and all(isinstance(name, str) for name in scales)


def read_headers(directory: Path) -> dict[str, StoredArray]:
    """Every tensor of all shards by its name. Raises ConvertError for a shard that is absent or damaged."""
    weight_map = read_weight_map(directory)
    stored: dict[str, StoredArray] = {}
    for shard in shard_names(weight_map):
        tensors, _ = read_header(directory / shard, "write the artifact again")
        stored |= {name: t for name, t in tensors.items() if weight_map is None or weight_map.get(name) == shard}
    return stored
