"""Tokens of SentencePiece's Unigram by llama.cpp, from the metadata that we write, against those of transformers."""

import re
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType, TokenType
from gguf.gguf_writer import GGUFValue
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from bitwright.converter.tokenizer.vocabulary import tokenizer_metadata
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.gguf import lay_out, read_gguf
from tests import tiny_tokenizers as tiny
from tests.converter.tokenizer.tokenizer_checks import ALL_TEXTS, change_json, load, values

CLASSES = ["XLMRobertaTokenizer", "T5Tokenizer"]
# transformers drops these behind a character that it replaces.
JOINING = re.compile("[\u200d\ufe0f\u0301]")
TEXTS = [text for text in ALL_TEXTS if not JOINING.search(text)]


def build(directory: Path, tokenizer_class: str, alone: bool = False, **options: Any) -> int:
    """Returns the number of tokens. alone: without the tokenizer.json that transformers makes."""
    tiny.unigram(directory, tokenizer_class, **options)
    own = AutoTokenizer.from_pretrained(directory)
    if not alone:
        own.save_pretrained(directory)
        for path in directory.glob("*.model"):
            path.unlink()
    return len(own)


@pytest.mark.parametrize("alone", [True, False], ids=["model", "tokenizer.json"])
@pytest.mark.parametrize("tokenizer_class", CLASSES)
def test_tokens_are_those_of_transformers(tokenizer_class, alone, tmp_path):
    n = build(tmp_path, tokenizer_class, alone)
    own = AutoTokenizer.from_pretrained(tmp_path)
    with load(tmp_path, n + 2) as model:
        for text in (*TEXTS, "  two  spaces \n and a line ", "ﬁne Ⅷ ½ ½"):
            assert model.tokenize(text) == own(text)["input_ids"], text
        named = "<extra_id_3>" if tokenizer_class == "T5Tokenizer" else "<mask>"
        assert model.tokenize(f"a{named}b") == own(f"a{named}b")["input_ids"]
        assert model.tokenize("²\u200dx") != own("²\u200dx")["input_ids"]
    assert "transformers drops" in " ".join(tokenizer_metadata(tmp_path, n + 2).notes)


@pytest.mark.parametrize("alone", [True, False], ids=["model", "tokenizer.json"])
def test_keys_and_values(alone, tmp_path):
    """Those that llama.cpp's converter writes of a tokenizer.json."""
    n = build(tmp_path, "XLMRobertaTokenizer", alone)
    metadata = tokenizer_metadata(tmp_path, n + 1).values
    assert metadata["tokenizer.ggml.precompiled_charsmap"].type == GGUFValueType.ARRAY
    found = values(tmp_path, n + 1)
    own = AutoTokenizer.from_pretrained(tmp_path)
    assert found.pop("ggml.tokens") == [*own.convert_ids_to_tokens(range(n)), f"[PAD{n}]"]
    assert found.pop("ggml.token_type") == [3, 3, 3, 2, *[1] * (n - 5), 3, TokenType.UNUSED]
    scores = found.pop("ggml.scores")
    assert scores[:4] == [0.0] * 4 and scores[-2:] == [0.0, -10000.0] and -20 < min(scores[4:-2]) < scores[6] < 0
    assert len(found.pop("ggml.precompiled_charsmap")) > 100_000
    assert found == {
        "ggml.model": "t5",
        "ggml.pre": "default",
        "ggml.token_type_count": 2,
        "ggml.add_space_prefix": True,
        "ggml.remove_extra_whitespaces": True,
        "ggml.bos_token_id": 0,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 3,
        "ggml.seperator_token_id": 2,
        "ggml.padding_token_id": 1,
        "ggml.mask_token_id": n - 1,
        "ggml.add_bos_token": True,
        "ggml.add_eos_token": True,
        "ggml.add_sep_token": True,
    }


def test_the_table_of_characters_goes_through_a_file(tmp_path):
    n = build(tmp_path, "XLMRobertaTokenizer")
    metadata = tokenizer_metadata(tmp_path, n).values
    (layout,) = lay_out("model.gguf", {"general.architecture": GGUFValue("bert", GGUFValueType.STRING), **metadata}, [])
    (tmp_path / "model.gguf").write_bytes(layout.header)
    back = read_gguf(tmp_path / "model.gguf").metadata()["tokenizer.ggml.precompiled_charsmap"]
    assert back.sub_type == GGUFValueType.UINT8
    assert bytes(back.value) == metadata["tokenizer.ggml.precompiled_charsmap"].value


