"""Tokens of WordPiece by llama.cpp, from the metadata that we write, against those of transformers."""

from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from bitwright.converter.tokenizer.vocabulary import tokenizer_metadata
from bitwright.formats.errors import ConvertError
from tests import tiny_tokenizers as tiny
from tests.converter.tokenizer.tokenizer_checks import ALL_TEXTS, change_json, decomposes, load, values


def saved(directory: Path, lowercase: bool = True, **settings: Any) -> int:
    """A directory with the tokenizer.json that transformers makes of a vocab.txt; returns its number of tokens."""
    n = tiny.word_pieces(directory, lowercase, **settings)
    AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
    (directory / "vocab.txt").unlink(missing_ok=True)
    return n


@pytest.mark.parametrize("alone", [True, False], ids=["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize(
    ("lowercase", "strip_accents"), [(True, None), (False, None), (True, False), (False, True)], ids=str
)
def test_tokens_are_those_of_transformers(lowercase, strip_accents, alone, tmp_path):
    make = tiny.word_pieces if alone else saved
    n = make(tmp_path, lowercase, do_lower_case=lowercase, strip_accents=strip_accents)
    own = AutoTokenizer.from_pretrained(tmp_path)
    strips = lowercase if strip_accents is None else strip_accents
    said = " ".join(tokenizer_metadata(tmp_path, n).notes)
    assert ("Korean" in said) is strips
    assert ("since 2026" in said) is ((lowercase, strips) != (True, True))
    with load(tmp_path, n) as model:
        for text in ALL_TEXTS:
            if not (decomposes(text) if strips else lowercase and "İ" in text):
                assert model.tokenize(text) == own(text)["input_ids"], text
        if strips:
            assert any(model.tokenize(text) != own(text)["input_ids"] for text in filter(decomposes, ALL_TEXTS))
        elif lowercase:
            assert model.tokenize("İ") != own("İ")["input_ids"] and "İ" in said
        assert model.tokenize("a [MASK] b") == own("a [MASK] b")["input_ids"]
        assert "one unknown token" in said
        assert model.tokenize("e" * 100) == own("e" * 100)["input_ids"]
        assert model.tokenize("e" * 101) != own("e" * 101)["input_ids"]


def test_keys_and_values(tmp_path):
    """Those that llama.cpp's converter writes."""
    n = tiny.word_pieces(tmp_path)
    found = values(tmp_path, n + 1)
    tokens, types = found.pop("ggml.tokens"), found.pop("ggml.token_type")
    own = AutoTokenizer.from_pretrained(tmp_path)
    assert tokens[:7] == ["[PAD]", "▁[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "▁!"]
    assert types[:7] == [3, 1, 3, 3, 3, 3, 1]
    assert (tokens[n], types[n]) == (f"▁[PAD{n}]", TokenType.UNUSED)
    going_on = next(text for text in own.get_vocab() if text.startswith("##") and len(text) > 4)
    assert tokens[own.get_vocab()[going_on]] == going_on[2:]
    assert found == {
        "ggml.model": "bert",
        "ggml.pre": "jina-v2-en",
        "ggml.token_type_count": 2,
        "ggml.normalizer.lowercase": True,
        "ggml.bos_token_id": 3,
        "ggml.eos_token_id": 4,
        "ggml.unknown_token_id": 2,
        "ggml.seperator_token_id": 4,
        "ggml.padding_token_id": 0,
        "ggml.mask_token_id": 5,
        "ggml.add_bos_token": True,
        "ggml.add_eos_token": True,
        "ggml.add_sep_token": False,
    }


def test_another_class_goes_by_tokenizer_json(tmp_path):
    n = saved(tmp_path, lowercase=False, do_lower_case=False)
    change_json(tmp_path / "tokenizer_config.json", lambda content: content.update(do_lower_case=True))
    assert values(tmp_path, n)["ggml.normalizer.lowercase"] is True
    assert "tokenizer_config.json says otherwise" in " ".join(tokenizer_metadata(tmp_path, n).notes)
    change_json(tmp_path / "tokenizer_config.json", lambda content: content.update(tokenizer_class="TokenizersBackend"))
    own = AutoTokenizer.from_pretrained(tmp_path)
    assert values(tmp_path, n)["ggml.normalizer.lowercase"] is False
    with load(tmp_path, n) as model:
        for text in tiny.PLAIN_TEXTS:
            assert model.tokenize(text) == own(text)["input_ids"], text


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"normalizer": normalizers.Lowercase()}, "cannot do these steps of a WordPiece tokenizer: .*Lowercase"),
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, "cannot do these steps"),
        ({"normalizer": normalizers.BertNormalizer(clean_text=False)}, "removes control characters"),
        ({"normalizer": normalizers.BertNormalizer(handle_chinese_chars=False)}, "splits between Chinese characters"),
    ],
)
def test_steps_that_llama_cpp_does_not_do_are_refused(changes, what, tmp_path):
    n = saved(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for name, step in changes.items():
        setattr(tokenizer, name, step)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    change_json(tmp_path / "tokenizer_config.json", lambda content: content.update(tokenizer_class="TokenizersBackend"))
    with pytest.raises(ConvertError, match=what):
        tokenizer_metadata(tmp_path, n)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda content: content["model"].update(vocab={}), "has no 'vocab'"),
        (lambda content: content["model"].update(vocab=["a"]), "'vocab' is .* where an object is expected"),
        (lambda content: content["model"]["vocab"].update(x="7"), "'x' with the id '7' is no token"),
        (lambda content: content["model"].update(unk_token="<unk>"), "unknown token '<unk>' is none of the tokens"),
        (lambda content: content["model"].update(continuing_subword_prefix="@@"), "not '@@'"),
        (lambda content: content.update(post_processor=None), "an end behind it"),
    ],
)
def test_damaged_and_foreign_parts_are_refused(damage, what, tmp_path):
    n = saved(tmp_path)
    change_json(tmp_path / "tokenizer.json", damage)
    with pytest.raises(ConvertError, match=what):
        tokenizer_metadata(tmp_path, n)


def test_a_vocabulary_without_a_special_token_is_refused(tmp_path):
    n = tiny.word_pieces(tmp_path, mask_token="<mask>")
    with pytest.raises(ConvertError, match="special token '<mask>' is none of the tokens"):
        tokenizer_metadata(tmp_path, n)


def test_a_pre_tokenizer_is_for_byte_level_bpe_alone(tmp_path):
    n = tiny.word_pieces(tmp_path)
    with pytest.raises(ConvertError, match="takes no pre-tokenizer for a tokenizer of this kind, and 'qwen2' is given"):
        tokenizer_metadata(tmp_path, n, "qwen2")
