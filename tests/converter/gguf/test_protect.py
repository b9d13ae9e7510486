"""Super weights protected in a whole conversion: each way alone, what it costs, what the report and the file say."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bitwright.calibration.statistics.imatrix_file import load_imatrix, save_imatrix
from bitwright.converter.cli import main
from bitwright.converter.gguf import protect
from bitwright.converter.gguf.protect import Decision, Trial, load_decisions, save_decisions
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.gguf import read_gguf
from tests.converter.artifact.test_target import some_sensitivity
from tests.converter.gguf import planted_model

DOWN = "blk.2.ffn_down.weight"
# Two in the same neuron, one elsewhere in the tensor.
PLACES = {(100, 300): 9.0, (7, 300): -5.0, (30, 11): 7.0}


@pytest.fixture(scope="module")
def planted(tiny, tmp_path_factory) -> tuple[Path, Path, Path]:
    """A model, a text, and its importance with the super weights."""
    directory = tmp_path_factory.mktemp("planted")
    model = planted_model.build(tiny("llama-256"), directory / "model", 2, PLACES)
    text = planted_model.text(model, directory / "text.txt")
    importance = directory / "imatrix.gguf"
    options = ["--calibration", text, "--samples", 128, "--sequence-length", 32, "--no-chat"]
    convert("imatrix", "--super-weights", *options, "--output", importance, model)
    return model, text, importance


def convert(*arguments: object) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.stderr
    return done.stdout


def run(planted, output: Path, *options: object, base: str = "Q2_K") -> dict:
    """The report of a conversion with down projections in this format and everything else in Q8_0."""
    model, text, importance = planted
    common = ["--profile", "uniform-8bit", "--set", f"mlp_down={base}", "--imatrix", importance, "--calibration", text]
    common += ["--effort", "fast", "--sequence-length", 32, "--judge", "off", "--json", "--output", output]
    return json.loads(convert(*common, *options, model))


def tensor_row(report: dict, name: str) -> dict:
    plan = json.loads(Path(report["path"]).with_name("plan.json").read_bytes())
    return next(row for row in plan["tensors"] if row["tensor"] == name)


@pytest.fixture(scope="module")
def unprotected(planted, tmp_path_factory) -> dict:
    return run(planted, tmp_path_factory.mktemp("off") / "off.gguf", "--protect-super-weights", "off", base="TQ2_0")


def test_the_super_weights_are_those_planted(planted):
    report = load_imatrix(planted[2]).super_weights
    assert {(w.row, w.column): w.value for w in report.weights} == PLACES


def test_off_does_nothing_and_knows_nothing(unprotected):
    assert unprotected["super_weight_coverage"] is None and unprotected["protection"] == []
    assert "super" not in tensor_row(unprotected, DOWN)["reason"]


@pytest.mark.parametrize("base", ["TQ2_0", "Q2_K", "IQ2_XXS"])
def test_pinned_weights_come_out_within_the_tolerance_at_the_same_size(base, planted, tmp_path):
    report = run(planted, tmp_path / "pin.gguf", "--protect-super-weights", "pin", base=base)
    off = run(planted, tmp_path / "off.gguf", "--protect-super-weights", "off", base=base)
    coverage, row = report["super_weight_coverage"], tensor_row(report, DOWN)
    assert coverage["confirmed"] == 3 and len(row["pins"]) == 3
    assert "super weights" in row["reason"] and "pinned within 0.05" in row["reason"]
    assert coverage["within"] == sum(weight["relative_error"] <= 0.05 for weight in coverage["weights"]) >= 2
    assert row["bytes"] == tensor_row(off, DOWN)["bytes"]
    assert report["plan_sha256"] != off["plan_sha256"]


def test_rescaled_weights_land_and_the_file_tells_verify_how(planted, unprotected, tmp_path):
    output = tmp_path / "rescaled.gguf"
    report = run(planted, output, "--protect-super-weights", "rescale", base="TQ2_0")
    coverage = report["super_weight_coverage"]
    assert (coverage["confirmed"], coverage["within"]) == (3, 3)
    assert "rescaled" in tensor_row(report, DOWN)["reason"]
    assert "rescaled" in tensor_row(report, "blk.2.ffn_up.weight")["reason"]
    assert tensor_row(report, DOWN)["bytes"] == tensor_row(unprotected, DOWN)["bytes"]
    # The error of the artifact is that of its rescaled source.
    errors = {error["tensor"]: error["relative_error"] for error in report["errors"]}
    assert errors["blk.2.ffn_up.weight"] < 1e-4
    verified = {
        e["tensor"]: e["relative_error"]
        for e in json.loads(convert("verify", output, "--against", planted[0], "--json"))
    }
    assert verified == pytest.approx(errors)
    quality = json.loads(
        convert(
            "evaluate",
            output,
            "--against",
            planted[0],
            "--text",
            planted[1],
            "--samples",
            4,
            "--sequence-length",
            32,
            "--json",
        )
    )
    before = next(Path(file["path"]) for file in unprotected["artifact"]["files"])
    worse = json.loads(
        convert(
            "evaluate",
            before,
            "--against",
            planted[0],
            "--text",
            planted[1],
            "--samples",
            4,
            "--sequence-length",
            32,
            "--json",
        )
    )
    assert quality["mean_kld"] < worse["mean_kld"]


@pytest.mark.parametrize(("mode", "expected"), [("raise", "Q6_K"), ("exclude", "F32")])
def test_a_finer_format_is_given_to_that_layer_alone(mode, expected, planted, tmp_path):
    report = run(planted, tmp_path / "finer.gguf", "--protect-super-weights", mode)
    row = tensor_row(report, DOWN)
    assert row["format"] == expected and row["kept_out"] == (mode == "exclude")
    assert tensor_row(report, "blk.1.ffn_down.weight")["format"] == "Q2_K"
    stored = {tensor.name: tensor.ggml_type.name for tensor in read_gguf(tmp_path / "finer.gguf").tensors}
    assert stored[DOWN] == expected
    assert report["super_weight_coverage"]["within"] == 3


def test_raising_to_what_it_is_already_does_nothing(planted, tmp_path):
    report = run(planted, tmp_path / "same.gguf", "--protect-super-weights", "raise", base="Q8_0")
    (decision,) = report["protection"]
    assert decision["action"] is None and "as fine as" in decision["why"]
    assert tensor_row(report, DOWN)["format"] == "Q8_0"


@pytest.mark.parametrize("standard_errors", [2.0, 1.0])
def test_auto_takes_what_measurement_shows_to_help(standard_errors, planted, tmp_path, monkeypatch):
    """Rescaling lowers the divergence here, by between one and two standard errors; pins change nothing."""
    monkeypatch.setattr(protect, "_STANDARD_ERRORS", standard_errors)
    report = run(planted, tmp_path / "auto.gguf", base="TQ2_0")
    (decision,) = report["protection"]
    trials = {trial["what"]: trial for trial in decision["trials"]}
    assert set(trials) == {"none", "pin", "rescale", "raise"}
    assert trials["raise"]["extra_bytes"] > 0 == trials["rescale"]["extra_bytes"]
    gain = trials["none"]["divergence"] - trials["rescale"]["divergence"]
    assert trials["rescale"]["error"] < gain < 2 * trials["rescale"]["error"]
    assert trials["pin"]["divergence"] == trials["none"]["divergence"]
    assert decision["action"] == (None if standard_errors == 2 else "rescale")
    assert ("KLD of this tensor" in decision["why"]) == (standard_errors == 1)
    again = run(planted, tmp_path / "auto.gguf", base="TQ2_0")
    assert again["protection"] == report["protection"] and again["artifact"] == report["artifact"]


@pytest.mark.parametrize("times", [2.0, 0.5])
def test_auto_raises_only_what_gains_more_than_elsewhere(times, planted, tmp_path, monkeypatch):
    monkeypatch.setattr(protect, "_TIMES_ELSEWHERE", times)
    report = run(planted, tmp_path / "auto.gguf", base="TQ2_0")
    (decision,) = report["protection"]
    assert (decision["action"] == "raise") == (times == 0.5)
    assert tensor_row(report, DOWN)["format"] == ("Q6_K" if times == 0.5 else "TQ2_0")


def test_auto_does_not_look_where_formats_are_fine(planted, tmp_path):
    report = run(planted, tmp_path / "fine.gguf", base="Q4_K")
    assert report["super_weight_coverage"] is None


def test_threads_and_a_second_run_change_no_byte(planted, tmp_path):
    """Chunks of another size and order hold the same pins."""
    files = []
    for threads in (1, 3):
        output = tmp_path / f"{threads}.gguf"
        run(planted, output, "--protect-super-weights", "pin", "--threads", threads)
        files.append(output.read_bytes())
    assert files[0] == files[1]


def test_super_weights_are_looked_for_where_the_file_does_not_know_them(planted, tmp_path):
    model, text, importance = planted
    plain = tmp_path / "plain.gguf"
    matrix = load_imatrix(importance)
    save_imatrix(plain, type(matrix)(matrix.sums, matrix.counts, corpus=matrix.corpus))
    options = ["--protect-super-weights", "pin"]
    known = run(planted, tmp_path / "known.gguf", *options)
    found = run((model, text, plain), tmp_path / "found.gguf", *options, "--no-chat")
    assert found["super_weight_coverage"] == known["super_weight_coverage"]


def test_super_weights_of_another_model_are_refused(planted, tiny, tmp_path):
    arguments = ["--profile", "uniform-8bit", "--set", "mlp_down=Q2_K", "--imatrix", planted[2], "--judge", "off"]
    arguments += ["--output", tmp_path / "x.gguf", tiny("llama-256")]
    failed = CliRunner().invoke(main, [str(a) for a in arguments])
    assert failed.exit_code == 1 and "the super weights are of another model" in failed.stderr


def test_decisions_come_back_as_they_were(tmp_path):
    decisions = [
        Decision(
            "a", "rescale", "why", None, ((0, 3, 1.5),), (Trial("none", 0, 0.1, 0.0), Trial("pin", 0, 0.05, 0.01))
        ),
        Decision("b", None, "nothing"),
    ]
    save_decisions(tmp_path / "d.json", decisions)
    assert load_decisions(tmp_path / "d.json") == decisions
    for damaged in (b"", b"[3]", b'[{"tensor": "a"}]', (tmp_path / "d.json").read_bytes()[:-20]):
        (tmp_path / "d.json").write_bytes(damaged)
        with pytest.raises(ConvertError, match="record of protection is damaged"):
            load_decisions(tmp_path / "d.json")


def test_a_size_holds_with_what_is_recorded_of_pins(planted, tmp_path):
    model, text, importance = planted
    sensitivity = some_sensitivity(model, tmp_path / "sensitivity.safetensors")
    options = ["--target-size", "700K", "--imatrix", importance, "--sensitivity", sensitivity, "--calibration", text]
    options += ["--effort", "fast", "--judge", "off", "--output", tmp_path / "m.gguf", model]
    assert "what protects them best costs no byte of the budget" in " ".join(convert("plan", *options).split())
    report = json.loads(convert("--json", "--protect-super-weights", "pin", *options))
    assert len(tensor_row(report, DOWN)["pins"]) == 3
    assert 690_000 < (tmp_path / "m.gguf").stat().st_size == report["artifact"]["bytes"] <= 700_000
    refused = CliRunner().invoke(main, [str(o) for o in ("plan", "--protect-super-weights", "raise", *options)])
    assert refused.exit_code == 1 and "than the budget has given them" in refused.stderr


def test_of_a_tensor_in_one_format_is_decided_once(planted, tmp_path):
    """Another plan of the same model looks nothing up anew where it gives the tensor the same format."""
    model, text, importance = planted
    options = ["--imatrix", importance, "--sensitivity", some_sensitivity(model, tmp_path / "s.safetensors")]
    options += ["--calibration", text, "--effort", "fast", "--judge", "off", "--cache", tmp_path / "cache", "--json"]

    def run_at(size: str) -> tuple[str, str, dict]:
        arguments = [*options, "--target-size", size, "--output", tmp_path / f"{size}.gguf", model]
        done = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.stderr
        report = json.loads(done.stdout)
        (decision,) = report["protection"]
        assert {trial["what"] for trial in decision["trials"]} >= {"none", "pin"}
        return tensor_row(report, DOWN)["format"], done.stderr, decision

    first, others = run_at("700K"), [run_at(size) for size in ("690K", "600K")]
    assert "protection: from the cache" not in first[1]
    for format_name, said, decision in others:
        assert ("protection: from the cache" in said) == (format_name == first[0])
        assert format_name != first[0] or decision == first[2]
    assert {format_name == first[0] for format_name, _, _ in others} == {True, False}
