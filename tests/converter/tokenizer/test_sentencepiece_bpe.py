"""Tokens of SentencePiece's BPE by llama.cpp, from the metadata that we write, against those of transformers."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import GGUFValueType, TokenType
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from bitwright.converter.judge.llama_cpp import LlamaCpp
from bitwright.converter.tokenizer.vocabulary import tokenizer_metadata
from bitwright.formats.errors import ConvertError
from tests import tiny_tokenizers as tiny
from tests.converter.tokenizer.tokenizer_checks import ALL_TEXTS, change_json, differing, load, values

# Texts that transformers and llama.cpp put a space in front of, or both do not.
UNSPACED = [text for text in ALL_TEXTS if text[:1] not in (" ", "")]


GEMMA_OPTIONS = {
    "add_dummy_prefix": False,
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
    "user_defined_symbols": ["<start_of_turn>", "\n", "\n\n", "▁▁", "▁▁▁"],
}


@pytest.mark.parametrize("options", [{}, GEMMA_OPTIONS], ids=["llama", "gemma"])
def test_sentencepiece(options, tmp_path):
    processor = tiny.sentencepiece(tmp_path, **options)
    n = processor.vocab_size()
    named = {str(i): {"content": processor.id_to_piece(i), "special": True} for i in range(3)}
    named |= {str(i): {"content": processor.id_to_piece(i), "special": False} for i in range(4, 9) if options}
    named[str(n)] = {"content": "[user▁defined]", "special": False}
    settings = {
        "tokenizer_class": "GemmaTokenizer" if options else "LlamaTokenizer",
        "bos_token": processor.id_to_piece(processor.bos_id()),
        "add_bos_token": True,
        "added_tokens_decoder": named,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[later]": n + 1}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "bos_token_id": processor.bos_id()}))

    metadata = tokenizer_metadata(tmp_path, n + 4).values
    found = values(tmp_path, n + 4)
    assert found["ggml.model"] == "llama" and found["ggml.pre"] == "default"
    assert found["ggml.tokens"][n:] == ["[user defined]", "[later]", f"[PAD{n + 2}]", f"[PAD{n + 3}]"]
    assert found["ggml.token_type"][n:] == [TokenType.USER_DEFINED] * 2 + [TokenType.UNUSED] * 2
    assert found["ggml.scores"][n:] == [-1000.0, -1000.0, -10000.0, -10000.0]
    assert found["ggml.scores"][n - 1] == processor.get_score(n - 1)
    assert found["ggml.token_type"][processor.piece_to_id("<0x0A>")] == TokenType.BYTE
    assert found["ggml.bos_token_id"] == processor.bos_id()
    assert metadata["tokenizer.ggml.scores"].type == GGUFValueType.ARRAY
    assert ("tokenizer.ggml.add_space_prefix" in metadata) is bool(options)

    with load(tmp_path, n + 4) as model:
        for text in ALL_TEXTS:
            assert model.tokenize(text, add_special=False, parse_special=False) == processor.encode(text), text
        assert model.tokenize("text") == [processor.bos_id(), *processor.encode("text")]


@pytest.mark.parametrize(("kind", "name"), [("word", "word"), ("char", "character")])
def test_other_kinds_of_sentencepiece_are_refused(kind, name, tmp_path):
    tiny.sentencepiece(tmp_path, model_type=kind, vocab_size=200, byte_fallback=False, hard_vocab_limit=False)
    with pytest.raises(ConvertError, match=f"kind {name} cannot be converted"):
        tokenizer_metadata(tmp_path, 560)


@pytest.mark.parametrize("model_type", ["gemma4", "gemma4_text"])
def test_gemma_4_has_a_kind_of_its_own(model_type, tmp_path):
    split = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer = tiny.byte_fallback(tmp_path, normalizers.Replace(" ", "▁"), split)
    tokenizer.add_special_tokens(["<|tool_call>", "<turn|>"])
    tokenizer.add_tokens([AddedToken("▁▁", normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    change_json(tmp_path / "config.json", lambda content: content.update(model_type=model_type))
    n = tokenizer.get_vocab_size()
    found = values(tmp_path, n)
    assert found["ggml.model"] == "gemma4" and "ggml.pre" not in found
    assert found["ggml.add_space_prefix"] is False
    kinds = dict(zip(found["ggml.tokens"], found["ggml.token_type"], strict=True))
    assert (kinds["<|tool_call>"], kinds["<turn|>"], kinds["<0x41>"]) == (4, 3, 6)
    assert set(found["ggml.scores"]) == {-1000.0}
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert found["ggml.merges"] == [" ".join(merge) for merge in merges]
    with load(tmp_path, n) as model:
        assert differing(model, tokenizer, [*ALL_TEXTS, "a<turn|>b<|tool_call>"]) == []
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConvertError, match="no space in front of a text of Gemma 4"):
        tokenizer_metadata(tmp_path, n)


# ---- tokenizer.model alone, as transformers rebuilds it


def saved(directory: Path, settings: dict[str, Any], model_type: str = "llama", **options: Any) -> int:
    """A directory with a tokenizer.model alone; returns its number of tokens."""
    n = tiny.sentencepiece(directory, settings, **options).vocab_size()
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    return n


def notes(directory: Path, vocab_size: int) -> str:
    return "\n".join(tokenizer_metadata(directory, vocab_size).notes)


@pytest.mark.parametrize("dummy_prefix", [True, False])
@pytest.mark.parametrize(
    ("model_type", "tokenizer_class", "prefix"),
    [
        ("llama", "LlamaTokenizer", True),
        ("llama", None, False),
        ("mistral", "LlamaTokenizerFast", False),
        ("mixtral", "LlamaTokenizer", False),
        ("phi3", "LlamaTokenizer", False),
        ("gemma3_text", "GemmaTokenizer", False),
        ("gemma3_text", None, False),
    ],
)
def test_the_leading_space_is_that_of_transformers(model_type, tokenizer_class, prefix, dummy_prefix, tmp_path):
    settings = {"bos_token": "<s>", "eos_token": "</s>", "mask_token": None}
    settings |= {"tokenizer_class": tokenizer_class} if tokenizer_class else {}
    n = saved(tmp_path, settings, model_type, add_dummy_prefix=dummy_prefix, pad_id=3)
    own = AutoTokenizer.from_pretrained(tmp_path)
    assert own.tokenize("1")[0].startswith("▁") is prefix
    with load(tmp_path, n) as model:
        for text in UNSPACED:
            assert model.tokenize(text) == own(text)["input_ids"], text
    assert ("add_dummy_prefix" in notes(tmp_path, n)) is (prefix != dummy_prefix)


def test_the_leading_space_of_tokenizer_config(tmp_path):
    n = saved(tmp_path, {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False})
    own = AutoTokenizer.from_pretrained(tmp_path)
    with load(tmp_path, n) as model:
        for text in ALL_TEXTS:
            assert model.tokenize(text) == own(text)["input_ids"], text
    change_json(tmp_path / "config.json", lambda content: content.update(model_type="mistral"))
    change_json(tmp_path / "tokenizer_config.json", lambda content: content.update(add_prefix_space=True))
    assert values(tmp_path, n)["ggml.add_space_prefix"] is False
    assert "add_prefix_space = true, but transformers' TokenizersBackend puts none" in notes(tmp_path, n)


def test_where_llama_cpp_puts_spaces_of_its_own_is_said(tmp_path):
    n = saved(tmp_path, {"tokenizer_class": "LlamaTokenizer"}, user_defined_symbols=["<sym>"])
    own = AutoTokenizer.from_pretrained(tmp_path)
    assert "none behind special and added tokens" in notes(tmp_path, n)
    with load(tmp_path, n) as model:
        assert model.tokenize("a<sym>") == own("a<sym>")["input_ids"]
        for text in (" a", "a<sym>b"):
            assert model.tokenize(text) != own(text)["input_ids"], text
    change_json(tmp_path / "tokenizer_config.json", lambda content: content.update(legacy=True))
    assert "starts with none only." in notes(tmp_path, n)
    own = AutoTokenizer.from_pretrained(tmp_path)
    with load(tmp_path, n) as model:
        assert model.tokenize("a<sym>b") == own("a<sym>b")["input_ids"]
        assert model.tokenize(" a") != own(" a")["input_ids"]


def test_user_defined_symbols_stay_so(tmp_path):
    symbols = ["<sym>", "▁▁▁▁▁", "[x]"]
    settings = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}
    n = saved(tmp_path, settings, user_defined_symbols=symbols, add_dummy_prefix=False)
    processor = tiny.load_sentencepiece(tmp_path)
    found = values(tmp_path, n)
    ids = [processor.piece_to_id(symbol) for symbol in symbols]
    assert [found["ggml.token_type"][i] for i in ids] == [TokenType.USER_DEFINED] * 3
    assert [found["ggml.tokens"][i] for i in ids] == ["<sym>", " " * 5, "[x]"]
    with load(tmp_path, n) as model:
        for text in (*ALL_TEXTS, "a<sym>b[x]", "a      b", "<sym>[x]<sym>"):
            assert model.tokenize(text, parse_special=False) == processor.encode(text), text


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "normalization_rule_name = nmt_nfkc"),
        ({"normalization_rule_name": "nfkc_cf"}, "normalization_rule_name = nfkc_cf"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix = true"),
        ({"byte_fallback": False}, r"no byte tokens \(256 of 256|no byte tokens \(1.. of 256"),
    ],
)
def test_what_a_sentencepiece_model_does_and_llama_cpp_does_not_is_refused(options, what, tmp_path):
    n = saved(tmp_path, {"tokenizer_class": "LlamaTokenizer"}, **options)
    with pytest.raises(ConvertError, match=what) as caught:
        tokenizer_metadata(tmp_path, n)
    assert caught.value.where == str(tmp_path / "tokenizer.model")


def test_spaces_that_are_not_escaped_are_refused(tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    n = saved(tmp_path, {})
    messages: Any = sentencepiece_model_pb2
    model = messages.ModelProto.FromString((tmp_path / "tokenizer.model").read_bytes())
    model.normalizer_spec.escape_whitespaces = False
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(ConvertError, match="escape_whitespaces = false"):
        tokenizer_metadata(tmp_path, n)


def test_spaces_that_only_sentencepiece_would_remove_are_said(tmp_path):
    n = saved(tmp_path, {"tokenizer_class": "LlamaTokenizer"}, remove_extra_whitespaces=True)
    own, processor = AutoTokenizer.from_pretrained(tmp_path), tiny.load_sentencepiece(tmp_path)
    assert "remove_extra_whitespaces" in notes(tmp_path, n)
    with load(tmp_path, n) as model:
        found = model.tokenize("two  spaces")
    assert found == own("two  spaces")["input_ids"] != processor.encode("two  spaces")


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_without_an_embedding_are_left_out_and_named(name, tmp_path):
    n = saved(tmp_path, {"tokenizer_class": "LlamaTokenizer"})
    late = {"[late]": n} if name == "added_tokens.json" else {"added_tokens_decoder": {str(n): {"content": "[late]"}}}
    change_json(tmp_path / name, lambda content: content.update(late))
    assert f"that are left out: [late] ({n})." in notes(tmp_path, n)
    assert "[late]" not in values(tmp_path, n)["ggml.tokens"]
    assert "[late]" not in notes(tmp_path, n + 1) and values(tmp_path, n + 1)["ggml.tokens"][n] == "[late]"


def test_a_model_with_fewer_embeddings_than_pieces_is_refused(tmp_path):
    n = saved(tmp_path, {"tokenizer_class": "LlamaTokenizer"})
    with pytest.raises(ConvertError, match=rf"token id {n - 1} \(.*embeddings for {n - 1} tokens only"):
        tokenizer_metadata(tmp_path, n - 1)


# ---- tokenizer.model and tokenizer.json


def both(directory: Path, **settings: Any) -> int:
    """A directory that has the tokenizer.json that transformers makes of a tokenizer.model beside it."""
    n = saved(directory, {"tokenizer_class": "LlamaTokenizer", **settings})
    AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
    return n


def test_the_scores_are_those_of_the_model_that_tokenizer_json_repeats(tmp_path):
    n = both(tmp_path)
    change_json(
        tmp_path / "tokenizer.json",
        lambda content: content["added_tokens"].append({"id": n, "content": "<|user|>", "special": False}),
    )
    found = values(tmp_path, n + 1)
    assert found["ggml.scores"][400] == tiny.load_sentencepiece(tmp_path).get_score(400)
    assert found["ggml.tokens"][n] == "<|user|>"
    assert found["ggml.token_type"][n] == TokenType.CONTROL  # it looks special
    own = AutoTokenizer.from_pretrained(tmp_path)
    with load(tmp_path, n + 1) as model:
        for text in (*UNSPACED, "a<|user|>"):
            assert model.tokenize(text) == own(text)["input_ids"], text


def test_a_tokenizer_model_that_is_another_ones_is_left_alone(tmp_path):
    """transformers takes tokenizer.json."""
    n = both(tmp_path)
    tiny.sentencepiece(tmp_path / "other", vocab_size=900, pad_id=3)
    (tmp_path / "other" / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    own = AutoTokenizer.from_pretrained(tmp_path)
    with load(tmp_path, n) as model:
        for text in UNSPACED:
            assert model.tokenize(text) == own(text)["input_ids"], text


@pytest.mark.parametrize("alone", [False, True])
def test_what_tokenizer_json_is_refused_for_tokenizer_model_is_refused_for(alone, tmp_path):
    n = both(tmp_path)
    if alone:
        (tmp_path / "tokenizer.model").unlink()
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConvertError, match=r"cannot do this step of the tokenizer: .*Lowercase"):
        tokenizer_metadata(tmp_path, n)
    change_json(tmp_path / "tokenizer.json", lambda content: content["model"].update(type="WordLevel"))
    with pytest.raises(ConvertError, match="kind 'WordLevel' cannot be converted"):
        tokenizer_metadata(tmp_path, n)


def test_a_tokenizer_json_without_byte_tokens_is_refused(tmp_path):
    """llama.cpp would end at the first character that it does not know."""
    tokenizer = tiny.byte_fallback(tmp_path, normalizers.Replace(" ", "▁"), None)
    tokenizer_metadata(tmp_path, 2000)
    change_json(
        tmp_path / "tokenizer.json",
        lambda content: content["model"]["vocab"].update({"<0xfe>": content["model"]["vocab"].pop("<0xFE>")}),
    )
    with pytest.raises(ConvertError, match="1 of 256 are missing, the first is <0xFE>"):
        tokenizer_metadata(tmp_path, 2000)
    assert tokenizer.get_vocab_size() < 2000


def test_settings_of_added_tokens_are_said_here_too(tmp_path):
    tokenizer = tiny.byte_fallback(tmp_path, normalizers.Replace(" ", "▁"), None)
    tokenizer.add_tokens([AddedToken("[right]", rstrip=True, normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert notes(tmp_path, 2000).endswith("tokens of its own: [right].")
    with load(tmp_path, 2000) as model:
        assert differing(model, tokenizer, ["a[right] b"]) and not differing(model, tokenizer, ["a[right]b"])


# ---- tokenizer.json alone


def test_added_runs_of_spaces_are_made_by_merges(tmp_path):
    """Gemma's, which transformers looks for before spaces become ▁, and so never finds."""
    tokenizer = tiny.byte_fallback(tmp_path, normalizers.Replace(" ", "▁"), None)
    runs = ["▁▁", "▁▁▁"]
    assert all(tokenizer.token_to_id(run) for run in runs)
    tokenizer.add_tokens([AddedToken(run, normalized=False) for run in runs])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = values(tmp_path, 2000)
    assert [found["ggml.token_type"][tokenizer.token_to_id(run)] for run in runs] == [TokenType.NORMAL] * 2
    with load(tmp_path, 2000) as model:
        assert differing(model, tokenizer, [*ALL_TEXTS, *(f"a{' ' * n}b" for n in range(40))]) == []


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "adds_prefix"),
    [
        (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, True),
        (normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), False),
        (None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False), False),
        (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), True),
    ],
    ids=["llama-2", "gemma-3", "metaspace", "mistral-v0.3"],
)
def test_sentencepiece_rewritten_as_merges(normalizer, pre_tokenizer, adds_prefix, tmp_path):
    tokenizer = tiny.byte_fallback(tmp_path, normalizer, pre_tokenizer)
    n = tokenizer.get_vocab_size()
    metadata = tokenizer_metadata(tmp_path, n + 2).values
    assert (
        metadata["tokenizer.ggml.model"].value == "llama"
        and metadata["tokenizer.ggml.token_type"].value[3] == TokenType.BYTE
    )
    assert metadata["tokenizer.ggml.tokens"].value[n - 1] == "[INST]"
    assert metadata.get("tokenizer.ggml.add_space_prefix") == (
        None if adds_prefix else gguf.gguf_writer.GGUFValue(False, GGUFValueType.BOOL)
    )
    # Metaspace "first" puts no second space before a text that starts with one; llama.cpp knows "always" only.
    texts = [text for text in ALL_TEXTS if text[:1] != " " or normalizer or not adds_prefix]
    with load(tmp_path, n + 2) as model:
        assert differing(model, tokenizer, texts) == []


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "what"),
    [
        (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=True), "cannot do this step"),
        (normalizers.NFKC(), pre_tokenizers.Metaspace(split=False), "cannot do this step"),
        (None, None, "does not write spaces"),
    ],
)
def test_steps_that_llama_cpp_does_not_do_are_refused(normalizer, pre_tokenizer, what, tmp_path):
    tiny.byte_fallback(tmp_path, normalizer, pre_tokenizer)
    with pytest.raises(ConvertError, match=what):
        tokenizer_metadata(tmp_path, 2000)


def test_scores_from_merges_are_what_makes_the_tokens_right(tmp_path):
    tokenizer = tiny.byte_fallback(tmp_path, normalizers.Replace(" ", "▁"), None)
    metadata = tokenizer_metadata(tmp_path, 2000).values
    metadata["tokenizer.ggml.scores"].value = [-1000.0] * 2000  # what llama.cpp's converter writes
    with LlamaCpp(tiny.write_vocabulary(tmp_path / "flat.gguf", metadata), vocab_only=True) as model:
        assert differing(model, tokenizer, ALL_TEXTS)
