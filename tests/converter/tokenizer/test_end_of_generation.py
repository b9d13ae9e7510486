"""Where llama.cpp ends a text, from the keys that we write, beside what the checkpoint's files and transformers say."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, GenerationConfig

from bitwright.converter.judge.llama_cpp import LlamaCpp
from bitwright.converter.tokenizer.end_of_generation import EXCEPTIONS, NAMES, source_end_tokens
from bitwright.converter.tokenizer.vocabulary import tokenizer_metadata
from bitwright.formats.errors import ConvertError
from tests import tiny_tokenizers as tiny
from tests.converter.tokenizer.tokenizer_checks import build, change_json, load, values


def add(directory: Path, *texts: str) -> list[int]:
    """Put special tokens into tokenizer.json; returns their ids."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in texts])
    tokenizer.save(str(directory / "tokenizer.json"))
    ids = [tokenizer.token_to_id(text) for text in texts]
    assert None not in ids
    return ids


def checkpoint(directory: Path, *texts: str, eos_token: str | None = None) -> list[int]:
    """A byte-level tokenizer with these special tokens, whose own end is `eos_token`; returns the tokens' ids."""
    build(directory)
    change_json(directory / "tokenizer_config.json", lambda content: content.update(eos_token=eos_token))
    # llama.cpp would end at it by its text.
    change_json(directory / "tokenizer.json", lambda content: content["added_tokens"][1].update(content="[e]"))
    change_json(directory / "tokenizer.json", lambda content: _rename(content["model"]["vocab"], "<|end|>", "[e]"))
    return add(directory, *texts)


def _rename(vocabulary: dict[str, int], old: str, new: str) -> None:
    vocabulary[new] = vocabulary.pop(old)


def write(directory: Path, name: str, **content: Any) -> None:
    (directory / name).write_text(json.dumps(content))


def of_llama_cpp(directory: Path) -> set[int]:
    with load(directory) as model:
        return set(model.end_tokens)


def of_transformers(directory: Path) -> set[int]:
    """What `generate` ends at, and the tokenizer's own end."""
    own = AutoTokenizer.from_pretrained(directory).eos_token_id
    found = set() if own is None else {own}
    for name in ("config.json", "generation_config.json"):
        if (directory / name).exists():
            stated = GenerationConfig.from_pretrained(directory, name).eos_token_id
            found |= set(stated) if isinstance(stated, list) else set() if stated is None else {stated}
    return found


def keys(directory: Path) -> dict[str, int]:
    found = values(directory)
    return {role: found[key] for role in ("eos", "eot", "eom") if (key := f"ggml.{role}_token_id") in found}


def test_a_list_in_config_json_alone(tmp_path):
    first, second = checkpoint(tmp_path, "[first]", "[second]")
    write(tmp_path, "config.json", model_type="llama", eos_token_id=[first, second])
    assert of_llama_cpp(tmp_path) == of_transformers(tmp_path) == source_end_tokens(tmp_path) == {first, second}
    assert keys(tmp_path)["eos"] == first


def test_the_end_of_a_real_model(smollm2):
    assert source_end_tokens(smollm2) == of_transformers(smollm2) == {2}


def test_ids_that_only_the_generation_settings_have(tmp_path):
    own, other = checkpoint(tmp_path, "[own]", "[other]", eos_token="[own]")
    write(tmp_path, "config.json", model_type="llama", eos_token_id=own)
    write(tmp_path, "generation_config.json", eos_token_id=[other])
    assert of_llama_cpp(tmp_path) == of_transformers(tmp_path) == source_end_tokens(tmp_path) == {own, other}
    assert keys(tmp_path)["eos"] == own


def test_all_count_where_the_files_differ_and_the_tokenizer_says_which_is_first(tmp_path):
    one, two, three = checkpoint(tmp_path, "[one]", "[two]", "[three]", eos_token="[three]")
    write(tmp_path, "config.json", model_type="llama", eos_token_id=one)
    write(tmp_path, "generation_config.json", eos_token_id=two)
    assert of_llama_cpp(tmp_path) == of_transformers(tmp_path) == source_end_tokens(tmp_path) == {one, two, three}
    assert keys(tmp_path)["eos"] == AutoTokenizer.from_pretrained(tmp_path).eos_token_id == three
    assert tokenizer_metadata(tmp_path, 3100).notes == ()


def test_tokens_get_the_key_of_their_role(tmp_path):
    text, turn, message = checkpoint(
        tmp_path, "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", eos_token="<|end_of_text|>"
    )
    write(tmp_path, "config.json", eos_token_id=[text, message, turn])
    assert keys(tmp_path) == {"eos": text, "eot": turn, "eom": message}
    change_json(tmp_path / "tokenizer_config.json", lambda content: content.update(eos_token="<|eot_id|>"))
    assert keys(tmp_path) == {"eos": turn, "eom": message}
    assert of_llama_cpp(tmp_path) == {text, turn, message}


def test_more_ends_than_a_gguf_has_places_for(tmp_path):
    ids = checkpoint(tmp_path, *(f"[{i}]" for i in range(5)), "<|im_end|>", eos_token="[0]")
    write(tmp_path, "config.json", model_type="llama", eos_token_id=ids)
    assert source_end_tokens(tmp_path) == of_transformers(tmp_path) == set(ids)
    (note,) = tokenizer_metadata(tmp_path, 3100).notes
    missing = set(ids) - of_llama_cpp(tmp_path)
    assert missing == {ids[3], ids[4]} and f"at [3] ({ids[3]}), [4] ({ids[4]}), as the model does" in note


