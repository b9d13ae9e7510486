"""What a command reads is never what it writes, and a command replaces its own files alone."""

import json
import os
import shutil
from pathlib import Path

import pytest

from bitwright.converter.artifact.ownership import check_places
from bitwright.converter.job.work_directory import default_work_dir
from bitwright.formats.errors import ConvertError
from tests.converter.commands import PLAIN, TEXT, done, refused, snapshot


@pytest.fixture
def source(tiny, tmp_path) -> Path:
    """A GGUF in F32, a source of conversions."""
    path = tmp_path / "source.gguf"
    done("--profile", "uniform-8bit", "--set", "*=F32", "--judge", "off", "--output", path, tiny("llama"))
    shutil.rmtree(default_work_dir(path))
    return path


def test_an_input_is_never_an_output(tiny, tmp_path, source):
    link, hard = tmp_path / "link.gguf", tmp_path / "hard.gguf"
    link.symlink_to(source)
    os.link(source, hard)
    before = snapshot(tmp_path)
    for output in (source, link, hard, tmp_path / "." / "source.gguf"):
        for fresh in ([], ["--fresh"]):
            assert "would replace what is read" in refused(*PLAIN, *fresh, "--output", output, source)
            assert "would replace what is read" in refused("imatrix", *TEXT, *fresh, "--output", output, source)
    assert snapshot(tmp_path) == before
    done(*PLAIN, "--output", tmp_path / "m.gguf", source)

    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    before = snapshot(model)
    for output in (model, tmp_path):
        for fresh in ([], ["--fresh"]):
            message = refused("--profile", "fp8", *fresh, "--output", output, model)
            assert "would replace what is read" in message
    for name in ("config.json", "README.md"):
        (model / "README.md").touch()
        assert "would replace" in refused("imatrix", *TEXT, "--fresh", "--output", model / name, model)
    assert snapshot(model) == {**before, model / "README.md": b""}


def test_a_model_may_be_converted_where_it_lies(tiny, tmp_path, monkeypatch):
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    before = snapshot(model)
    monkeypatch.chdir(model)
    for _ in range(2):
        done(*PLAIN, ".")
    done("--fresh", *PLAIN, ".")
    assert len(list(model.glob("*.gguf"))) == 1
    assert before.items() <= snapshot(model).items()


def test_places_are_compared_as_they_are_on_the_disk(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ConvertError, match="would replace what is read"):
        check_places([tmp_path / "a" / "x"], [tmp_path / "b" / "x"])
    with pytest.raises(ConvertError, match="the work directory holds"):
        check_places([tmp_path / "a" / "x"], [tmp_path / "y"], tmp_path / "b")
    with pytest.raises(ConvertError, match="256 bytes, and file systems take 255"):
        check_places([], [tmp_path / ("é" * 128)])
    check_places([tmp_path / "a" / "x"], [tmp_path / "y"], tmp_path / "c")


def test_an_importance_matrix_is_replaced_when_it_is_this_commands_own(tiny, tmp_path):
    output = tmp_path / "i.gguf"
    arguments = ["imatrix", *TEXT, "--output", output, tiny("llama")]
    output.write_text("precious")
    assert "is not of this job: a file of 8 B" in refused(*arguments)
    assert output.read_text() == "precious"
    done(*arguments, "--fresh")
    first = output.read_bytes()
    done(*arguments)  # again: the same command, the same file
    assert output.read_bytes() == first
    shutil.rmtree(default_work_dir(output))
    output.write_bytes(first + b"x")  # of ours, and nothing says that it is of this job
    assert "is not of this job: a GGUF" in refused(*arguments)
    assert output.read_bytes() == first + b"x"

    # From one format into the other.
    output.write_bytes(first)
    other = tmp_path / "i.dat"
    for _ in range(2):
        done("imatrix", "--output", other, output)
    second = other.read_bytes()
    other.write_text("precious")
    assert "is not of this job" in refused("imatrix", "--output", other, output)
    assert other.read_text() == "precious"
    assert "would replace what is read" in refused("imatrix", "--fresh", "--output", output, output)
    done("imatrix", "--fresh", "--output", other, output)
    assert other.read_bytes() == second
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_activation_statistics_do_not_replace_a_file(tiny, tmp_path):
    output = tmp_path / "a.safetensors"
    output.write_text("precious")
    arguments = ["imatrix", "--activations", *TEXT, "--output", output, tiny("llama")]
    assert "is not of this job" in refused(*arguments)
    output.unlink()
    done(*arguments)
    done(*arguments)


def test_a_picture_replaces_a_picture(tiny, tmp_path):
    path = tmp_path / "m.gguf"
    done(*PLAIN, "--output", path, tiny("llama"))
    for name in ("p.svg", "p.html"):
        picture = tmp_path / name
        done("inspect", path, "--plot", picture)
        first = picture.read_bytes()
        picture.write_bytes(first[:-1])
        done("inspect", path, "--plot", picture)
        assert picture.read_bytes() == first
        for content in ("<svg>mine</svg>", ""):
            picture.write_text(content)
            assert "with --plot" in refused("inspect", path, "--plot", picture)
            assert picture.read_text() == content
    report = tmp_path / "m.bitwright" / "report.html"
    before = report.read_bytes()
    assert "is not of this job" in refused("inspect", path, "--plot", report)
    assert report.read_bytes() == before


def test_a_split_replaces_no_file_that_comes_while_it_runs(tiny, tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    done(*PLAIN, "--output", path, tiny("llama"))
    link = os.link

    def late(source, target, **options):
        if "-00002-of-" in str(target):
            Path(target).write_text("precious")
        link(source, target, **options)

    monkeypatch.setattr(os, "link", late)
    assert "cannot be written" in refused("split", path, "--split-size", "60K")
    (second,) = tmp_path.glob("m-00002-of-*.gguf")
    assert second.read_text() == "precious"


def test_what_is_no_utf_8_is_refused_before_the_work(tiny, tmp_path):
    """Names of files, and what config.json says: at the end they would stand in reports and recipes."""
    model, bad = tmp_path / "model", os.fsdecode(b"a\xff")
    shutil.copytree(tiny("llama"), model)
    fp8 = ["--profile", "fp8", "--judge", "off"]
    (model / f"LICENSE{bad}").touch()
    assert "LICENSEa\\udcff" in refused(*fp8, "--output", tmp_path / "o", model)
    (model / f"LICENSE{bad}").unlink()
    for options, output in ((PLAIN, f"{bad}.gguf"), (fp8, bad), (fp8, f"{bad}/o"), (PLAIN, f"{bad}/o.gguf")):
        assert "no UTF-8" in refused(*options, "--output", tmp_path / output, model)
    assert "no UTF-8" in refused(*PLAIN, "--work-dir", tmp_path / bad, "--output", tmp_path / "o.gguf", model)
    model.rename(tmp_path / bad)
    for options, output in ((PLAIN, "o.gguf"), (fp8, "o")):
        assert "a\\udcff" in refused(*options, "--output", tmp_path / output, tmp_path / bad)
    (tmp_path / bad).rename(model)
    config = json.loads((model / "config.json").read_text())
    for note in ({"note": "\ud800"}, {"notes": [{"a\ud800": 1}]}):
        (model / "config.json").write_text(json.dumps(config | note))
        message = refused(*fp8, "--output", tmp_path / "o", model)
        assert "note" in message and "which is no text" in message
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
