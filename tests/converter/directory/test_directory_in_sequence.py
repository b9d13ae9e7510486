"""Directories whose layers are encoded in sequence: under the inputs that the encoded layers before them make, smoothed
and rounded as a runtime rounds them."""

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
from bitwright.converter.job.build import build_job
from bitwright.converter.job.progress import Progress
from bitwright.converter.job.work_directory import Stopped, default_work_dir
from bitwright.converter.measure.running import load_tokenizer
from bitwright.converter.pipeline import run
from tests.converter.commands import TEXT, refused

OPTIONS: dict[str, Any] = {
    "calibration": "embedded",
    "samples": 128,
    "sequence_length": 16,
    "judge": "off",
    "effort": "fast",
    "device": "cpu",
}
Made = tuple[Path, dict[str, Any]]


def convert(model: Path, output: Path, profile: str, **options: Any) -> Made:
    return output, converter.convert(model, profile=profile, output=output, quiet=True, **{**OPTIONS, **options})


def weights(artifact: Path) -> bytes:
    return (artifact / "model.safetensors").read_bytes()


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


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory) -> dict[str, Made]:
    directory = tmp_path_factory.mktemp("in-sequence")
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "sequential": {"sequential": True, "threads": 2},
    }
    return {
        name: convert(tiny("llama-256"), directory / name, "W4A16_G32", **chosen) for name, chosen in options.items()
    }


def test_the_first_layer_has_the_same_inputs_and_later_ones_have_others(made):
    plain, sequential = (load_file(made[name][0] / "model.safetensors") for name in ("plain", "sequential"))
    differ = {name for name in plain if not torch.equal(plain[name], sequential[name])}
    assert differ and all(name.startswith("model.layers.") for name in differ)
    assert not [name for name in differ if name.startswith("model.layers.0.")]


@pytest.mark.parametrize(("profile", "alpha", "tolerance"), [("W4A16_G32", None, 1e-3), ("W8A8", 0.7, 2e-3)])
def test_the_moments_are_those_of_the_artifacts_own_inputs(profile, alpha, tolerance, tiny, tmp_path, monkeypatch):
    """Held against transformers, which decodes what is stored and, of W8A8, rounds inputs. A smoothed model has other
    inputs than the source, and so has one whose first layer is not encoded."""
    kept: dict[str, np.ndarray] = {}
    write = moment_observer.write_moments

    def keep(directory: Path, group: str, matrix: np.ndarray, held_out: np.ndarray) -> None:
        kept[group] = matrix
        write(directory, group, matrix, held_out)

    monkeypatch.setattr(moment_observer, "write_moments", keep)
    model = tiny("llama-256")
    artifact, report = convert(model, tmp_path / "made", profile, alpha=alpha, sequential=True)
    assert report["recipe"]["error_feedback.inputs"] == "the artifact's"
    moments = next(matrix for group, matrix in kept.items() if "layers.1" in group and "q_proj" in group)

    def distance(directory: Path) -> float:
        rows = inputs_of_second_layer(directory, samples(model, held_out=False))
        expected = rows.T @ rows
        return float(np.linalg.norm(moments - expected) / np.linalg.norm(expected))

    assert distance(artifact) < min(tolerance, 0.2 * distance(model))


def test_a_stopped_pass_continues_on_one_thread_with_the_same_bytes(made, tiny, tmp_path):
    output = tmp_path / "model"
    job = build_job(str(tiny("llama-256")), profile="W4A16_G32", output=output, threads=1, sequential=True, **OPTIONS)
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
    assert weights(output) == weights(made["sequential"][0])
    assert not layers.exists()


def test_what_has_no_use_for_inputs_is_refused(tiny, tmp_path):
    text = [*TEXT, "--judge", "off", "--output", tmp_path / "out", tiny("llama-256")]
    assert "no weight of this plan depends on the inputs" in refused("--profile", "fp8", "--sequential", *text)
    without = ["--profile", "W4A16_G32", "--sequential", "--no-error-feedback"]
    assert "no code depends on the inputs" in refused(*without, *text)
