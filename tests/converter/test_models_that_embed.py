"""Models that embed texts: judged by their tensors, whatever their class is called, and never measured by gradients."""

import json
import shutil
from pathlib import Path

import pytest

from bitwright import converter
from bitwright.converter.directory.files import finished_files, is_written_name
from bitwright.converter.model.model_map import describe
from bitwright.converter.source.open import open_checkpoint
from bitwright.converter.source.sentence_transformers import embedding_facts
from bitwright.formats.errors import ConvertError
from tests.tiny_architectures import ALL_TINY_MODELS
from tests.tiny_models import checkpoint

SHORT = {"samples": 128, "sequence_length": 16, "calibration": "embedded", "threads": 1, "device": "cpu", "quiet": True}


def without_pooling(name: str, model_class: str, directory: Path) -> Path:
    """The tiny model as its makers trained it: under another class, without sentence-transformers' files."""
    copy = shutil.copytree(checkpoint(name, ALL_TINY_MODELS[name]), directory / name)
    (copy / "modules.json").unlink(missing_ok=True)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": [model_class]}))
    return copy


@pytest.mark.parametrize(
    ("name", "model_class"), [("bert", "BertForMaskedLM"), ("xlm-roberta", "XLMRobertaForMaskedLM")]
)
def test_a_model_trained_to_fill_in_words_is_judged_by_its_tensors(tmp_path, name, model_class):
    model = without_pooling(name, model_class, tmp_path)
    assert not describe(open_checkpoint(str(model))).predicts_tokens
    report = converter.convert(str(model), profile="balanced-4bit", output=tmp_path / "out.gguf", **SHORT)
    assert report["quality"] is None and report["errors"]
    notes = json.loads((tmp_path / "out.bitwright" / "plan.json").read_text())["notes"]
    assert any("predicts no tokens" in note for note in notes)


@pytest.mark.parametrize("dense", [False, True])
def test_a_directory_pools_as_its_source(tmp_path, dense):
    model = shutil.copytree(checkpoint("qwen3-embedding", ALL_TINY_MODELS["qwen3-embedding"]), tmp_path / "model")
    if dense:
        modules = json.loads((model / "modules.json").read_text())
        modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
        (model / "modules.json").write_text(json.dumps(modules))
    output = tmp_path / "out"
    converter.convert(str(model), profile="w4a16", output=output, **SHORT)
    for name in ("modules.json", "1_Pooling/config.json"):
        assert (output / name).read_bytes() == (model / name).read_bytes()
        assert output / name in finished_files(output) and is_written_name(name)
    assert not is_written_name("1_Pooling/other.json") and not is_written_name("a/1_Pooling/config.json")
    config = json.loads((model / "config.json").read_text())
    facts = embedding_facts(model, config)
    assert embedding_facts(output, config) == facts and "pooling_type" in facts
    (plan,) = tmp_path.rglob("plan.json")
    notes = json.loads(plan.read_text())["notes"]
    assert any("names layers after the pooling" in note for note in notes) == dense


def test_what_takes_gradients_is_refused_before_the_work(tmp_path):
    model = checkpoint("qwen3-embedding", ALL_TINY_MODELS["qwen3-embedding"])
    options = {"profile": "budget", "target_bpw": 6.0, "output": tmp_path / "out.gguf"}
    with pytest.raises(ConvertError, match="predicts no tokens, and this job needs it run for its sensitivity"):
        converter.convert(str(model), **options, **SHORT)
    assert not list(tmp_path.rglob("*.gguf")) and not list(tmp_path.rglob("calibration*"))
