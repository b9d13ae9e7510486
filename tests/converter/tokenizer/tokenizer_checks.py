"""What the tests of tokenizers share: llama.cpp on the metadata that we write, beside the library's own tokenizer."""

import json
import tomllib
import unicodedata
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bitwright.converter.judge.llama_cpp import LlamaCpp
from bitwright.converter.tokenizer.vocabulary import tokenizer_metadata
from tests import tiny_tokenizers as tiny

TABLE = tomllib.loads(
    files("bitwright.converter.tokenizer").joinpath("pre_tokenizers.toml").read_text(encoding="utf-8")
)
EXACT = [entry for entry in TABLE["definition"] if "differs" not in entry]
ALL_TEXTS = [*tiny.PLAIN_TEXTS, *tiny.HARD_TEXTS, *tiny.random_texts(400)]


def build(directory: Path, entry: dict[str, Any] = EXACT[0], **options: Any) -> Tokenizer:
    """A byte-level tokenizer of a definition of the table."""
    return tiny.byte_level(directory, tiny.splits(entry["expressions"]), entry["ignore_merges"], **options)


def load(directory: Path, vocab_size: int = 3100, pre_tokenizer: str | None = None) -> LlamaCpp:
    """llama.cpp with the tokenizer that we convert."""
    metadata = tokenizer_metadata(directory, vocab_size, pre_tokenizer).values
    return LlamaCpp(tiny.write_vocabulary(directory / "vocabulary.gguf", metadata), vocab_only=True)


def differing(model: LlamaCpp, tokenizer: Tokenizer, texts: Iterable[str]) -> list[str]:
    """The texts that llama.cpp cuts into other tokens."""
    return [
        text
        for text in texts
        if model.tokenize(text, add_special=False) != tokenizer.encode(text, add_special_tokens=False).ids
    ]


def values(directory: Path, vocab_size: int = 3100) -> dict[str, Any]:
    """The values of the metadata, by their keys without "tokenizer."."""
    metadata = tokenizer_metadata(directory, vocab_size).values
    return {key.removeprefix("tokenizer."): value.value for key, value in metadata.items()}


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file in place; one that is not there is {}."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def decomposes(text: str) -> bool:
    """Whether the text has what llama.cpp takes apart otherwise: Hangul, and marks that take up space."""
    return any(
        "HANGUL SYLLABLE" in unicodedata.name(letter, "") or unicodedata.category(letter) == "Mc" for letter in text
    )
