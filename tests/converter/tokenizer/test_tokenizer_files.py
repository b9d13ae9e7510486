"""Missing, damaged and senseless files of a tokenizer: three lines each, and never another exception."""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer
from transformers.models.auto import tokenization_auto as auto

from bitwright.converter.architectures.architecture import architectures
from bitwright.converter.tokenizer.end_of_generation import source_end_tokens
from bitwright.converter.tokenizer.files import TokenizerFiles, tokenizer_classes
from bitwright.converter.tokenizer.vocabulary import tokenizer_metadata
from bitwright.formats.errors import ConvertError
from tests import tiny_tokenizers as tiny
from tests.converter.tokenizer.tokenizer_checks import build, change_json

NAMES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("config.json", "generation_config.json", "chat_template.json"),
)


def test_missing_files(tmp_path):
    with pytest.raises(ConvertError, match=r"neither tokenizer.json nor tokenizer.model"):
        tokenizer_metadata(tmp_path, 100)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"", b"\xff" * 100])
def test_what_is_no_tokenizer_model(content, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ConvertError, match="not a model of SentencePiece"):
        tokenizer_metadata(tmp_path, 100)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"{", "is no JSON"),
        (b"[]", "no JSON object"),
        (b"\xff", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
    ],
    ids=["cut", "list", "bytes", "deep"],
)
def test_what_is_no_json_object(name, content, what, tmp_path):
    build(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConvertError, match=what) as caught:
        tokenizer_metadata(tmp_path, 3100)
    assert caught.value.where == str(tmp_path / name)


def test_a_file_that_cannot_be_opened(tmp_path):
    build(tmp_path)
    (tmp_path / "added_tokens.json").mkdir()
    with pytest.raises(ConvertError, match="the file cannot be read: it is a directory"):
        tokenizer_metadata(tmp_path, 3100)


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
        (lambda content: content["model"]["vocab"].update(x=True), "'x' with the id True is no token"),
        (lambda content: content["added_tokens"][-1].update(content="\ud800"), "is no text"),
        (lambda content: content["added_tokens"].append({"id": 5}), "None with the id 5 is no token"),
        (lambda content: content["added_tokens"].append("a"), "'added_tokens' is 'a', where an object is expected"),
        (lambda content: content["model"]["merges"].append("alone"), "a merge has not two parts"),
        (lambda content: content["model"]["merges"].append(["a", "b", "c"]), "a merge has not two parts"),
        (lambda content: content["model"]["merges"].append(["a", 5]), "a merge has not two parts"),
        (lambda content: content["model"]["merges"].append(["a", "\u00e4\u00f6"]), "which is no token"),
        (lambda content: content.update(model=[]), "'model' is '\\[\\]', where an object is expected"),
        (lambda content: content.update(decoder="ByteLevel"), "'decoder' is 'ByteLevel', where an object is expected"),
        (lambda content: content.update(normalizer=5), "'normalizer' is '5', where an object is expected"),
        (lambda content: content["pre_tokenizer"].update(pretokenizers=5), "'pretokenizers' is '5', where a list"),
        (lambda content: content.update(post_processor={"type": "Unheard"}), "cannot do this step of the tokenizer"),
        (
            lambda content: content.update(
                post_processor={"type": "BertProcessing", "cls": ["a", 2**70], "sep": ["b", 1]}
            ),
            "token id 1180591620717411303424",
        ),
    ],
)
def test_damaged_tokens(damage, what, tmp_path):
    build(tmp_path)
    change_json(tmp_path / "tokenizer.json", damage)
    with pytest.raises(ConvertError, match=what):
        tokenizer_metadata(tmp_path, 3100)


