"""The chat templates that a GGUF gets, against those that transformers' tokenizer has."""

import json

import pytest
from transformers import AutoTokenizer

from bitwright.converter.tokenizer.vocabulary import tokenizer_metadata
from bitwright.formats.errors import ConvertError
from tests.converter.tokenizer.tokenizer_checks import build, change_json, values

NAMED = {"default": "{{ listed }}", "tool_use": "{{ tools }}", "rag": "{{ rag }}"}


@pytest.mark.parametrize(
    "settings",
    [
        None,
        "{{ settings }}",
        NAMED,
        [{"name": name, "template": template} for name, template in NAMED.items()],
        {"rag": "{{ rag }}"},
    ],
    ids=["none", "text", "dict", "list", "no-default"],
)
@pytest.mark.parametrize(
    "files",
    [
        {},
        {"chat_template.jinja": "{{ file }}\r\n"},
        {"chat_template.jinja": "{{ file }}", "additional_chat_templates/tool_use.jinja": "{{ tools of a file }}"},
        {"additional_chat_templates/rag.jinja": "{{ rag of a file }}"},
    ],
    ids=["", "file", "files", "directory"],
)
def test_templates_are_those_of_transformers(settings, files, tmp_path, capfd):
    build(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "additional_chat_templates").mkdir()
    change_json(tmp_path / "tokenizer_config.json", lambda content: content.update(chat_template=settings))
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode())
    own = AutoTokenizer.from_pretrained(tmp_path).chat_template
    own = {} if own is None else {"default": own} if isinstance(own, str) else dict(own)
    capfd.readouterr()
    found = values(tmp_path)
    assert found.get("chat_template") == own.pop("default", None)
    assert found.get("chat_templates") == (sorted(own) or None)
    assert {name: found[f"chat_template.{name}"] for name in own} == own
    assert capfd.readouterr() == ("", "")
    said = " ".join(tokenizer_metadata(tmp_path, 3100).notes)
    assert ("transformers uses the files" in said) is bool(settings and files)
    assert ("None of the chat templates is the default one" in said) is ("chat_template" not in found and bool(own))


def test_the_template_of_a_processor_counts_where_the_tokenizer_has_none(tmp_path):
    build(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ processor }}"}))
    assert values(tmp_path)["chat_template"] == "{{ processor }}"
    (tmp_path / "chat_template.jinja").write_text("{{ file }}")
    assert values(tmp_path)["chat_template"] == "{{ file }}"


def test_names_are_spelt_in_the_alphabet_of_keys(tmp_path):
    build(tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool-use.jinja").write_text("{{ tools }}")
    assert values(tmp_path)["chat_template.tool_use"] == "{{ tools }}"
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ others }}")
    with pytest.raises(ConvertError, match="'tool_use' has no name of its own in a GGUF"):
        tokenizer_metadata(tmp_path, 3100)


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (5, "'chat_template' is '5', where a text is expected"),
        ({"default": ["a"]}, "'default' is .* where a text is expected"),
        ([{"template": "a"}], "a chat template has no name"),
        ([{"name": "a", "template": 5}], "'template' is '5', where a text is expected"),
        (["a"], "'chat_template' is 'a', where an object is expected"),
        ("\ud800", "is no text"),
    ],
)
def test_what_is_no_template(template, what, tmp_path):
    build(tmp_path)
    change_json(tmp_path / "tokenizer_config.json", lambda content: content.update(chat_template=template))
    with pytest.raises(ConvertError, match=what):
        tokenizer_metadata(tmp_path, 3100)


def test_a_template_that_is_not_utf_8(tmp_path):
    build(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ConvertError, match="chat template cannot be read") as caught:
        tokenizer_metadata(tmp_path, 3100)
    assert caught.value.where == str(tmp_path / "chat_template.jinja")
