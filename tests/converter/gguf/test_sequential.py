"""Sequential inputs: a layer's codes are chosen by what the artifact's layers before it make of the text, and tuning
moves its scales towards what the source computes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bitwright import converter
from bitwright.calibration.passes import moment_observer
from bitwright.calibration.stream.micro_batches import is_held_out
from bitwright.calibration.text.corpus import load_corpus
from bitwright.converter.artifact.writer import JOURNAL
from bitwright.converter.forecast.work import work_of
from bitwright.converter.gguf.verify import DecodedArtifact, artifact_tensors
from bitwright.converter.job.build import build_job
from bitwright.converter.job.progress import Progress
from bitwright.converter.job.work_directory import Stopped
from bitwright.converter.measure.running import load_tokenizer
from bitwright.converter.model.model_map import describe
from bitwright.converter.pipeline import run
from bitwright.converter.preparation import prepare, survey
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.files.journal import read_lines
from bitwright.formats.parts import ScalarBlocks, ScalarParts
from bitwright.formats.registry import get_format
from tests.converter.commands import PLAIN, TEXT, refused

OPTIONS: dict[str, Any] = {
    "profile": "mlp-low-precision",
    "analysis": False,
    "calibration": "embedded",
    "samples": 128,
    "sequence_length": 16,
    "judge": "off",
    "effort": "fast",
    "device": "cpu",
}


def encoded(path: Path) -> dict[str, bytes]:
    return {name: t.read(0, t.n_rows).tobytes() for name, t in artifact_tensors([path]).items()}


def hidden_states(directory: Path, artifact: Path | None, samples: list[int], layer: int) -> torch.Tensor:
    """What a layer of transformers' own model makes of these samples, with the weights of the artifact."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if artifact is not None:
        weights = DecodedArtifact([artifact], describe(open_checkpoint(str(directory))))
        with torch.no_grad():
            for name, weight in model.model.layers.named_parameters():
                weight.copy_(torch.from_numpy(weights.read(f"model.layers.{name}")).reshape(weight.shape))
    outputs: list[torch.Tensor] = []
    model.model.layers[layer].register_forward_hook(lambda _, given, made: outputs.append(made))
    with torch.no_grad():
        model(tokens(directory)[samples])
    return outputs[0]


def tokens(directory: Path) -> torch.Tensor:
    corpus = load_corpus("embedded", load_tokenizer(directory), 128, 16, 0, chat=False)
    return torch.from_numpy(corpus.tokens.astype(np.int64))


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory) -> dict[bool, Path]:
    """The artifact with sequential inputs, and the one without."""
    directory = tmp_path_factory.mktemp("sequential")
    paths = {sequential: directory / str(sequential) / "model.gguf" for sequential in (True, False)}
    for sequential, path in paths.items():
        converter.convert(tiny("llama-256"), output=path, sequential=sequential, quiet=True, **OPTIONS)
    return paths


@pytest.fixture(scope="module")
def tuned(tiny, tmp_path_factory) -> dict[str, Any]:
    """The report of the artifact whose layers are tuned."""
    output = tmp_path_factory.mktemp("tuned") / "model.gguf"
    return converter.convert(tiny("llama-256"), output=output, tune=16, quiet=True, threads=2, **OPTIONS)


def test_the_first_layer_has_the_same_inputs_and_later_ones_have_others(made):
    with_them, without = encoded(made[True]), encoded(made[False])
    differ = {name for name, data in with_them.items() if data != without[name]}
    assert differ and not [name for name in differ if name.startswith("blk.0.") or not name.startswith("blk.")]


def test_the_moments_are_those_of_the_artifacts_own_inputs(tiny, made, tmp_path, monkeypatch):
    """Held against transformers' own model, with the weights of the artifact in its first layer."""
    kept: list[tuple[str, np.ndarray]] = []
    write = moment_observer.write_moments

    def keep(directory: Path, group: str, matrix: np.ndarray, held_out: np.ndarray) -> None:
        kept.append((group, matrix))
        write(directory, group, matrix, held_out)

    monkeypatch.setattr(moment_observer, "write_moments", keep)
    output = tmp_path / "model.gguf"
    converter.convert(tiny("llama-256"), output=output, sequential=True, quiet=True, **OPTIONS)
    assert output.read_bytes() == made[True].read_bytes()

    directory = tiny("llama-256")
    artifact = DecodedArtifact([output], describe(open_checkpoint(str(directory))))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.model.layers[0].named_parameters():
            weight.copy_(torch.from_numpy(artifact.read(f"model.layers.0.{name}")).reshape(weight.shape))
    inputs: list[torch.Tensor] = []
    model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        model(tokens(directory)[[i for i in range(128) if not is_held_out(i)]])
    rows = inputs[0].reshape(-1, inputs[0].shape[-1])
    of_second = next(matrix for group, matrix in kept if "layers.1" in group and "q_proj" in group)
    np.testing.assert_allclose(of_second, (rows.T @ rows).numpy(), rtol=1e-3, atol=1e-3 * np.abs(of_second).max())


