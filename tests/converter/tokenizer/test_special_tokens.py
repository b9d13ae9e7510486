"""Special tokens: which they are, and which of them llama.cpp puts around a text, against transformers."""

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from bitwright.converter.tokenizer.vocabulary import tokenizer_metadata
from bitwright.formats.errors import ConvertError
from tests import tiny_tokenizers as tiny
from tests.converter.tokenizer.tokenizer_checks import build, change_json, load, values

TEXTS = ("some text", "", "<|begin|>some text")


def template(single: str) -> processors.PostProcessor:
    pair = single.replace("$A", "$A:0 $B:1")
    return processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[("<|begin|>", 0), ("<|end|>", 1), ("[tool▁call]", 3000)]
    )


POST_PROCESSORS: dict[str, tuple[Any, bool, bool]] = {
    "none": (None, False, False),
    "bytes": (processors.ByteLevel(), False, False),
    "begin": (template("<|begin|> $A"), True, False),
    "end": (template("$A <|end|>"), False, True),
    "both": (processors.Sequence([processors.ByteLevel(), template("<|begin|> $A <|end|>")]), True, True),
    "roberta": (processors.RobertaProcessing(("<|end|>", 1), ("<|begin|>", 0)), True, True),
    "bert": (processors.BertProcessing(("<|end|>", 1), ("<|begin|>", 0)), True, True),
    "twice": (processors.Sequence([template("<|begin|> $A"), template("$A <|end|>")]), True, True),
}


@pytest.mark.parametrize("stated", [None, True, False])
@pytest.mark.parametrize("name", POST_PROCESSORS)
def test_a_text_gets_the_tokens_around_it_that_the_post_processor_adds(name, stated, tmp_path):
    """llama.cpp would put a beginning in front of every text of `llama-bpe` if the file did not say otherwise."""
    post_processor, begins, ends = POST_PROCESSORS[name]
    tokenizer = build(tmp_path)
    if post_processor is not None:
        tokenizer.post_processor = post_processor
        tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if stated is not None:
        change_json(
            tmp_path / "tokenizer_config.json",
            lambda content: content.update(add_bos_token=stated, add_eos_token=stated),
        )
    own = AutoTokenizer.from_pretrained(tmp_path)
    with load(tmp_path) as model:
        for text in TEXTS:
            assert model.tokenize(text) == own(text)["input_ids"], text
    found = values(tmp_path)
    assert found["ggml.add_bos_token"] is begins
    assert found.get("ggml.add_eos_token") is (None if stated is None and not ends else ends)
    said = " ".join(tokenizer_metadata(tmp_path, 3100).notes)
    for role, does in (("bos", begins), ("eos", ends)):
        assert (f"add_{role}_token = {str(stated).lower()}" in said) is (stated is not None and stated is not does)


@pytest.mark.parametrize("add_eos", [None, True, False])
@pytest.mark.parametrize("add_bos", [None, True, False])
def test_without_a_tokenizer_json_the_settings_say_it(add_bos, add_eos, tmp_path):
    settings = {"tokenizer_class": "LlamaTokenizer"}
    settings |= {} if add_bos is None else {"add_bos_token": add_bos}
    settings |= {} if add_eos is None else {"add_eos_token": add_eos}
    n = tiny.sentencepiece(tmp_path, settings).vocab_size()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    own = AutoTokenizer.from_pretrained(tmp_path)
    with load(tmp_path, n) as model:
        assert model.tokenize("some text") == own("some text")["input_ids"]


def test_whether_a_second_text_has_a_separator_of_its_own(tmp_path):
    """Rerankers: XLM-R's family puts </s></s> between query and text."""
    tokenizer = build(tmp_path)
    assert "ggml.add_sep_token" not in values(tmp_path)
    tokenizer.post_processor = processors.RobertaProcessing(("<|end|>", 1), ("<|begin|>", 0))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = values(tmp_path)
    assert (found["ggml.add_sep_token"], found["ggml.seperator_token_id"]) == (True, 1)
    tokenizer.post_processor = processors.BertProcessing(("<|end|>", 1), ("<|begin|>", 0))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert "ggml.add_sep_token" not in values(tmp_path)


