"""The files that say what a checkpoint's tokenizer is: read as JSON objects, their values taken by kind."""

import os
import tomllib
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.resources import files as resources
from pathlib import Path
from typing import Any, TypeVar

from bitwright.converter.source.checkpoint import SENTENCEPIECE_NAMES
from bitwright.converter.tokenizer import sentencepiece_model
from bitwright.converter.tokenizer.sentencepiece_model import SentencePieceModel
from bitwright.formats.errors import ConvertError
from bitwright.formats.files import regular_file

_Kind = TypeVar("_Kind", dict[Any, Any], list[Any], str, bool, int)
_KIND_NAMES = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a whole number"}

# The class of transformers that runs tokenizer.json as it is.
GENERIC_CLASS = "TokenizersBackend"


@dataclass(frozen=True)
class TokenizerFiles:
    """The parsed content of each file, {} for one that is absent.

    definition: tokenizer.json, or what transformers makes in its place. definition_name: the file that it is made of.
    settings: tokenizer_config.json. special_tokens: special_tokens_map.json. added_tokens: added_tokens.json.
    config: config.json. generation: generation_config.json.
    """

    directory: Path
    definition: dict[str, Any]
    settings: dict[str, Any]
    special_tokens: dict[str, Any]
    added_tokens: dict[str, Any]
    config: dict[str, Any]
    generation: dict[str, Any]
    definition_name: str = "tokenizer.json"

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

    def rebuilt(self, definition: dict[str, Any], name: str) -> "TokenizerFiles":
        """The same files with a tokenizer.json that was made of the file `name`."""
        return replace(self, definition=definition, definition_name=name)

    def where(self, name: str) -> str:
        return str(self.directory / (self.definition_name if name == "tokenizer.json" else name))

    @cached_property
    def sentencepiece_name(self) -> str | None:
        """The name of SentencePiece's file, None where there is none."""
        return next((name for name in SENTENCEPIECE_NAMES if (self.directory / name).is_file()), None)

    @cached_property
    def sentencepiece(self) -> SentencePieceModel | None:
        """SentencePiece's file, None where there is none."""
        name = self.sentencepiece_name
        return None if name is None else sentencepiece_model.read(self.directory / name)

    @cached_property
    def tokenizer_class(self) -> str:
        """The class that transformers' AutoTokenizer runs, without "Fast". Some write settings of their own over those
        of tokenizer.json."""
        stated = part(self.settings, "tokenizer_class", str, self.where("tokenizer_config.json"))
        stated = stated or part(self.config, "tokenizer_class", str, self.where("config.json")) or ""
        model_type = part(self.config, "model_type", str, self.where("config.json")) or ""
        classes = tokenizer_classes()
        if model_type in classes["generic"]:
            return GENERIC_CLASS
        if model_type in classes["fixed"]:
            return str(classes["fixed"][model_type])
        name = stated.removesuffix("Fast") or str(classes["default"].get(model_type, GENERIC_CLASS))
        return GENERIC_CLASS if name == "PreTrainedTokenizer" else name


@cache
def tokenizer_classes() -> dict[str, Any]:
    """The table of classes by model type: "generic", "fixed" and "default"."""
    table = resources("bitwright.converter.tokenizer").joinpath("tokenizer_classes.toml")
    return tomllib.loads(table.read_text(encoding="utf-8"))


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
