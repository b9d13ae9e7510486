"""The stage `smooth` of a job: what it leaves, that it resumes to the same bytes, and that its outliers are gone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from bitwright.calibration.control import Interrupted, PassControl, never
from bitwright.calibration.evaluation.quality import Baseline
from bitwright.calibration.statistics.activation_file import load_activations
from bitwright.calibration.statistics.imatrix_file import save_imatrix
from bitwright.calibration.statistics.smoothing import SmoothQuantConfig
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.converter.cli import main
from bitwright.converter.smoothing.record import load_smoothing
from bitwright.converter.smoothing.stage import Smoothed, streamed_smoothing
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.profiles.planning.precision import Context, choose_precisions
from scripts.study.smoothing import IntegerProducts
from tests.calibration.stream.streaming import DictSource, random_corpus
from tests.converter.runs import run_of

OUTLIER = 37
GROUPS = ("self_attn.v_proj", "mlp.up_proj", "input_layernorm", "post_attention_layernorm")


@pytest.fixture(scope="module")
def planted(tiny, tmp_path_factory) -> Path:
    """A llama whose second layer's attention sees one channel 100 times as large, which its weights make up for."""
    source = DictSource.of(tiny("llama-256"))
    layer = "model.layers.1"
    source.tensors[f"{layer}.input_layernorm.weight"][OUTLIER] *= 100
    for name in ("q", "k", "v"):
        source.tensors[f"{layer}.self_attn.{name}_proj.weight"][:, OUTLIER] /= 100
    return rewritten(tiny("llama-256"), source, tmp_path_factory.mktemp("outlier") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog", "wizards", "quartz", "vow"]
    drawn = np.random.default_rng(0).integers(0, len(words), 8000)
    path.write_text(" ".join(words[i] for i in drawn))
    return path


def run(model: Path, text: Path, work_dir: Path, alpha=0.5, should_stop=never) -> Smoothed:
    options = {"calibration": str(text), "samples": 128, "sequence_length": 32, "chat": False}
    return streamed_smoothing(run_of(model, work_dir, should_stop, **options), SmoothQuantConfig(alpha))


@pytest.fixture(scope="module")
def smoothed(planted, text, tmp_path_factory) -> dict[object, Smoothed]:
    directory = tmp_path_factory.mktemp("smoothed")
    return {alpha: run(planted, text, directory / str(alpha), alpha) for alpha in (0.0, 0.5, 1.0, "auto")}


def group(of: Smoothed, name: str, layer: int = 1):
    return next(g for g in of.groups if g.layer == layer and name in g.name)


def test_the_outlier_shrinks_as_the_formula_says(planted, smoothed):
    """By s = X**alpha / W**(1 - alpha): X becomes X**(1 - alpha) * W**(1 - alpha), here of a model in float32."""
    query = "blk.1.attn_q.weight"
    weights = np.concatenate(
        [DictSource.of(planted).tensors[f"model.layers.1.self_attn.{n}_proj.weight"] for n in "qk"]
    )
    before = smoothed[0.5].activations
    for alpha in (0.0, 0.5, 1.0):
        factors = smoothed[alpha].smoothing.factors[query][0].astype(np.float64)
        source = before.of(query).absmax()[0] * smoothed[0.5].smoothing.factors[query][0]
        found = smoothed[alpha].activations.of(query).absmax()[0]
        np.testing.assert_allclose(found, source / factors, rtol=1e-5)
        value = DictSource.of(planted).tensors["model.layers.1.self_attn.v_proj.weight"]
        rows = smoothed[alpha].smoothing.foldings["model.layers.1.self_attn.v_proj.weight"].rows
        columns = np.abs(np.concatenate([weights, value * rows[:, None]])).max(axis=0)
        np.testing.assert_allclose(factors, source**alpha / columns ** (1 - alpha), rtol=1e-5)
    assert group(smoothed[0.5], "input_layernorm").outlier_ratio_before > 40
    assert group(smoothed[0.5], "input_layernorm").outlier_ratio < 4
    assert group(smoothed[1.0], "input_layernorm").outlier_ratio == pytest.approx(1)


def test_rounding_hurts_less_once_smoothed(smoothed):
    found = group(smoothed[0.5], "input_layernorm")
    assert found.error < 0.2 * found.error_before


@pytest.mark.parametrize("name", GROUPS)
def test_auto_is_the_best_of_what_it_tried(smoothed, name):
    for layer in range(4):
        auto, fixed = (group(smoothed[alpha], name, layer) for alpha in ("auto", 0.5))
        assert auto.error <= auto.tried["0.5"] * (1 + 1e-5) and auto.error <= auto.tried["off"] * (1 + 1e-5)
        assert auto.error == pytest.approx(min(auto.tried.values()), rel=1e-5)
        assert len(auto.tried) == 22
        if name in GROUPS[:2]:  # the others' weights have been smoothed otherwise before
            assert auto.tried["0.5"] == pytest.approx(fixed.error, rel=1e-6)


def test_auto_follows_the_plan_s_scales(planted, text, smoothed, tmp_path):
    options = ["--calibration", text, "--samples", 128, "--sequence-length", 32, "--no-chat", "--device", "cpu"]
    options += ["--judge", "off", "--json", "--alpha", "auto", "--set", "mlp_down=W8A8_STATIC"]
    done = convert("--profile", "smoothquant-w8a8", *options, "--output", tmp_path / "out", planted)
    assert done.exit_code == 0, done.stderr
    for found, by_row in zip(json.loads(done.stdout)["smoothing"]["groups"], smoothed["auto"].groups, strict=True):
        ratio = found["tried"]["off"] / by_row.tried["off"]
        assert ratio > 1.3 if "up_proj" in found["name"] else ratio == pytest.approx(1, rel=0.1)
        best = "off" if found["alpha"] is None else f"{found['alpha']:g}"
        assert found["tried"][best] == pytest.approx(min(found["tried"].values()), rel=1e-5)


def test_what_is_left_in_the_work_directory_is_taken(planted, text, smoothed, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    run(planted, text, first, 0.5)
    stops = iter(range(10**6))
    with pytest.raises(Interrupted):
        run(planted, text, second, 0.5, should_stop=lambda: next(stops) == 2)  # amid the first pass
    with pytest.raises(Interrupted):
        run(planted, text, second, 0.5, should_stop=lambda: next(stops) == 9)  # amid the groups
    with pytest.raises(Interrupted):
        run(planted, text, second, 0.5, should_stop=(second / "calibration-smoothed/stream.npz").exists)
    again = run(planted, text, second, 0.5)
    for path in sorted(first.glob("*.safetensors")):
        assert path.read_bytes() == (second / path.name).read_bytes()
    assert again.unsmoothed == ()
    path = second / "smoothing.safetensors"
    assert load_smoothing(path).identity() == again.activations.transform != ""
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    run(planted, text, second, 0.5)
    assert path.read_bytes() == whole  # made again


@pytest.mark.parametrize("alpha", [-0.1, 1.01, float("nan")])
def test_alpha_out_of_range_is_an_error(alpha):
    with pytest.raises(ConvertError, match="from 0 to 1"):
        SmoothQuantConfig(alpha)


def convert(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_writes_activations_and_inspect_shows_them(planted, text, tmp_path):
    output = tmp_path / "activations.safetensors"
    options = ["--calibration", text, "--samples", 128, "--sequence-length", 32, "--no-chat", "--device", "cpu"]
    done = convert("imatrix", "--activations", *options, "--output", output, planted)
    assert done.exit_code == 0, done.stderr
    shown = json.loads(convert("inspect", "--json", output).stdout)
    rows = {row["tensor"]: row for row in shown["tensors"]}
    assert rows["blk.1.attn_q.weight"]["outlier_ratio"] > 40
    assert rows["blk.0.attn_q.weight"]["outlier_ratio"] < 5
    assert rows["blk.1.attn_q.weight"]["rows"] == 128 * 32
    printed = convert("inspect", output).stdout
    assert "blk.1.attn_q.weight" in printed and f"samples: {shown['samples']}" in printed


def test_inspect_shows_smoothing(planted, text, tmp_path):
    run(planted, text, tmp_path / "w", "auto")
    path = tmp_path / "w" / "smoothing.safetensors"
    shown = json.loads(convert("inspect", "--json", path).stdout)
    assert shown["alpha"] == "auto" and len(shown["groups"]) == 16
    printed = convert("inspect", path).stdout
    assert "model.layers.1.input_layernorm.weight" in printed


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["imatrix", "--activations", "--output", "a.gguf", "m"], ".safetensors"),
        (["imatrix", "--activations", "--super-weights", "--output", "a.safetensors", "m"], "super weights"),
        (["plan", "--alpha", "1.5", "m"], "from 0 to 1"),
        (["plan", "--alpha", "half", "m"], "from 0 to 1"),
    ],
)
def test_impossible_options_are_refused(arguments, problem):
    done = convert(*arguments)
    assert done.exit_code == 1 and problem in done.stderr and "remedy:" in done.stderr