@pytest.mark.parametrize("kind", ["WordLevel", "Unheard"])
def test_other_kinds_are_named(kind, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": kind, "vocab": {}}}))
    with pytest.raises(ConvertError, match=f"of the kind '{kind}' cannot be converted"):
        tokenizer_metadata(tmp_path, 100)


def test_the_table_of_classes_is_that_of_transformers():
    classes = tokenizer_classes()
    wrong = auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    generic = ("TokenizersBackend", "MistralCommonBackend")
    for model_type in classes["generic"]:
        assert auto.TOKENIZER_MAPPING_NAMES[model_type] in generic, model_type
    for model_type, name in classes["fixed"].items():
        assert auto.TOKENIZER_MAPPING_NAMES[model_type] == name and model_type in wrong
    for model_type, name in classes["default"].items():
        assert auto.TOKENIZER_MAPPING_NAMES[model_type] == name and model_type not in wrong
    listed = {*classes["generic"], *classes["fixed"], *classes["default"]}
    ours = {name for architecture in architectures() for name in architecture.model_types}
    assert ours & auto.TOKENIZER_MAPPING_NAMES.keys() <= listed


@pytest.mark.parametrize(
    ("name", "whose"),
    [("tekken.json", "Mistral's own"), ("tiktoken.model", "tiktoken's"), ("hy.tiktoken", "tiktoken's")],
)
def test_files_of_other_programs_are_named(name, whose, tmp_path):
    (tmp_path / name).write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    with pytest.raises(ConvertError, match=f"no tokenizer.json: {name} is {whose}") as caught:
        tokenizer_metadata(tmp_path, 100)
    assert "take the tokenizer.json of the same model" in caught.value.remedy


@pytest.mark.parametrize("model_type", ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma3", "phi3"])
def test_the_class_is_the_one_that_transformers_runs(model_type, tmp_path):
    tiny.sentencepiece(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for stated in (None, "LlamaTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", "GemmaTokenizer"):
        settings = {} if stated is None else {"tokenizer_class": stated}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        own = type(AutoTokenizer.from_pretrained(tmp_path)).__name__
        assert TokenizerFiles.read(tmp_path).tokenizer_class == own, stated


# ---- any value of any kind in any place


def whole_byte_level(directory: Path) -> None:
    """A byte-level tokenizer, small, with every part that is read."""
    tokenizer = build(directory)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC()])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(),
            processors.TemplateProcessing("<|begin|> $A", "$A $B", [("<|begin|>", 0)]),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel()])
    tokenizer.save(str(directory / "tokenizer.json"))
    change_json(directory / "tokenizer.json", _make_small)
    _whole(directory)


def _make_small(content: dict[str, Any]) -> None:
    """The same BPE with a few merges only."""
    model = content["model"]
    kept = [merge for merge in model["merges"][:30]]
    letters = {text: index for text, index in model["vocab"].items() if len(text) == 1 or text.startswith("<|")}
    merged = {left + right: model["vocab"][left + right] for left, right in kept}
    texts = sorted(letters | merged, key=(letters | merged).__getitem__)
    model.update(vocab={text: index for index, text in enumerate(texts)}, merges=kept)
    for index, token in enumerate(content["added_tokens"][2:], len(texts)):
        token["id"] = index


def whole_byte_fallback(directory: Path) -> None:
    """A BPE with byte fallback, with every part that is read."""
    tokenizer: Tokenizer = tiny.byte_fallback(
        directory, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.save(str(directory / "tokenizer.json"))
    change_json(directory / "tokenizer_config.json", lambda content: content.update(tokenizer_class="LlamaTokenizer"))
    _whole(directory)


def _whole(directory: Path) -> None:
    last = json.loads((directory / "tokenizer.json").read_text())["added_tokens"][-1]["id"]
    settings = {
        "added_tokens_decoder": {str(last + 1): {"content": "[one]", "special": True, "lstrip": True}},
        "chat_template": [{"name": "default", "template": "a"}],
        "add_prefix_space": False,
        "add_bos_token": True,
        "legacy": False,
        "pad_token": {"content": "[one]"},
    }
    change_json(directory / "tokenizer_config.json", lambda content: content.update(settings))
    (directory / "special_tokens_map.json").write_text('{"unk_token": {"content": "[one]"}}')
    (directory / "added_tokens.json").write_text('{"[late]": 3050}')
    (directory / "config.json").write_text(
        '{"model_type": "llama", "eos_token_id": [1], "text_config": {"pad_token_id": 2}}'
    )
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside; of the longest lists and objects the first three and the last."""
    yield path
    inside: list[Any] = []
    if isinstance(value, dict):
        inside = list(value)
    elif isinstance(value, list):
        inside = list(range(len(value)))
    for key in inside if len(inside) < 20 else [*inside[:3], inside[-1]]:
        yield from places(value[key], (*path, key))


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 7, 1e300, float("nan"), "", "a", "\ud800", [], [None], ["a", "b"], [[1]], {}),
    *({"a": 1}, {"type": "Sequence"}, 2**70),
)


@pytest.mark.parametrize("whole", [whole_byte_level, whole_byte_fallback])
def test_a_value_of_any_kind_in_any_place(whole, tmp_path):
    """Converted or refused in three lines, whatever stands there."""
    whole(tmp_path)
    tokenizer_metadata(tmp_path, 3100)
    source = random.Random(1)
    n_refused = n_taken = 0
    for path in sorted(tmp_path.glob("*.json")):
        content = json.loads(path.read_text())
        for place in places(content):
            if not place:
                continue
            for value in source.sample(VALUES, 2):
                changed = copy.deepcopy(content)
                holder = changed
                for key in place[:-1]:
                    holder = holder[key]
                holder[place[-1]] = value
                path.write_text(json.dumps(changed))
                try:
                    tokenizer_metadata(tmp_path, 3100)
                    source_end_tokens(tmp_path)
                    n_taken += 1
                except ConvertError:
                    n_refused += 1
        path.write_text(json.dumps(content))
    assert n_refused > 100 and n_taken > 20
