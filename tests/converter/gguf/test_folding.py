"""Channels scaled against each other before encoding: the same function, less error, and a file that says so."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from bitwright import converter
from bitwright.converter.gguf.folding import equalise, record
from bitwright.converter.gguf.folding.equalise import foldable_groups
from bitwright.converter.gguf.verify import DecodedArtifact, artifact_tensors, as_stored
from bitwright.converter.job.build import build_job
from bitwright.converter.job.progress import Progress
from bitwright.converter.judge.open import open_artifact
from bitwright.converter.model.model_map import describe
from bitwright.converter.preparation import prepare
from bitwright.converter.smoothing.folder import Folder
from bitwright.converter.smoothing.groups import smoothing_groups
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.gguf import read_gguf
from tests.converter.artifact.f32_file import write_f32
from tests.converter.gguf import planted_model

OPTIONS: dict[str, Any] = {
    "profile": "balanced-4bit",
    "analysis": False,
    "calibration": "embedded",
    "samples": 128,
    "sequence_length": 16,
    "error_feedback": "off",
    "judge": "off",
    "effort": "fast",
    "device": "cpu",
    "quiet": True,
}


@pytest.fixture(scope="module")
def uneven(tiny, tmp_path_factory) -> Path:
    """A model whose channels have been scaled apart: it computes what the tiny one does."""
    directory = tmp_path_factory.mktemp("uneven") / "model"
    shutil.copytree(tiny("llama-256"), directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    checkpoint = open_checkpoint(str(tiny("llama-256")))
    folder, rng = Folder(checkpoint, norms="F32"), np.random.default_rng(3)
    for group in smoothing_groups(checkpoint, describe(checkpoint)):
        for link in group.links:
            folder.fold(link, np.exp2(rng.normal(0, 1.5, record.channels(link))).astype(np.float32))
    view = folder.view()
    save_file({name: view.read(name) for name in view.tensors}, directory / "model.safetensors", {"format": "pt"})
    return directory


def convert(model: Path, output: Path, **options: Any) -> dict[str, Any]:
    return converter.convert(str(model), output=output, **OPTIONS | options)


@pytest.fixture(scope="module")
def folded(uneven, tmp_path_factory) -> dict[str, Any]:
    return convert(uneven, tmp_path_factory.mktemp("folded") / "m.gguf", judge="fast")


def record_of(report: dict[str, Any]) -> str | None:
    return read_gguf(Path(report["artifact"]["files"][0]["path"])).value(record.KEY, str)


def errors_of(report: dict[str, Any]) -> dict[str, float]:
    return {row["tensor"]: row["relative_error"] for row in report["errors"]}


def test_the_runtime_computes_the_source_with_less_error(uneven, folded, tmp_path):
    """llama.cpp knows nothing of factors: what it predicts agrees with our reading, and is nearer to the source."""
    plain = convert(uneven, tmp_path / "plain.gguf", folding=False, judge="fast")
    assert folded["agreement"]["verdict"] == "agrees"
    assert folded["quality"]["mean_kld"] < 0.7 * plain["quality"]["mean_kld"]
    assert record_of(plain) is None
    text = record_of(folded)
    assert text is not None and len(set(text)) > 8


def test_transformers_computes_the_same_with_the_folded_weights(uneven, folded):
    """Every matrix of the artifact stands in the model of transformers with the norms of the artifact, and only so."""
    (path,) = [Path(file["path"]) for file in folded["artifact"]["files"]]
    model = AutoModelForCausalLM.from_pretrained(uneven, dtype=torch.float32)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(3, model.config.vocab_size, (2, 24)))
    wanted = model(tokens).logits.detach()
    decoded = DecodedArtifact([path], describe(open_checkpoint(str(uneven))))

    def distance(leave_out: str) -> float:
        other = AutoModelForCausalLM.from_pretrained(uneven, dtype=torch.float32)
        with torch.no_grad():
            for name, weight in other.model.layers.named_parameters():
                if leave_out not in name:
                    weight.copy_(torch.from_numpy(decoded.read(f"model.layers.{name}")).reshape(weight.shape))
            return float((other(tokens).logits - wanted).norm() / wanted.norm())

    assert 2 * distance("nothing") < distance("norm")


def test_a_plan_knows_the_bytes_of_its_file(uneven, folded, tmp_path):
    job = build_job(str(uneven), **{k: v for k, v in OPTIONS.items() if k != "quiet"}, output=tmp_path / "m.gguf")
    assert prepare(job).files.n_bytes == folded["artifact"]["bytes"]


def test_threads_and_a_second_run_change_no_byte(uneven, folded, tmp_path):
    again = convert(uneven, tmp_path / "m.gguf", threads=3, judge="fast")
    assert again["artifact"]["files"][0]["sha256"] == folded["artifact"]["files"][0]["sha256"]
    finished = convert(uneven, tmp_path / "m.gguf", threads=3, judge="fast")
    assert finished["artifact"] == again["artifact"]


def test_the_file_tells_who_verifies_it_by_what_it_was_folded(uneven, folded):
    path = folded["artifact"]["files"][0]["path"]
    checkpoint = open_checkpoint(str(uneven))
    errors = open_artifact(Path(path), describe(checkpoint)).errors(checkpoint, Progress(quiet=True))
    assert {error.tensor: error.relative_error for error in errors} == errors_of(folded)
    assert max(error.relative_error for error in errors) < 0.2


@pytest.mark.parametrize("damaged", [lambda text: text[:-1], lambda text: "\x7f" + text[1:], lambda text: text + "O"])
def test_a_damaged_record_is_refused(damaged, uneven, folded):
    checkpoint = open_checkpoint(str(uneven))
    text = record_of(folded)
    assert text is not None
    with pytest.raises(ConvertError, match="record of folded factors is damaged"):
        record.folder_of(checkpoint, describe(checkpoint), damaged(text), "m.gguf")


def test_feedback_sees_the_inputs_that_the_folded_matrices_have(uneven, tmp_path):
    report = convert(uneven, tmp_path / "m.gguf", error_feedback="quick")
    assert record_of(report) is not None
    feedback = report["feedback"]
    assert feedback["kept"] > 0.8 * feedback["matrices"] and feedback["feedback_error"] < feedback["plain_error"]


def test_layers_in_sequence_are_folded_too(uneven, folded, tmp_path):
    report = convert(uneven, tmp_path / "m.gguf", sequential=True, error_feedback="quick", judge="fast")
    assert record_of(report) == record_of(folded)
    assert report["agreement"]["verdict"] == "agrees"
    assert report["quality"]["mean_kld"] < 1.2 * folded["quality"]["mean_kld"]


def test_what_stays_in_16_bits_stays_as_it_is(uneven, tmp_path):
    """A factor would round it once more; the matrices of the MLP are folded all the same."""
    report = convert(uneven, tmp_path / "m.gguf", overrides=("attention_*=BF16",))
    checkpoint = open_checkpoint(str(uneven))
    folder = record.folder_of(checkpoint, describe(checkpoint), record_of(report) or "", "m.gguf")
    folded = {name for name, folding in folder.foldings.items() if folding.columns is not None}
    assert folded and all(".mlp." in name for name in folded)


def test_super_weights_keep_their_columns(uneven, tmp_path):
    planted = planted_model.build(uneven, tmp_path / "planted", 2, {(100, 300): 9.0})
    text = planted_model.text(planted, tmp_path / "text.txt")
    options = {"calibration": str(text), "sequence_length": 32, "protect_super_weights": "pin", "chat": False}
    report = convert(planted, tmp_path / "m.gguf", overrides=("mlp_down=Q2_K",), **options)
    checkpoint = open_checkpoint(str(planted))
    folder = record.folder_of(checkpoint, describe(checkpoint), record_of(report) or "", "m.gguf")
    assert report["super_weight_coverage"]["within"] == report["super_weight_coverage"]["confirmed"] == 1
    assert "model.layers.2.mlp.down_proj.weight" not in folder.foldings
    assert "model.layers.1.mlp.down_proj.weight" in folder.foldings


def test_weights_on_a_grid_are_not_moved_from_it(uneven, folded, tmp_path):
    write_f32(uneven, tmp_path / "source.gguf")
    for source in (tmp_path / "source.gguf", Path(folded["artifact"]["files"][0]["path"])):
        checkpoint = open_checkpoint(str(source), from_quantized=True)
        assert foldable_groups(checkpoint, describe(checkpoint)) == []


def test_where_too_little_is_gained_nothing_is_folded(uneven, tmp_path, monkeypatch):
    """The file is the same but for the record."""
    monkeypatch.setattr(equalise, "_LEAST_GAIN", 1.0)
    report = convert(uneven, tmp_path / "m.gguf")
    plain = convert(uneven, tmp_path / "plain.gguf", folding=False)
    text = record_of(report)
    assert text is not None and set(text) == {record.NONE}
    tensors = [artifact_tensors([Path(r["artifact"]["files"][0]["path"])]) for r in (report, plain)]
    for name, tensor in tensors[0].items():
        assert np.array_equal(tensor.read(0, tensor.n_rows), tensors[1][name].read(0, tensor.n_rows)), name
    checkpoint = open_checkpoint(str(uneven))
    assert as_stored(checkpoint, describe(checkpoint), [tmp_path / "plain.gguf"])[0] is checkpoint
    assert json.loads((tmp_path / "m.bitwright" / "folding.json").read_text()) == {"record": text}