def test_a_gguf_refuses_options_of_activations(planted):
    done = convert("plan", "--profile", "uniform-8bit", "--alpha", "0.7", planted)
    assert done.exit_code == 1 and "GGUF" in done.stderr and "--alpha" in done.stderr


def test_what_smoothing_cannot_absorb_stays_in_16_bits(planted, text, tmp_path):
    """Layer 1 has an outlier that its weights allow for; of layer 2 they do not, so whatever alpha, one side has it."""
    source = DictSource.of(planted)
    source.tensors["model.layers.2.post_attention_layernorm.weight"][5] *= 1e7
    model = rewritten(planted, source, tmp_path / "model")
    seen = run(model, text, tmp_path / "w", 0.5)
    tensors = [t for t in seen.model_map.tensors if t.quantizable and t.layer is not None]
    figures = {t.name: seen.activations.of(t.name).figures() for t in tensors}
    wanted, roles = dict.fromkeys(figures, "W8A8"), {t.name: t.role for t in tensors}
    choices = choose_precisions(wanted, roles, figures, Context(), errors=seen.errors)
    fallen = {choice.tensor for choice in choices if choice.fell_back}
    assert {"blk.2.ffn_gate.weight", "blk.2.ffn_up.weight"} <= fallen
    assert not {name for name in fallen if name.startswith(("blk.0.", "blk.1."))}
    assert set(seen.errors) == set(wanted)
    # Without smoothing the other outlier, too, is too much for INT8.
    before = load_activations(tmp_path / "w" / "activations.safetensors")
    figures = {name: before.of(name).figures() for name in wanted}
    choices = choose_precisions(wanted, roles, figures, Context())
    naive = {choice.tensor for choice in choices if choice.fell_back}
    assert {"blk.1.attn_q.weight", "blk.1.attn_k.weight", "blk.1.attn_v.weight"} <= naive


