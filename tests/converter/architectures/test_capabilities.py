"""What is told of the architectures is what their data files say, and the page has the same table."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bitwright.converter.architectures import architecture as data_files
from bitwright.converter.architectures.architecture import TensorRule, architectures
from bitwright.converter.architectures.capabilities import CAPABILITIES, markdown_table, plain_table, supported
from bitwright.converter.measure.obstacles import Need, check_runs, obstacle
from bitwright.converter.model.module_map import describe_for_directory
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from tests.converter.commands import convert

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "architectures.md"


def test_the_page_has_the_table_of_the_data_files():
    """Where this fails: bitwright architectures --markdown."""
    assert f"\n\n{markdown_table(supported())}\n\n" in PAGE.read_text()


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md"])
def test_the_numbers_of_the_pages_are_those_of_the_data_files(page):
    model_types = {model_type for architecture in architectures() for model_type in architecture.model_types}
    counts = re.findall(r"(\d+) data files for (\d+) model types", (ROOT / page).read_text())
    assert counts == [(str(len(architectures())), str(len(model_types)))]


def test_the_page_names_what_keeps_layers_that_predict_several_tokens():
    (named,) = re.findall(r"^A GGUF has it where llama.cpp runs it: (.*)\.", PAGE.read_text(), re.MULTILINE)
    kept = [row["name"] for row in json.loads(convert("architectures", "--json").stdout) if row["mtp"]]
    assert re.findall(r"`(\w+)`", named.partition(". ")[0]) == kept


def test_every_data_file_and_every_model_type_is_listed():
    listed = json.loads(convert("architectures", "--json").stdout)
    assert [row["name"] for row in listed] == [architecture.name for architecture in architectures()]
    assert [row["model_types"] for row in listed] == [[*architecture.model_types] for architecture in architectures()]
    for row in listed:
        assert all(row[capability] != (capability in row["reasons"]) for capability in CAPABILITIES)
    lines = convert("architectures").stdout.splitlines()
    assert lines[0].split()[-5:] == ["GGUF", "directory", "calibration", "gradients", "smoothing"]
    assert all(line.startswith(row["name"]) for line, row in zip(lines[1:], listed, strict=False))


def test_data_files_name_only_what_can_be_lacking():
    for architecture in architectures():
        assert architecture.without.keys() <= set(CAPABILITIES) - {"gguf"}, architecture.name
        assert not (architecture.feeds and "smoothing" in architecture.without), architecture.name
        assert all(architecture.without.values()), architecture.name


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch):
    """lacking(directory="why"): the llama's data file says so, and feeds nothing. after: its last tensors."""
    (llama,) = (found for found in architectures() if found.name == "llama")

    def say(after: tuple[TensorRule, ...] = llama.after, **without: str) -> None:
        changed = replace(llama, without=without, feeds={}, after=after)
        monkeypatch.setattr(data_files, "architectures_named", lambda _: (changed,))
        monkeypatch.setattr("bitwright.converter.architectures.capabilities.architectures", lambda: (changed,))

    return say


def test_what_is_lacking_is_told_with_its_reason(lacking):
    lacking(calibration="its layers do not follow each other")
    (row,) = supported()
    assert row.lacking == dict.fromkeys(CAPABILITIES[2:], "its layers do not follow each other")
    assert plain_table([row]).splitlines()[-1] == "(1) its layers do not follow each other"
    assert "| yes | yes | no (1) | no (1) | no (1) |" in markdown_table([row])


def test_smoothing_takes_feeds_and_gradients_take_a_head(lacking):
    lacking()
    assert supported()[0].lacking == {"smoothing": "the data file has no [feeds]"}
    lacking(after=())
    assert supported()[0].lacking["gradients"] == "it predicts no tokens"


def test_what_a_data_file_excludes_is_not_tried(lacking, tiny):
    checkpoint = open_checkpoint(str(tiny("llama")))
    assert obstacle(checkpoint) is None
    lacking(calibration="its layers do not follow each other")
    with pytest.raises(ConvertError, match=r"its layers .* other, and this job needs it run for the importance"):
        check_runs(checkpoint, [Need.IMPORTANCE])
    lacking(gradients="its routers have none", directory="vLLM does not know it")
    check_runs(checkpoint, [Need.IMPORTANCE, Need.QUALITY])
    with pytest.raises(ConvertError, match="its routers have none, and this job needs it run for its sensitivity"):
        check_runs(checkpoint, [Need.SENSITIVITY])
    with pytest.raises(ConvertError, match="no directory is made of the architecture 'llama': vLLM does not know it"):
        describe_for_directory(checkpoint)
