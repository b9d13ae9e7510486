"""A model does not decide where its artifact is written."""

import shutil
from pathlib import Path

import pytest

from bitwright.converter.job.work_directory import default_work_dir
from tests.converter.commands import PLAIN, done, refused, snapshot


def hostile_card(model: Path) -> None:
    (model / "README.md").write_text(
        '---\nmodel_name: "../../../evil"\nversion: "../x"\nfinetune: "..\\\\y\\u0000z"\n---\n'
    )


@pytest.mark.parametrize("profile", ["uniform-8bit", "fp8"])
def test_a_model_does_not_decide_where_it_is_written(tiny, tmp_path, monkeypatch, profile):
    (tmp_path / "a" / "b").mkdir(parents=True)
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    hostile_card(model)
    monkeypatch.chdir(tmp_path / "a" / "b")
    before = snapshot(tmp_path)
    done("--profile", profile, "--judge", "off", "--calibration", "embedded", model)
    written = set(snapshot(tmp_path)) - set(before)
    assert written and all(path.is_relative_to(tmp_path / "a" / "b") for path in written)
    top = {path.relative_to(tmp_path / "a" / "b").parts[0] for path in written}
    assert len(top) == 2 and any(name.startswith("evil") for name in top)


def test_a_gguf_does_not_decide_where_it_is_written(tiny, tmp_path, monkeypatch):
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    hostile_card(model)
    done("--profile", "uniform-8bit", "--set", "*=F32", "--judge", "off", "--output", tmp_path / "f32.gguf", model)
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    before = snapshot(tmp_path)
    done(*PLAIN, tmp_path / "f32.gguf")
    written = set(snapshot(tmp_path)) - set(before)
    assert written and all(path.is_relative_to(tmp_path / "a" / "b") for path in written)


@pytest.mark.parametrize("profile", ["uniform-8bit", "fp8"])
def test_long_names(tiny, tmp_path, monkeypatch, profile):
    """Of the model, and of the output: what is kept beside an output has names that fit."""
    model = shutil.copytree(tiny("llama"), tmp_path / ("é" * 120 + "12345"))
    assert len(model.name.encode()) == 245
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    options = ["--profile", profile, "--judge", "off", "--calibration", "embedded"]
    done(*options, "--split-size", "60K", model)
    end = ".gguf" if profile == "uniform-8bit" else ""
    output = tmp_path / "there" / ("x" * (245 - len(end)) + end)
    done(*options, "--output", output, model)
    done(*options, "--fresh", "--output", output, model)
    assert {path.name for path in output.parent.iterdir()} == {output.name, default_work_dir(output).name}
    too_long = tmp_path / "there" / ("x" * (256 - len(end)) + end)
    assert "256 bytes" in refused(*options, "--output", too_long, model)
