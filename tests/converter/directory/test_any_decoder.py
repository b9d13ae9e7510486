"""Directories of decoders without a data file: transformers' own modules say what may be quantized."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bitwright import converter
from bitwright.converter.architectures import architecture as data_files
from bitwright.converter.directory.config import quantization_config
from bitwright.converter.model.decoder_modules import describe_decoder
from bitwright.converter.model.module_map import describe_for_directory, describe_modules, stored_dtypes
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.profiles.planning.plan_modules import ModulePlan, plan_modules
from bitwright.profiles.reading.schema import load_profile
from bitwright.profiles.vocabulary import Role
from tests.converter.artifact.f32_file import write_f32
from tests.converter.commands import refused
from tests.tiny_models import TINY_MODELS, VOCAB_SIZE, TinyModel, build_model

ARCHITECTURES = data_files.architectures_named
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "head_dim": 16}
# One with a plain MLP, one with gates on attention and dense layers before experts, and one whose routers and shared
# experts are stored under other names than transformers' modules have.
MODELS = {
    "apertus": TinyModel("Apertus", {}, "bpe"),
    "afmoe": TinyModel(
        "Afmoe", _EXPERTS | {"num_dense_layers": 1, "num_shared_experts": 1, "sliding_window": 64}, "bpe"
    ),
    "hy_v3": TinyModel("HYV3", _EXPERTS | {"mlp_layer_types": ["dense", "sparse"]}, "bpe"),
}
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(3, VOCAB_SIZE, (2, 24)))
OPTIONS = {"samples": 128, "sequence_length": 16, "calibration": "embedded", "judge": "off", "quiet": True}


@pytest.fixture(autouse=True)
def _no_data_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_files, "architectures_named", lambda _: ())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("decoders")

    def build(name: str) -> Path:
        if not (root / name).exists():
            build_model(MODELS[name], name, root / name)
        return root / name

    return build


def logits(directory: Path) -> np.ndarray:
    """Raises where transformers fills in what it does not find."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not found["missing_keys"] and not found["mismatched_keys"] and not found["unexpected_keys"], found
    with torch.inference_mode():
        return model.eval()(TOKENS).logits.numpy()


def plan_of(model: Path, profile: str) -> ModulePlan:
    checkpoint = open_checkpoint(str(model))
    modules = describe_modules(checkpoint, describe_for_directory(checkpoint))
    return plan_modules(load_profile(profile), modules, stored_dtypes(checkpoint))


def schemes(directory: Path) -> dict[str, str]:
    return {row["tensor"]: row["format"] for row in json.loads((directory / "bitwright.json").read_text())["tensors"]}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("profile", "most"), [("w4a16", 0.7), ("fp8", 0.5)])