def rewritten(model: Path, source: DictSource, directory: Path) -> Path:
    shutil.copytree(model, directory)
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    save_file(source.tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_integer_products_of_the_smoothed_model_are_the_sources_again(planted, smoothed, tmp_path):
    """With every matrix and every input in INT8: what the outlier costs, and what is left of that."""
    corpus = random_corpus("llama-256", 4)
    model = StreamableModel(open_checkpoint(str(planted)), planted, device="cpu")
    baseline = Baseline(model, corpus, PassControl(tmp_path))
    naive = baseline.stream_scores(open_checkpoint(str(planted)), arithmetic=IntegerProducts({}))
    recovered = baseline.stream_scores(smoothed[0.5].checkpoint, arithmetic=IntegerProducts({}))
    assert recovered[2].mean() < 0.2 * naive[2].mean()
    assert np.exp(recovered[1].mean() - recovered[0].mean()) == pytest.approx(1, abs=0.01)


def test_importance_that_is_given_is_smoothed_and_used(planted, text, tmp_path):
    profile = 'description = "d"\ngood_for = "g"\ntarget = "safetensors"\nbase = "W4A16_G32"\n'
    (tmp_path / "p.toml").write_text(profile + "[activations]\nsmooth = true")
    options = ["--profile", tmp_path / "p.toml", "--calibration", text, "--samples", 128, "--sequence-length", 32]
    options += ["--no-chat", "--device", "cpu", "--judge", "off", "--work-dir", tmp_path / "w"]

    def written(name: str, *given: object) -> np.ndarray:
        done = convert(*options, *given, "--fresh", "--output", tmp_path / name, planted)
        assert done.exit_code == 0, done.stderr
        return np.fromfile(tmp_path / name / "model.safetensors", np.uint8)

    own = written("own")
    seen = load_activations(tmp_path / "w" / "activations.safetensors").importance()
    save_imatrix(tmp_path / "same.gguf", seen)
    flat = {name: np.ones_like(sums) for name, sums in seen.sums.items()}
    save_imatrix(tmp_path / "flat.gguf", replace(seen, sums=flat))
    same, other = (written(name, "--imatrix", tmp_path / f"{name}.gguf") for name in ("same", "flat"))
    assert (same != own).mean() < 1e-3
    assert (other != own).mean() > 1e-2


def test_a_conversion_names_what_fell_back_and_how_to_keep_it(planted, text, tmp_path):
    source = DictSource.of(planted)
    source.tensors["model.layers.2.post_attention_layernorm.weight"][5] *= 1e7
    model = rewritten(planted, source, tmp_path / "model")
    options = ["--profile", "smoothquant-w8a8", "--calibration", text, "--samples", 128, "--sequence-length", 32]
    options += ["--no-chat", "--device", "cpu", "--judge", "off", "--json"]
    done = convert(*options, "--output", tmp_path / "out", model)
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    fallen = {choice["tensor"]: choice for choice in report["precision"]}
    gate, up = (f"model.layers.2.mlp.{name}_proj.weight" for name in ("gate", "up"))
    assert {gate, up} <= set(fallen)
    assert gate in done.stderr and fallen[gate]["alternative"] in done.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert gate.removesuffix(".weight") in config["ignore"]
    done = convert(*options, f"--set={up}=W8A8", "--output", tmp_path / "along", model)
    (along,) = (choice for choice in json.loads(done.stdout)["precision"] if choice["tensor"] == up)
    assert along["scheme"] == fallen[gate]["scheme"] and "multiplied as one with gate_proj" in along["reason"]
    assert along["wanted"] == "W8A8" and along["alternative"] == fallen[gate]["alternative"]
    assert f"{up}: {along['scheme']} instead of W8A8" in done.stderr
    keep = [f"--set={tensor}=W8A8" for tensor in fallen]
    assert fallen[gate]["alternative"] == f"--set '{gate}=W8A8'"
    done = convert(*options, *keep, "--output", tmp_path / "kept", model)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["precision"] == []
    config = json.loads((tmp_path / "kept" / "config.json").read_text())["quantization_config"]
    assert gate.removesuffix(".weight") not in config["ignore"]
