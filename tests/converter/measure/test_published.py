"""Statistics that come with a model are used in the place of measuring them, and only where they are of its weights."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from bitwright.converter.job.build import build_job
from bitwright.converter.preparation import prepare
from tests import tiny_models
from tests.converter.commands import TEXT, done
from tests.converter.source.hub_server import REPOSITORY, serve
from tests.converter.source.test_hub import ROOT

IMATRIX, SENSITIVITY = "model.imatrix.gguf", "model.imatrix.sensitivity.safetensors"


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny llama's importance matrix and sensitivity table."""
    directory = tmp_path_factory.mktemp("statistics")
    tiny_models.build("llama", directory / "llama")
    done("imatrix", *TEXT, "--sensitivity", "--output", directory / IMATRIX, directory / "llama")
    return directory


@pytest.fixture
def model(statistics: Path, tmp_path: Path) -> Path:
    """The tiny llama with both beside its weights."""
    directory = shutil.copytree(statistics / "llama", tmp_path / "llama")
    for name in (IMATRIX, SENSITIVITY):
        shutil.copy(statistics / name, directory)
    return directory


def prepared(model: Path, **options: Any):
    return prepare(
        build_job(str(model), output=model.parent / "model.gguf", samples=128, sequence_length=16, **options)
    )


def said(notes: tuple[str, ...], name: str) -> str:
    (note,) = [note for note in notes if name in note]
    return note


def test_a_table_of_these_weights_decides_before_anything_runs(model: Path):
    taken = prepared(model)
    given = prepared(model, sensitivity=model / SENSITIVITY)
    assert taken.plan.digest() == given.plan.digest() and taken.plan.predicted_kld is not None
    assert said(taken.notes, SENSITIVITY).startswith("the sensitivity table is ")
    assert "error feedback calibrates" in said(taken.notes, IMATRIX)
    assert taken.run.job.imatrix is None


def test_importance_is_taken_where_no_second_moments_are_wanted(model: Path):
    taken = prepared(model, error_feedback="off")
    assert taken.run.job.imatrix == model / IMATRIX and taken.run.job.sensitivity == model / SENSITIVITY
    assert said(taken.notes, f"{IMATRIX}, which").startswith("the importance matrix is ")


@pytest.mark.parametrize("options", [{"published": False}, {"calibration": "embedded"}])
def test_a_job_that_asks_for_a_measurement_gets_one(model: Path, options: dict[str, Any]):
    taken = prepared(model, error_feedback="off", **options)
    assert taken.run.job.imatrix is taken.run.job.sensitivity is None and taken.plan.predicted_kld is None


def test_statistics_of_other_weights_or_cut_short_are_left_alone(model: Path):
    for shard in model.glob("model-*.safetensors"):
        save_file({name: 2 * tensor for name, tensor in load_file(shard).items()}, shard, metadata={"format": "pt"})
    (model / IMATRIX).write_bytes((model / IMATRIX).read_bytes()[:1000])
    taken = prepared(model, error_feedback="off")
    assert taken.run.job.imatrix is taken.run.job.sensitivity is None
    assert "is not used: the sensitivity table is of another model" in said(taken.notes, SENSITIVITY)
    assert "is not used: " in said(taken.notes, f"{IMATRIX}, which")


def test_a_gguf_takes_the_files_of_its_own_name(statistics: Path, model: Path):
    source = model.parent / "source.gguf"
    done("--profile", "fp16-baseline", "--judge", "off", "--output", source, statistics / "llama")
    for name, own in ((IMATRIX, "source.imatrix.gguf"), (SENSITIVITY, "source.sensitivity.safetensors")):
        shutil.copy(statistics / name, source.with_name(name))
        assert prepared(source, error_feedback="off").run.job.sensitivity is None
        shutil.copy(statistics / name, source.with_name(own))
    job = prepared(source, error_feedback="off").run.job
    assert job.imatrix == source.with_name("source.imatrix.gguf")


def test_a_repository_brings_them_along_with_its_weights(model: Path, tmp_path: Path):
    """And a resumed job, which has them from the beginning, is the same."""
    output = tmp_path / "made" / "model.gguf"
    command = [sys.executable, "-m", "bitwright.converter", "--judge", "off", "--output", str(output), REPOSITORY]
    with serve(model) as server:
        environment = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")}
        options = ["--imatrix", str(model / IMATRIX), "--protect-super-weights", "off"]
        first, again = (
            subprocess.run(
                [*command[:3], *options, *command[3:]],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            for _ in range(2)
        )
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert f"the sensitivity table is {SENSITIVITY}, which comes with the model" in first.stderr
    assert "already done" in again.stderr
    report = json.loads((tmp_path / "made" / "model.bitwright" / "report.json").read_text())
    assert report["sensitivity"]["file"] == SENSITIVITY