def test_a_stopped_pass_continues_after_its_last_layer_with_the_same_bytes(tiny, made, tmp_path):
    job = build_job(str(tiny("llama-256")), output=tmp_path / "model.gguf", sequential=True, threads=1, **OPTIONS)
    layers = tmp_path / "model.bitwright" / "sequential"

    def after_one_layer() -> bool:
        return len(list(layers.glob("*.npz"))) == 1

    with pytest.raises(Stopped):
        run(job, Progress(quiet=True), after_one_layer)
    first = {path: path.stat().st_mtime_ns for path in layers.glob("*.npz")}
    assert len(first) == 1
    seen = []

    def watch() -> bool:
        seen.extend(path.stat().st_mtime_ns for path in first if path.exists())
        return False

    run(job, Progress(quiet=True), watch)
    assert set(seen) == set(first.values())
    assert (tmp_path / "model.gguf").read_bytes() == made[True].read_bytes()
    assert not layers.exists()


def test_what_has_no_use_for_inputs_is_refused(tiny, tmp_path):
    assert "no code depends on the inputs" in refused(
        *PLAIN, *TEXT, "--sequential", "--no-error-feedback", "--output", tmp_path / "a.gguf", tiny("llama-256")
    )


def kept_tensors(report: dict[str, Any]) -> set[str]:
    """Those of the layers that are stored as they were tuned."""
    journal = Path(report["artifact"]["files"][0]["path"]).parent / "model.bitwright" / JOURNAL
    return {entry["tensor"] for entry in read_lines(journal) if entry.get("tuning", {}).get("kept")}


def test_tuning_brings_unseen_samples_nearer_to_the_source(tiny, made, tuned):
    directory, unseen = tiny("llama-256"), [i for i in range(128) if is_held_out(i)]
    assert 0 < tuned["tuning"]["kept"] <= tuned["tuning"]["layers"] == 4 and 0 < tuned["tuning"]["ratio"] < 1
    first = min(int(name.split(".")[1]) for name in kept_tensors(tuned))  # the layers before it are the same in both
    source = hidden_states(directory, None, unseen, first)
    differences = [
        float((hidden_states(directory, path, unseen, first) - source).square().mean())
        for path in (made[True], Path(tuned["artifact"]["files"][0]["path"]))
    ]
    assert differences[1] < differences[0]


def test_tuning_moves_blocks_and_nothing_beside(made, tuned):
    before, after = (artifact_tensors([path]) for path in (made[True], Path(tuned["artifact"]["files"][0]["path"])))
    kinds, kept = set(), kept_tensors(tuned)
    first = min(name.split(".")[1] for name in kept)  # later layers have other inputs for those before are tuned
    for name, tensor in after.items():
        data = [stored.read(0, tensor.n_rows) for stored in (before[name], tensor)]
        if len(tensor.shape) == 1 or not name.startswith(f"blk.{first}."):
            assert name not in kept or name.split(".")[1] != first or np.array_equal(*data), name
            continue
        kinds.add(tensor.ggml_type.name)
        blocks = get_format(tensor.ggml_type.name).blocks
        parts = [blocks.open(each) for each in data]
        units = [each.units if isinstance(each, ScalarParts) else each.d for each in parts]
        assert not np.array_equal(*units), name
        if isinstance(blocks, ScalarBlocks):
            places = [np.searchsorted(blocks.levels, each.levels) for each in parts]
            assert np.abs(places[0] - places[1]).max() <= 1, name
    assert len(kinds) > 1


def test_tuning_gives_the_same_bytes_on_one_thread_and_after_a_stop(tiny, tuned, tmp_path):
    job = build_job(str(tiny("llama-256")), output=tmp_path / "model.gguf", tune=16, threads=1, **OPTIONS)
    layers = tmp_path / "model.bitwright" / "sequential"
    with pytest.raises(Stopped):
        run(job, Progress(quiet=True), lambda: len(list(layers.glob("*.npz"))) == 1)
    run(job, Progress(quiet=True))
    assert (tmp_path / "model.gguf").read_bytes() == Path(tuned["artifact"]["files"][0]["path"]).read_bytes()


def test_too_few_tokens_to_tune_on_are_refused(tiny, tmp_path):
    few = ["--calibration", "embedded", "--samples", 128, "--sequence-length", 4, "--tune", 8]
    assert "too few to tune" in refused(*PLAIN, *few, "--output", tmp_path / "a.gguf", tiny("llama-256"))


def test_layers_in_sequence_are_no_work_to_be_shared_and_none_whose_time_is_known(tiny, tmp_path):
    text = ["--no-analysis", "--profile", "mlp-low-precision", *TEXT]
    for option in (["--sequential"], ["--tune", 8]):
        said = refused("plan", "--save", tmp_path / "plan.json", *text, *option, tiny("llama-256"))
        assert "cannot be shared among machines" in said and option[0] in said
    job = build_job(str(tiny("llama-256")), output=tmp_path / "model.gguf", tune=8, **OPTIONS)
    (encoding,) = [work for work in work_of(survey(job), prepare(job).plan, False, False) if work.stage == "encode"]
    assert encoding.amount is None
