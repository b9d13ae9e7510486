"""Directories whose layers are encoded in sequence: under the inputs that the encoded layers before them make, smoothed
and rounded as a runtime rounds them; and tuned."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bitwright import converter
from bitwright.calibration.passes import moment_observer
from bitwright.calibration.stream.micro_batches import is_held_out
from bitwright.calibration.text.corpus import load_corpus
from bitwright.converter.artifact.writer import JOURNAL
from bitwright.converter.directory.artifact import DirectoryArtifact
from bitwright.converter.job.build import build_job
from bitwright.converter.job.progress import Progress
from bitwright.converter.job.work_directory import Stopped, default_work_dir
from bitwright.converter.measure.running import load_tokenizer
from bitwright.converter.pipeline import run
from bitwright.formats.files.journal import read_lines
from bitwright.formats.schemes.packed_int import unpack
from tests.converter.commands import TEXT, refused
from tests.converter.commands import convert as command

OPTIONS: dict[str, Any] = {
    "calibration": "embedded",
    "samples": 128,
    "sequence_length": 16,
    "judge": "off",
    "effort": "fast",
    "device": "cpu",
}
STEPS = 32


@dataclass(frozen=True)
class Made:
    """An artifact, its report, and the second moments that it was encoded under, by group."""

    artifact: Path
    report: dict[str, Any]
    moments: dict[str, np.ndarray]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.artifact / "model.safetensors")

    @property
    def journal(self) -> dict[str, dict[str, Any]]:
        return {entry["tensor"]: entry for entry in read_lines(default_work_dir(self.artifact) / JOURNAL)}

    @property
    def first_kept_layer(self) -> int:
        """The first that is stored as it was tuned: those before it are the same without tuning."""
        kept = [name for name, entry in self.journal.items() if entry.get("tuning", {}).get("kept")]
        return min(int(name.split(".")[2]) for name in kept)


def convert(model: Path, output: Path, profile: str, **options: Any) -> Made:
    moments: dict[str, np.ndarray] = {}
    write = moment_observer.write_moments

    def keep(directory: Path, group: str, matrix: np.ndarray, held_out: np.ndarray) -> None:
        moments[group] = matrix
        write(directory, group, matrix, held_out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moment_observer, "write_moments", keep)
        report = converter.convert(model, profile=profile, output=output, quiet=True, **{**OPTIONS, **options})
    return Made(output, report, moments)


def samples(model: Path, held_out: bool) -> torch.Tensor:
    tokens = load_corpus("embedded", load_tokenizer(model), 128, 16, 0, chat=False).tokens.astype(np.int64)
    return torch.from_numpy(tokens[[i for i in range(128) if is_held_out(i) == held_out]])


def inputs_of_second_layer(directory: Path, tokens: torch.Tensor) -> np.ndarray:
    """What transformers gives the queries of the second layer, float32 [n, n_columns]."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    given: list[torch.Tensor] = []
    model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    with torch.no_grad():
        model(tokens)
    return given[0].reshape(-1, given[0].shape[-1]).numpy()


def states_after_layer(directory: Path, layer: int, tokens: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    made: list[torch.Tensor] = []
    model.model.layers[layer].register_forward_hook(lambda _, inputs, outputs: made.append(outputs))
    with torch.no_grad():
        model(tokens)
    return made[0]


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory) -> dict[str, Made]:
    directory = tmp_path_factory.mktemp("in-sequence")
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "sequential": {"sequential": True, "threads": 2},
        "tuned": {"tune": STEPS, "threads": 2},
    }
    return {
        name: convert(tiny("llama-256"), directory / name, "W4A16_G32", **chosen) for name, chosen in options.items()
    }


def test_the_first_layer_has_the_same_inputs_and_later_ones_have_others(made):
    plain, sequential = made["plain"].tensors, made["sequential"].tensors
    differ = {name for name in plain if not torch.equal(plain[name], sequential[name])}
    assert differ and all(name.startswith("model.layers.") for name in differ)
    assert not [name for name in differ if name.startswith("model.layers.0.")]
    assert made["sequential"].report["recipe"]["error_feedback.inputs"] == "the artifact's"


@pytest.mark.parametrize("profile", ["W4A16_G32", "W8A8"])
def test_the_moments_are_those_of_the_artifacts_own_inputs(profile, made, tiny, tmp_path):
    """Held against transformers, which decodes what is stored and, of W8A8, rounds inputs: without that they would be
    1 % away. A smoothed model has other inputs than the source, and so has one whose first layer is not encoded."""
    model, one = tiny("llama-256"), made["sequential"]
    if profile != "W4A16_G32":
        one = convert(model, tmp_path / "made", profile, alpha=0.7, sequential=True)
    moments = next(matrix for group, matrix in one.moments.items() if "layers.1" in group and "q_proj" in group)

    def distance(directory: Path) -> float:
        rows = inputs_of_second_layer(directory, samples(model, held_out=False))
        expected = rows.T @ rows
        return float(np.linalg.norm(moments - expected) / np.linalg.norm(expected))

    assert distance(one.artifact) < min(2e-3, 0.2 * distance(model))