METASPACE = pre_tokenizers.Metaspace(prepend_scheme="always")


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "keys", "spaces"),
    [
        (normalizers.Sequence([normalizers.Replace(Regex(" {2,}"), " ")]), METASPACE, (True, True), False),
        (
            normalizers.Sequence([normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]),
            METASPACE,
            (True, True),
            True,
        ),
        (None, pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), METASPACE]), (True, True), True),
        (None, METASPACE, (True, False), True),
        (None, pre_tokenizers.Metaspace(prepend_scheme="never"), (False, False), True),
    ],
    ids=["replace", "strip", "split", "kept", "no-prefix"],
)
def test_steps_of_a_tokenizer_json(normalizer, pre_tokenizer, keys, spaces, tmp_path):
    """spaces: whether those at the end of a text have the same tokens, too."""
    n = build(tmp_path, "XLMRobertaTokenizer")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = tmp_path / "tokenizer_config.json"
    change_json(settings, lambda content: content.update(tokenizer_class="TokenizersBackend", unk_token=None))
    found = values(tmp_path, n)
    assert found["ggml.unknown_token_id"] == 3
    assert (found["ggml.add_space_prefix"], found["ggml.remove_extra_whitespaces"]) == keys
    assert "ggml.precompiled_charsmap" not in found
    said = " ".join(tokenizer_metadata(tmp_path, n).notes)
    assert ("drops spaces at the end" in said) is not spaces
    own = AutoTokenizer.from_pretrained(tmp_path)
    with load(tmp_path, n) as model:
        for text in ("Hello world", "two  spaces", "naïve façade", "漢字とカタカナ", *(["end  "] if spaces else [])):
            assert model.tokenize(text) == own(text)["input_ids"], text


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda content: content.update(normalizer={"type": "Lowercase"}), "cannot do this step .*Lowercase"),
        (lambda content: content.update(pre_tokenizer=None), "does not write spaces"),
        (lambda content: content["model"].update(unk_id=None), "has no unknown token"),
        (lambda content: content["model"].update(unk_id=10**9), "has no unknown token"),
        (lambda content: content["model"].update(vocab=[]), "has no 'vocab'"),
        (lambda content: content["model"].update(vocab={"a": 0}), "where a list is expected"),
        (lambda content: content["model"]["vocab"].append(["a", "b"]), "is no token with a score"),
        (lambda content: content["model"]["vocab"].append(["a", float("nan")]), "is no token with a score"),
        (lambda content: content["normalizer"].update(precompiled_charsmap="????"), "replaced characters is damaged"),
        (
            lambda content: content["normalizer"].update(precompiled_charsmap="/////w=="),
            "replaced characters is damaged",
        ),
    ],
)
def test_damaged_and_foreign_parts_are_refused(change, what, tmp_path):
    n = build(tmp_path, "XLMRobertaTokenizer")
    change_json(tmp_path / "tokenizer.json", change)
    change_json(tmp_path / "tokenizer_config.json", lambda content: content.update(tokenizer_class="TokenizersBackend"))
    with pytest.raises(ConvertError, match=what):
        tokenizer_metadata(tmp_path, n)


def test_bytes_of_unknown_characters_are_said(tmp_path):
    n = build(tmp_path, "XLMRobertaTokenizer")
    change_json(tmp_path / "tokenizer.json", lambda content: content["model"].update(byte_fallback=True))
    assert "writes a character in bytes" in " ".join(tokenizer_metadata(tmp_path, n).notes)


def test_a_class_that_numbers_tokens_otherwise_is_refused(tmp_path):
    tiny.unigram(tmp_path, "XLMRobertaTokenizer")
    change_json(
        tmp_path / "tokenizer_config.json", lambda content: content.update(tokenizer_class="CamembertTokenizer")
    )
    with pytest.raises(ConvertError, match="how transformers' CamembertTokenizer numbers the tokens") as caught:
        tokenizer_metadata(tmp_path, 500)
    assert "save_pretrained" in caught.value.remedy
