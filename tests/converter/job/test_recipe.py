"""The recipe in a report is the command that makes the same bytes again."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from bitwright.converter.cli import main
from bitwright.converter.job.job import Job
from bitwright.converter.job.recipe import command_text, from_files, reproducing_arguments
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.files.disk import file_sha256
from bitwright.profiles.reading.schema import load_profile

OWN_PROFILE = """
description = "one of its own"
good_for = "this test"
base = "Q4_0"

[[rule]]
roles = ["mlp_down"]
layers = ["first:1"]
format = "IQ4_NL"
"""
SHORT = ["--calibration", "embedded", "--samples", "128", "--sequence-length", "16", "--effort", "fast"]
SHORT += ["--no-error-feedback"]


def convert(*arguments: object) -> dict:
    done = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def hashes(report: dict) -> list[str]:
    return [file["sha256"] for file in report["artifact"]["files"]]


@pytest.fixture
def here(tiny, tmp_path, monkeypatch) -> Path:
    """A directory to work in, with a model whose card says what it is."""
    shutil.copytree(tiny("llama"), tmp_path / "model")
    card = "---\nlicense: other\nlicense_name: tiny\nlanguage: [en, de]\npipeline_tag: text-generation\n---\n# Tiny\n"
    (tmp_path / "model" / "README.md").write_text(card)
    (tmp_path / "own.toml").write_text(OWN_PROFILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_the_arguments_of_a_report_make_the_same_bytes(here):
    first = convert(
        "--profile", here / "own.toml", "--set", "attention_v*=Q8_0", "--seed", "3", *SHORT,
        "--split-size", "40K", "--output", "first/a.gguf", "--threads", "1", "--judge", "off", here / "model",
    )  # fmt: skip
    assert len(hashes(first)) > 1
    assert str(here) not in " ".join(first["arguments"])
    again = convert(*first["arguments"], "--output", "again/a.gguf")
    assert hashes(again) == hashes(first)
    assert again["arguments"] == first["arguments"]

    # With the importance matrix that was left, nothing is calibrated.
    manifest = first["calibration"]
    (here / "recipe").mkdir()
    shutil.copy("own.toml", "recipe/own.toml")
    shutil.copy(manifest["path"], "recipe")
    arguments = from_files(
        first["arguments"], "recipe", {"imatrix": f"recipe/{manifest['file']}"}, first["reads_text_later"]
    )
    assert not [argument for argument in arguments if argument.startswith(("--calibration", "--samples"))]
    from_importance = convert(*arguments, "--output", "third/a.gguf", "--judge", "off")
    assert "calibrate" not in from_importance["seconds"]
    assert hashes(from_importance) == hashes(first)
    assert from_importance["calibration"]["sha256"] == manifest["sha256"]
    assert from_importance["calibration"]["seed"] is None


@pytest.mark.parametrize("refine", [0, 1])
def test_a_budgets_files_make_the_same_bytes(here, refine):
    """What was measured of the model makes the plan again, whatever the text would say a second time."""
    first = convert(
        "--target-bpw", 7, "--refine", refine, *SHORT, "--output", "first/a.gguf", "--judge", "off", "model"
    )
    assert first["reads_text_later"] == bool(refine)
    Path("recipe").mkdir()
    files = {"imatrix": first["calibration"], "sensitivity": first["sensitivity"]}
    for manifest in files.values():
        shutil.copy(manifest["path"], "recipe")
        assert file_sha256(Path("recipe") / manifest["file"]) == manifest["sha256"]
    Path("recipe/budget.toml").write_text(first["recipe"]["profile_toml"])
    names = {option: f"recipe/{manifest['file']}" for option, manifest in files.items()}
    arguments = from_files(first["arguments"], "recipe", names, first["reads_text_later"])
    assert "--sensitivity=recipe/sensitivity.safetensors" in arguments
    assert ("--samples=128" in arguments) == bool(refine)
    again = convert(*arguments, "--output", "again/a.gguf", "--judge", "off")
    assert hashes(again) == hashes(first) and "calibrate" not in again["seconds"]
    assert again["sensitivity"]["sha256"] == first["sensitivity"]["sha256"]


def test_the_text_of_an_analysis_is_stated_where_the_importance_is_given(here):
    first = convert("--target-bpw", 7, *SHORT, "--output", "first/a.gguf", "--judge", "off", "model")
    given = ["--imatrix", first["calibration"]["path"], "--samples", 128, "--sequence-length", 16, "--effort", "fast"]
    second = convert("--target-bpw", 7, *given, "--output", "second/a.gguf", "--judge", "off", "model")
    assert "--calibration=embedded" in second["arguments"]


def test_what_a_report_says_of_its_making(here):
    report = convert("--profile", "balanced-4bit", *SHORT, "--output", "out/a.gguf", "--judge", "off", "model")
    assert report["source"]["card"] == {
        "license": "other",
        "license_name": "tiny",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
    }
    manifest = report["calibration"]
    assert (manifest["corpus"], manifest["split"], manifest["seed"], manifest["samples"]) == (
        "embedded",
        "train",
        0,
        128,
    )
    assert report["recipe"]["profile_toml"] == load_profile("balanced-4bit").text
    plan = json.loads(Path("out/a.bitwright/plan.json").read_text())
    assert plan["plan_sha256"] == report["plan_sha256"] == report["recipe"]["plan_sha256"]
    assert len(plan["tensors"]) == len(report["errors"])


def test_eight_bits_calibrate_nothing_and_say_so(here):
    report = convert("--profile", "uniform-8bit", "--output", "out/a.gguf", "--judge", "off", "model")
    assert report["calibration"] is None
    assert report["arguments"] == ["--profile=uniform-8bit", "--seed=0", "model"]


@pytest.mark.parametrize("name", ["balanced-4bit", "FP8_BLOCK"])
def test_what_is_known_by_its_name_needs_no_file(here, name):
    checkpoint = open_checkpoint(str(here / "model"))
    assert reproducing_arguments(Job("model", load_profile(name)), checkpoint, False)[0] == f"--profile={name}"


def test_a_command_is_written_as_one_types_it():
    arguments = ["--profile=a b.toml", "--set=blk.*=Q4_K", "--no-chat", "org/model@0123"]
    assert command_text(arguments) == "bitwright --profile 'a b.toml' --set 'blk.*=Q4_K' --no-chat org/model@0123"