def test_a_stopped_pass_continues_on_one_thread_with_the_same_bytes(made, tiny, tmp_path):
    output = tmp_path / "model"
    job = build_job(str(tiny("llama-256")), profile="W4A16_G32", output=output, threads=1, tune=STEPS, **OPTIONS)
    layers = default_work_dir(output) / "sequential"
    with pytest.raises(Stopped):
        run(job, Progress(quiet=True), lambda: len(list(layers.glob("*.npz"))) == 1)
    first = {path: path.stat().st_mtime_ns for path in layers.glob("*.npz")}
    seen = []

    def watch() -> bool:
        seen.extend(path.stat().st_mtime_ns for path in first if path.exists())
        return False

    run(job, Progress(quiet=True), watch)
    assert len(first) == 1 and set(seen) == set(first.values())
    again = load_file(output / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in made["tuned"].tensors.items())
    assert not layers.exists()


def test_tuning_brings_unseen_samples_nearer_to_the_source(made, tiny):
    tuning, first = made["tuned"].report["tuning"], made["tuned"].first_kept_layer
    unseen = samples(tiny("llama-256"), held_out=True)
    source = states_after_layer(tiny("llama-256"), first, unseen)
    before, after = (
        float((states_after_layer(made[name].artifact, first, unseen) - source).square().mean())
        for name in ("sequential", "tuned")
    )
    assert after < before
    assert 0 < tuning["kept"] <= tuning["layers"] == 4 and 0 < tuning["ratio"] < 1 and tuning["tensors"] == 4 * 7
    assert "tuning" not in made["sequential"].report


def test_a_tuned_layer_is_what_compressed_tensors_decodes_and_its_codes_have_moved_by_one_at_most(made):
    prefix, artifact = f"model.layers.{made['tuned'].first_kept_layer}.", made["tuned"].artifact
    ours, model = DirectoryArtifact.of_recipe(artifact), AutoModelForCausalLM.from_pretrained(artifact, dtype="float32")
    with torch.no_grad():
        model(torch.arange(3, 19)[None])  # which decodes it
    matrices = [name for name in ours.tensors if name.startswith(prefix) and ours.scheme(name) is not None]
    for name in matrices:
        np.testing.assert_array_equal(ours.read(name), model.get_parameter(name).detach().numpy(), name)
    before, after = made["sequential"].tensors, made["tuned"].tensors
    packed = [tensors[f"{prefix}mlp.down_proj.weight_packed"].numpy() for tensors in (before, after)]
    codes = [unpack(each, 4, 512).astype(int) for each in packed]
    assert len(matrices) == 7 and np.abs(codes[0] - codes[1]).max() == 1
    assert not torch.equal(*(tensors[f"{prefix}mlp.down_proj.weight_scale"] for tensors in (before, after)))


def test_experts_and_scales_of_whole_matrices(tiny, tmp_path):
    one = convert(tiny("qwen3_moe"), tmp_path / "made", "NVFP4A16", tune=4)
    tuned = {name for name, entry in one.journal.items() if "tuning" in entry}
    assert any("experts.7.down_proj" in name for name in tuned) and one.report["tuning"]["tensors"] == len(tuned)
    assert sum("experts" in outcome["tensor"] for outcome in one.report["feedback"]["outcomes"]) == 2 * 8 * 3
    for layer in range(2):
        attention = f"model.layers.{layer}.self_attn"
        scales = {float(one.tensors[f"{attention}.{part}_proj.weight_global_scale"]) for part in "qkv"}
        assert len(scales) == 1


def test_what_the_source_has_encoded_already_is_copied(made, tmp_path):
    again = convert(made["plain"].artifact, tmp_path / "again", "W4A16_G32", tune=4)
    tensors = again.tensors
    assert all(torch.equal(tensors[name], tensor) for name, tensor in made["plain"].tensors.items())
    assert again.report["tuning"] == {"layers": 0, "tensors": 0, "kept": 0, "ratio": None}


def test_what_has_no_use_for_inputs_is_refused(tiny, tmp_path):
    text = [*TEXT, "--judge", "off", "--output", tmp_path / "out", tiny("llama-256")]
    assert "no weight of this plan depends on the inputs" in refused("--profile", "fp8", "--sequential", *text)
    assert "no weight of this plan can be tuned" in refused("--profile", "W8A8", "--tune", 8, *text)
    without = ["--profile", "W4A16_G32", "--sequential", "--no-error-feedback"]
    assert "no code depends on the inputs" in refused(*without, *text)


def test_a_plan_says_what_tuning_leaves_as_it_is(tiny):
    mixed = ["--profile", "W4A16_G32", "--set", "mlp_*=FP8"]
    planned = command("plan", *mixed, "--tune", 8, tiny("llama-256"))
    assert "--tune leaves 12 of 28 quantized matrices as they are: FP8" in " ".join(planned.output.split())
