"""The files that say what a checkpoint's tokenizer is: read as JSON objects, their values taken by kind."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from converter import sentencepiece_model
from converter.sentencepiece_model import SentencePieceModel
from formats import regular_file
from formats.errors import ConvertError

_Kind = TypeVar("_Kind", dict, list, str, bool, int)
_KIND_NAMES = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a whole number"}

# The class that transformers runs for a model type: whatever tokenizer_config.json says, and where it says nothing.
_GENERIC_CLASS = "TokenizersBackend"
_FIXED_CLASS = {
    "mistral": _GENERIC_CLASS,
    "mixtral": _GENERIC_CLASS,
    "phi3": _GENERIC_CLASS,
    "qwen2": "Qwen2Tokenizer",
}
_DEFAULT_CLASS = {
    "gemma3": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
}


@dataclass(frozen=True)
class TokenizerFiles:
    """The parsed content of each file, {} for one that is absent.

    definition: tokenizer.json. settings: tokenizer_config.json. special_tokens: special_tokens_map.json.
    added_tokens: added_tokens.json. config: config.json. generation: generation_config.json.
    """

    directory: Path
    definition: dict[str, Any]
    settings: dict[str, Any]
    special_tokens: dict[str, Any]
    added_tokens: dict[str, Any]
    config: dict[str, Any]
    generation: dict[str, Any]

    @classmethod
    def read(cls, directory: Path) -> "TokenizerFiles":
        """Raises ConvertError for a file that cannot be read, or is no JSON object."""
        return cls(
            directory,
            read_json(directory / "tokenizer.json"),
            read_json(directory / "tokenizer_config.json"),
            read_json(directory / "special_tokens_map.json"),
            read_json(directory / "added_tokens.json"),
            read_json(directory / "config.json"),
            read_json(directory / "generation_config.json"),
        )

    def where(self, name: str) -> str:
        return str(self.directory / name)

    @cached_property
    def sentencepiece(self) -> SentencePieceModel | None:
        """tokenizer.model, None where there is none."""
        path = self.directory / "tokenizer.model"
        return sentencepiece_model.read(path) if path.is_file() else None

    @cached_property
    def tokenizer_class(self) -> str:
        """The class that transformers' AutoTokenizer runs, without "Fast". Some write settings of their own over those
        of tokenizer.json."""
        stated = part(self.settings, "tokenizer_class", str, self.where("tokenizer_config.json"))
        stated = stated or part(self.config, "tokenizer_class", str, self.where("config.json")) or ""
        model_type = part(self.config, "model_type", str, self.where("config.json")) or ""
        if model_type in _FIXED_CLASS:
            return _FIXED_CLASS[model_type]
        name = stated.removesuffix("Fast") or _DEFAULT_CLASS.get(model_type, _GENERIC_CLASS)
        return _GENERIC_CLASS if name == "PreTrainedTokenizer" else name


def read_json(path: Path) -> dict[str, Any]:
    """A parsed JSON object; {} where there is no such file. Raises ConvertError."""
    return regular_file.read_json(path) if os.path.lexists(path) else {}


def part(table: dict[str, Any], key: str, kind: type[_Kind], where: str) -> _Kind | None:
    """The value of the key; None where it is absent or null. Raises ConvertError for a value of another kind."""
    value = table.get(key)
    if value is None:
        return None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise wrong_kind(key, value, kind, where)
    return value


def objects(table: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    """A list of objects; [] where the key is absent or null. Raises ConvertError for anything else."""
    values = part(table, key, list, where) or []
    for value in values:
        if not isinstance(value, dict):
            raise wrong_kind(key, value, dict, where)
    return values


def wrong_kind(key: str, value: object, kind: type, where: str) -> ConvertError:
    return ConvertError(
        f"{key!r} is {str(value)[:60]!r}, where {_KIND_NAMES[kind]} is expected",
        f"{where}: {key}",
        "correct the value, or fetch the file again",
    )


def steps(definition: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer, decoder or post-processor of a parsed tokenizer.json: of a Sequence, of
    Sequences in it, of a single step, or of none. Raises ConvertError for what is none of these."""
    component = part(definition, key, dict, where)
    return [] if component is None else _flatten(component, where)


def _flatten(component: dict[str, Any], where: str) -> list[dict[str, Any]]:
    if component.get("type") != "Sequence":
        return [component]
    for key in ("normalizers", "pretokenizers", "decoders", "processors"):
        if key in component:
            return [step for member in objects(component, key, where) for step in _flatten(member, where)]
    return []
