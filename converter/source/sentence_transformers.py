"""What the files of sentence-transformers beside a checkpoint say of it: that it embeds texts, and how."""

import re
from pathlib import Path
from typing import Any

from gguf import PoolingType

from bitwright.formats.errors import ConvertError
from bitwright.formats.files.regular_file import LARGEST_METADATA_BYTES, parse_json, read_json, read_whole

_MODULES = "modules.json"
_REMEDY = "fetch modules.json of the same revision again"
_SWITCH = "pooling_mode_"
_POOLING = {
    "mean": PoolingType.MEAN,
    "mean_tokens": PoolingType.MEAN,
    "cls": PoolingType.CLS,
    "cls_token": PoolingType.CLS,
    "lasttoken": PoolingType.LAST,
}


def embedding_facts(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Keys that the data files of architectures may name, beside those of config.json: `embeds`, whether the model is
    one without a head for words (by these files, or a class like "Qwen3Model" among its architectures), `pooling_type`,
    as llama.cpp counts it, and `dense_layers`, how many layers follow the pooling. Empty for any other model.

    Raises ConvertError for a pooling that llama.cpp does not have."""
    path = directory / _MODULES
    modules = _modules(path) if path.is_file() else []
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    classes = config.get("architectures")
    if "Pooling" not in kinds:
        name = classes[0] if isinstance(classes, list) and len(classes) == 1 else None
        headless = isinstance(name, str) and re.fullmatch(r"\w+(?<!LMHead)Model", name)
        return {"embeds": True} if headless else {}
    facts = {"embeds": True, "dense_layers": kinds.count("Dense")}
    folder = str(modules[kinds.index("Pooling")].get("path"))
    if not re.fullmatch(r"\w+", folder):
        raise ConvertError(
            f"the pooling is in {folder!r}, which is no folder of the model",
            str(path),
            _REMEDY,
        )
    return facts | {"pooling_type": _pooling_type(directory / folder / "config.json")}


def _modules(path: Path) -> list[dict[str, Any]]:
    """The list of JSON objects in modules.json."""
    text = read_whole(path, LARGEST_METADATA_BYTES, _REMEDY)
    modules = parse_json(b'{"modules": ' + text + b"}", str(path), path.name, _REMEDY)["modules"]
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ConvertError(f"{path.name} is no list of JSON objects", str(path), _REMEDY)
    return modules


def _pooling_type(path: Path) -> int:
    stated = read_json(path)
    switches = {key.removeprefix(_SWITCH): on for key, on in stated.items() if key.startswith(_SWITCH)}
    modes = [mode for mode, on in switches.items() if on is True]
    modes += [stated["pooling_mode"]] if isinstance(stated.get("pooling_mode"), str) else []
    if len(modes) == 1 and modes[0] in _POOLING:
        return int(_POOLING[modes[0]])
    raise ConvertError(
        f"the model pools its tokens by {', '.join(modes) or 'nothing'}, and llama.cpp has mean, cls and lasttoken",
        str(path),
        "no GGUF of this model would embed as it does",
    )