def test_transformers_loads_them_and_computes_nearly_the_same(name, profile, most, built, tmp_path):
    """Random weights, whose routers choose otherwise now and then; other weights would be off by 1.4."""
    output = tmp_path / "artifact"
    converter.convert(str(built(name)), profile=profile, output=output, **OPTIONS)
    expected = logits(built(name))
    assert np.linalg.norm(logits(output) - expected) / np.linalg.norm(expected) < most
    found = schemes(output)
    assert {found[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkvo"} <= {"W4A16_G64", "FP8"}
    kept = {tensor for tensor, scheme in found.items() if scheme in ("F32", "BF16")}
    assert "model.embed_tokens.weight" in kept and "lm_head.weight" in kept
    experts = {scheme for tensor, scheme in found.items() if ".experts." in tensor and tensor.endswith("proj.weight")}
    assert len(experts) == (name != "apertus") and not experts & {"F32", "BF16"}


@pytest.mark.parametrize("name", [name for name in TINY_MODELS if "-" not in name])
def test_modules_are_what_a_data_file_says(name, tiny, monkeypatch):
    without = plan_of(tiny(name), "W4A16_G32")
    with monkeypatch.context() as patch:
        patch.setattr(data_files, "architectures_named", ARCHITECTURES)
        known = plan_of(tiny(name), "W4A16_G32")
    described = {row.tensor.name: (row.format, row.tensor.layer) for row in known.tensors}
    assert {row.tensor.name: (row.format, row.tensor.layer) for row in without.tensors} == described
    roles = {row.tensor.name: row.tensor.role for row in known.tensors if row.tensor.quantizable}
    assert {row.tensor.name: row.tensor.role for row in without.tensors if row.tensor.quantizable} == roles
    ignored, config = quantization_config(known)["ignore"], quantization_config(without)
    assert set(ignored) <= set(config["ignore"])
    assert quantization_config(known)["config_groups"] == config["config_groups"]


def test_what_is_kept_is_ignored_under_the_names_of_transformers_modules(built):
    ignore = quantization_config(plan_of(built("hy_v3"), "fp8"))["ignore"]
    assert "model.layers.1.mlp.router.gate" in ignore and "model.layers.1.mlp.gate" in ignore


def test_experts_that_are_stored_as_one_stay_as_they_are_and_are_ignored(built, tmp_path):
    """transformers itself takes either; nobody knows what the rows of such a tensor are."""
    for path in built("afmoe").iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(built("afmoe") / "model.safetensors")
    parts = {
        part: [weights.pop(f"model.layers.1.mlp.experts.{i}.{part}_proj.weight") for i in range(8)]
        for part in ("gate", "up", "down")
    }
    both = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
    weights["model.layers.1.mlp.experts.gate_up_proj"] = torch.stack(both)
    weights["model.layers.1.mlp.experts.down_proj"] = torch.stack(parts["down"])
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    plan = plan_of(tmp_path, "fp8")
    rows = {row.tensor.name: row for row in plan.tensors}
    assert rows["model.layers.1.mlp.experts.down_proj"].format == "F32"
    assert rows["model.layers.1.mlp.experts.down_proj"].tensor.role is Role.OTHER
    assert r"re:.*layers\.1\.mlp\.experts$" in quantization_config(plan)["ignore"]
    (note,) = describe_decoder(open_checkpoint(str(tmp_path))).source_notes
    assert note.startswith("2 tensors are no products of known use and stay as they are: model.layers.1.mlp.experts.")


def test_a_model_that_cannot_be_streamed_is_rounded_without_importance_and_that_is_said(built, tmp_path, monkeypatch):
    from bitwright.calibration.stream import model as stream

    def refuse(*_: object) -> None:
        raise ConvertError("it has no layers", "model", "none")

    monkeypatch.setattr(stream.LayerwiseModel, "__init__", refuse)
    output = tmp_path / "artifact"
    converter.convert(str(built("apertus")), profile="w4a16", output=output, work_dir=tmp_path / "work", **OPTIONS)
    notes = json.loads((tmp_path / "work" / "plan.json").read_text())["notes"]
    assert any("it has no layers" in note and "rounded without importance" in note for note in notes)
    judged = OPTIONS | {"judge": "full"}
    with pytest.raises(ConvertError, match="quality report"):
        converter.convert(str(built("apertus")), profile="fp8", output=tmp_path / "other", **judged)


def test_smoothing_asks_for_a_data_file(built, tmp_path):
    said = refused(built("apertus"), "--profile", "smoothquant-w8a8", "--judge", "off", "--output", tmp_path / "out")
    assert "no data file says what feeds the matrices of the architecture 'apertus'" in said and "fp8" in said


def test_a_matrix_that_is_not_stored_is_missed(built, tmp_path):
    for path in built("apertus").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConvertError, match=r"lacks the tensor of transformers' model\.layers\.1\.mlp\.up_proj\.weight"):
        describe_decoder(open_checkpoint(str(tmp_path)))


def test_a_directory_of_a_gguf_is_refused_by_that_name(tiny, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_files, "architectures_named", ARCHITECTURES)
        write_f32(tiny("llama"), tmp_path / "source.gguf")
    said = refused(tmp_path / "source.gguf", "--profile", "fp8", "--judge", "off", "--output", tmp_path / "out")
    assert "a safetensors directory is made from a Hugging Face checkpoint, and this is a GGUF" in said
    assert "name the directory or the Hub id" in said


def test_an_encoder_with_a_decoder_is_refused(tmp_path, built):
    for path in built("apertus").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(transformers.T5Config(num_layers=1).to_dict()))
    said = refused(tmp_path, "--profile", "fp8", "--judge", "off", "--output", tmp_path / "out")
    assert "it needs an encoder beside the decoder" in said and "--profile" not in said