def test_a_model_that_nothing_ends(tmp_path):
    """llama.cpp would end at an ordinary token, the one of a fixed id."""
    checkpoint(tmp_path)
    assert source_end_tokens(tmp_path) == set()
    metadata = tokenizer_metadata(tmp_path, 3100)
    assert "No file names a token that ends a text" in metadata.notes[0]
    (stand_in,) = of_llama_cpp(tmp_path)
    assert metadata.values["tokenizer.ggml.tokens"].value[stand_in].startswith("[PAD")
    del metadata.values["tokenizer.ggml.eos_token_id"]
    with LlamaCpp(tiny.write_vocabulary(tmp_path / "bare.gguf", metadata.values), vocab_only=True) as model:
        assert model.end_tokens == {11}
    n = len(metadata.values["tokenizer.ggml.tokens"].value) - metadata.values["tokenizer.ggml.token_type"].value.count(
        5
    )
    assert values(tmp_path, n)["ggml.eos_token_id"] == 0  # its beginning, where the vocabulary has no gap
    change_json(tmp_path / "tokenizer_config.json", lambda content: content.pop("bos_token"))
    assert "will end at an ordinary token" in tokenizer_metadata(tmp_path, n).notes[0]
    (end,) = add(tmp_path, "<|im_end|>")
    assert of_llama_cpp(tmp_path) == {end} and tokenizer_metadata(tmp_path, 3100).notes == ()


def test_llama_cpp_ends_at_the_texts_of_the_table_and_no_others(tmp_path):
    texts = [text for text in NAMES if text not in {text for text, _ in EXCEPTIONS}]
    ids = checkpoint(tmp_path, "[own]", *texts, "<|end_of_turn|>", "<|eot|>", "<|EOT|>", eos_token="[own]")
    assert of_llama_cpp(tmp_path) == set(ids[: 1 + len(texts)])


@pytest.mark.parametrize("text", sorted({text for text, _ in EXCEPTIONS}))
def test_llama_cpp_ends_at_what_may_be_an_exception(text, tmp_path):
    ids = checkpoint(tmp_path, "[own]", text, eos_token="[own]")
    assert of_llama_cpp(tmp_path) == set(ids)


@pytest.mark.parametrize(("text", "others"), EXCEPTIONS)
def test_exceptions_of_llama_cpp_are_said(text, others, tmp_path):
    end, *ids = checkpoint(tmp_path, text, *others)
    write(tmp_path, "config.json", eos_token_id=[*ids, end])
    assert of_llama_cpp(tmp_path) == set(ids)
    assert f"will not end a text at {text} ({end})" in tokenizer_metadata(tmp_path, 3100).notes[0]


def test_the_end_of_a_sentencepiece_model_without_settings(tmp_path):
    n = tiny.sentencepiece(tmp_path, eos_id=0, eos_piece="[end]", unk_id=2, bos_id=1).vocab_size()
    write(tmp_path, "config.json", model_type="llama")
    assert source_end_tokens(tmp_path) == of_transformers(tmp_path) == {0}
    with load(tmp_path, n) as model:
        assert model.end_tokens == {0}


def test_special_tokens_map_counts_as_in_transformers(tmp_path):
    one, two = checkpoint(tmp_path, "[one]", "[two]", eos_token="[one]")
    write(tmp_path, "config.json", model_type="llama")
    write(tmp_path, "special_tokens_map.json", eos_token={"content": "[two]", "lstrip": False})
    assert source_end_tokens(tmp_path) == of_transformers(tmp_path) == {two}
    added = {str(one): {"content": "[one]", "special": True}}
    change_json(tmp_path / "tokenizer_config.json", lambda content: content.update(added_tokens_decoder=added))
    assert source_end_tokens(tmp_path) == of_transformers(tmp_path) == {one}


def test_the_text_model_of_a_larger_one(tmp_path):
    one, two = checkpoint(tmp_path, "[one]", "[two]")
    write(tmp_path, "config.json", eos_token_id=one, text_config={"eos_token_id": [two]})
    assert source_end_tokens(tmp_path) == of_llama_cpp(tmp_path) == {one, two}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("value", "what"),
    [
        (3100, "eos_token_id has 3100, but the model has embeddings for 3100 tokens only"),
        ([1, 9999], "eos_token_id has 9999"),
        (-2, "eos_token_id has -2, which is no token id"),
        ("2", "'eos_token_id' is '2', where a whole number is expected"),
        (2.0, "'eos_token_id' is '2.0', where a whole number is expected"),
        ([True], "'eos_token_id' is 'True', where a whole number is expected"),
        ({"a": 1}, "where a whole number is expected"),
    ],
)
def test_what_is_no_id_of_the_model(name, value, what, tmp_path, capfd):
    checkpoint(tmp_path)
    write(tmp_path, name, eos_token_id=value)
    with pytest.raises(ConvertError, match=what) as caught:
        tokenizer_metadata(tmp_path, 3100)
    assert caught.value.where == f"{tmp_path / name}: eos_token_id"
    assert capfd.readouterr() == ("", "")