def test_what_is_put_around_a_text_counts_more_than_what_is_named(tmp_path):
    tokenizer = build(tmp_path)
    tokenizer.post_processor = template("[tool▁call] $A <|begin|>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    own = AutoTokenizer.from_pretrained(tmp_path)
    with load(tmp_path) as model:
        assert model.tokenize("text") == own("text")["input_ids"]
        assert own.eos_token_id in model.end_tokens
    said = " ".join(tokenizer_metadata(tmp_path, 3100).notes)
    assert "puts [tool▁call] in front of every text" in said
    assert "will also end a text at <|begin|> (0)" in said


def test_more_tokens_behind_a_text_than_llama_cpp_puts_are_refused(tmp_path):
    tokenizer = build(tmp_path)
    tokenizer.post_processor = template("$A <|end|> <|end|>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConvertError, match="puts one at most"):
        tokenizer_metadata(tmp_path, 3100)


def test_more_tokens_in_front_of_a_text_than_llama_cpp_puts_are_left_to_the_chat_template(tmp_path):
    tokenizer = build(tmp_path)
    tokenizer.post_processor = template("<|begin|> [tool▁call] $A")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert "puts the tokens [0, 3000] in front of every text" in " ".join(tokenizer_metadata(tmp_path, 3100).notes)
    assert values(tmp_path)["ggml.add_bos_token"] is False
    with load(tmp_path) as model:
        assert model.tokenize("<|begin|>[tool▁call]text") == tokenizer.encode("text").ids


def test_roles_by_the_tokenizer_or_else_by_the_configuration(tmp_path):
    build(tmp_path)
    change_json(tmp_path / "tokenizer_config.json", lambda content: content.update(pad_token="[über]"))
    configured = {"bos_token_id": 5, "pad_token_id": 6, "unk_token_id": 7, "sep_token_id": 8, "mask_token_id": 9}
    (tmp_path / "config.json").write_text(json.dumps(configured | {"model_type": "llama"}))
    found = values(tmp_path)
    own = AutoTokenizer.from_pretrained(tmp_path)
    assert found["ggml.bos_token_id"] == own.bos_token_id == 0
    assert found["ggml.padding_token_id"] == own.pad_token_id == 3001
    assert (found["ggml.unknown_token_id"], found["ggml.seperator_token_id"], found["ggml.mask_token_id"]) == (7, 8, 9)


@pytest.mark.parametrize("nothing", [-1, None])
def test_minus_one_stands_for_no_token(nothing, tmp_path):
    build(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"pad_token_id": nothing, "unk_token_id": nothing}))
    assert not {"ggml.padding_token_id", "ggml.unknown_token_id"} & values(tmp_path).keys()


@pytest.mark.parametrize(("value", "what"), [(3100, "has 3100"), (-7, "has -7"), ("a", "is 'a'"), (True, "is 'True'")])
def test_what_is_no_id_of_the_model(value, what, tmp_path):
    build(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"pad_token_id": value}))
    with pytest.raises(ConvertError, match=what) as caught:
        tokenizer_metadata(tmp_path, 3100)
    assert caught.value.where == f"{tmp_path / 'config.json'}: pad_token_id"


def test_a_token_that_the_tokenizer_names_but_does_not_have(tmp_path):
    build(tmp_path)
    change_json(tmp_path / "tokenizer_config.json", lambda content: content.update(pad_token="[PAD]"))
    metadata = tokenizer_metadata(tmp_path, 3100)
    assert metadata.notes == ("The tokenizer's pad_token [PAD] is none of its tokens, and is left out.",)
    assert "tokenizer.ggml.padding_token_id" not in metadata.values
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).token_to_id("[PAD]") is None
