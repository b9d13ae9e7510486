"""bitwright.json: what a directory of ours says of its making, of its tensors and of its files."""

from pathlib import Path, PurePosixPath
from typing import Any

from bitwright.formats.errors import ConvertError
from bitwright.formats.files.regular_file import read_json
from bitwright.formats.typed import is_a
from bitwright.profiles.reading.target import KEPT

RECIPE_NAME = "bitwright.json"
"""The recipe of a directory, with the scheme of every tensor and the hash of every file."""


_MOST_DIMENSIONS = 5


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
    # A scheme is of matrices. What is kept may be a single value, or the kernel of a tower for videos.
    known = len(shape) == 2 or (entry["format"] in KEPT and len(shape) <= _MOST_DIMENSIONS)
    return known and isinstance(scales, list) and all(isinstance(name, str) for name in scales)
