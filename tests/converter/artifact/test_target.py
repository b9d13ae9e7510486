"""A conversion to a size, bits per weight or a divergence: planned to the byte, resumed to equal bytes, or refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from bitwright.calibration.sensitivity.fisher import FisherFactors
from bitwright.calibration.sensitivity.table import SensitivityTable, load_sensitivity, save_sensitivity
from bitwright.calibration.statistics.imatrix_file import load_imatrix
from bitwright.converter import convert as convert_from_python
from bitwright.converter.cli import main
from bitwright.converter.job.identity import tool_identity
from bitwright.converter.job.job import Job
from bitwright.converter.job.progress import Progress
from bitwright.converter.job.work_directory import Stopped
from bitwright.converter.judge import findings
from bitwright.converter.measure.sensitivity import CANDIDATE_FORMATS, weights_sha256
from bitwright.converter.model.model_map import describe
from bitwright.converter.model.stored_rows import read_rows
from bitwright.converter.pipeline import run
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.files.gguf import read_gguf
from bitwright.formats.registry import get_format
from bitwright.profiles.reading.schema import load_profile, preset_names
from bitwright.profiles.vocabulary import Role
from tests.converter.artifact.test_sizes import some_importance

SHORT = ["--calibration", "embedded", "--samples", "128", "--sequence-length", "16", "--effort", "fast", "--judge=off"]


def some_sensitivity(model: Path, path: Path) -> Path:
    """A table whose losses fall by a quarter a bit, from a scale of each tensor's own."""
    checkpoint = open_checkpoint(str(model))
    model_map = describe(checkpoint)
    random = np.random.default_rng(0)
    tensors = [tensor for tensor in model_map.tensors if tensor.quantizable]
    losses = {
        tensor.name: {
            name: float(scale * 4.0 ** -get_format(name).bits_per_weight)
            for name in (*CANDIDATE_FORMATS, "TQ2_0")
            if get_format(name).fits(tensor.n_columns)
        }
        for tensor, scale in zip(tensors, random.lognormal(0, 1.5, len(tensors)), strict=True)
    }
    factors = FisherFactors(
        rows={t.name: np.ones((t.n_matrices, t.n_rows // t.n_matrices)) for t in tensors},
        columns={t.name: random.lognormal(0, 1, (t.n_matrices, t.n_columns)) for t in tensors},
        gradient_magnitude={t.name: float(random.random()) for t in tensors},
        activation_variance=dict.fromkeys(losses, 1.0),
        weight_magnitude=dict.fromkeys(losses, 1.0),
        model=checkpoint.model_id,
        revision=None,
        corpus="some",
        corpus_sha256="0" * 64,
        samples=1,
        sequence_length=16,
        labels="sampled",
    )
    table = SensitivityTable(
        losses,
        factors,
        dict.fromkeys(losses, 1),
        model_map.architecture,
        weights_sha256(checkpoint, model_map),
        "fast",
        tool_identity(),
    )
    save_sensitivity(path, table)
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def output_of(*arguments: object) -> dict:
    done = invoke(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def measured(tiny, tmp_path) -> list:
    """Options that give importance and sensitivity of the tiny llama with rows of 256, and its directory."""
    model = tiny("llama-256")
    importance = some_importance(model, tmp_path / "imatrix.gguf")
    sensitivity = some_sensitivity(model, tmp_path / "sensitivity.safetensors")
    options = ["--imatrix", importance, "--sensitivity", sensitivity, "--protect-super-weights", "off"]
    return [*options, "--effort", "fast", "--judge=off", model]


@pytest.mark.parametrize("size", ["600K", "900000", "1.5MiB"])
def test_a_size_is_met_to_the_byte(measured, tmp_path, size):
    n_bytes = {"600K": 600_000, "900000": 900_000, "1.5MiB": 3 << 19}[size]
    output = tmp_path / "m.gguf"
    planned = output_of("plan", "--target-size", size, "--output", output, *measured)
    assert 0.99 * n_bytes < planned["bytes"] <= n_bytes
    report = output_of("--target-size", size, "--output", output, *measured)
    assert output.stat().st_size == planned["bytes"] == report["artifact"]["bytes"]
    assert report["plan_sha256"] == planned["plan_sha256"]
    assert planned["budget"]["exact"] and planned["budget"]["budget"]["size"] == n_bytes
    fields = read_gguf(output).fields
    assert fields["bitwright.budget.size"].contents() == n_bytes
    assert fields["bitwright.budget.predicted_kld"].contents() == planned["predicted_kld"]
    assert fields["bitwright.sensitivity.corpus"].contents() == "some"


def test_columns_count_by_what_an_error_in_them_costs(measured, tmp_path):
    """The embedding too, whose inputs no matrix of importance knows."""
    table = load_sensitivity(tmp_path / "sensitivity.safetensors")
    columns = load_imatrix(tmp_path / "imatrix.gguf").with_costs(table.factors.columns).columns
    output_of("--target-size", "900K", "--output", tmp_path / "m.gguf", *measured)
    checkpoint = open_checkpoint(str(measured[-1]))
    specs = {tensor.name: tensor for tensor in describe(checkpoint).tensors}
    checked = set()
    for tensor in read_gguf(tmp_path / "m.gguf").tensors:
        block_format = get_format(tensor.ggml_type.name)
        if block_format.block_size > 1 and not tensor.scales:
            rows = read_rows(checkpoint, specs[tensor.name], 0, tensor.n_rows)
            expected = block_format.encode(rows, columns(tensor.name)[0], "fast")
            np.testing.assert_array_equal(tensor.read(0, tensor.n_rows), expected)
            assert not np.array_equal(expected, block_format.encode(rows, None, "fast"))
            checked.add(specs[tensor.name].role)
    assert Role.EMBEDDING in checked and len(checked) > 5


def test_a_file_with_second_level_scales_is_as_long_as_planned(measured, tmp_path):
    profile = tmp_path / "fp4.toml"
    head = 'description = "d"\ngood_for = "g"\n[budget]\nformats = ["NVFP4", "Q8_0", "F16"]\n'
    for n_bytes in range(1_500_000, 1_900_000, 97_003):
        profile.write_text(f'{head}size = "{n_bytes}"\n')
        output = tmp_path / f"{n_bytes}.gguf"
        report = output_of("--profile", profile, "--output", output, *measured)
        assert 0.97 * n_bytes < output.stat().st_size == report["artifact"]["bytes"] <= n_bytes
        assert any(tensor.name.endswith(".scale") for tensor in read_gguf(output).tensors)


def test_split_files_together_meet_the_size(measured, tmp_path):
    report = output_of("--target-size", "900K", "--split-size", "150K", "--output", tmp_path / "m.gguf", *measured)
    assert len(report["artifact"]["files"]) > 5
    assert 880_000 < sum(Path(file["path"]).stat().st_size for file in report["artifact"]["files"]) <= 900_000


def test_bits_per_weight_and_divergence(measured, tmp_path):
    by_bits = output_of("plan", "--target-bpw", "3.5", *measured)
    assert 3.45 < by_bits["bits_per_weight"] <= 3.5
    assert by_bits["output"].endswith("-BW-Q3_K_S.gguf")
    divergence = by_bits["predicted_kld"] * 1.000001
    by_divergence = output_of("plan", "--target-kld", divergence, *measured)
    assert by_divergence["predicted_kld"] <= divergence
    assert by_divergence["bytes"] <= by_bits["bytes"]


@pytest.mark.parametrize("mean_kld", [0.04, 0.06])
def test_a_divergence_that_is_missed_is_said(measured, tmp_path, monkeypatch, mean_kld):
    measure = findings.streamed_quality
    monkeypatch.setattr(findings, "streamed_quality", lambda *of: {**measure(*of), "mean_kld": mean_kld})
    options = ["--target-kld", "0.05", "--sequence-length", "32", "--output", tmp_path / "m.gguf"]
    done = invoke(*options, *(option for option in measured if option != "--judge=off"))
    assert done.exit_code == 0, done.stderr
    report = json.loads((tmp_path / "m.bitwright" / "report.json").read_text())
    page = (tmp_path / "m.bitwright" / "report.html").read_text()
    said = "the mean KL divergence is 0.06 as measured, above the 0.05 that was asked for"
    assert (said in done.stderr) == (said in page) == (mean_kld > 0.05)
    assert report["target_kld"] == 0.05 >= report["predicted_kld"] > 0.045
    assert f"promised     mean KLD {report['predicted_kld']:.4g} predicted, 0.05 asked for" in done.stdout
    assert f"{report['predicted_kld']:.5f}" in page
    assert report["compression_ratio"] == report["source"]["bytes"] / (tmp_path / "m.gguf").stat().st_size


def test_python_takes_the_same_targets(measured, tmp_path):
    options = {key[2:].replace("-", "_"): value for key, value in zip(measured[:8:2], measured[1:8:2], strict=True)}
    output = tmp_path / "m.gguf"
    report = convert_from_python(
        str(measured[-1]), output=output, target_size="700K", judge="off", quiet=True, **options
    )
    assert 0.99 * 700_000 < report["artifact"]["bytes"] <= 700_000 and report["profile"] == "budget"


def test_a_plan_explains_what_was_measured(measured):
    shown = invoke("plan", "--target-bpw", "3.5", "--explain", "mlp_down", *measured)
    assert shown.exit_code == 0, shown.stderr
    lines = shown.stdout.splitlines()
    header, _, *rows = lines[next(i for i, line in enumerate(lines) if line.startswith("tensor ")) :]
    assert header.split() == ["tensor", "shape", "format", "bytes", "bits", "loss"]
    reasons = " ".join(row.strip() for row in rows if row.startswith("    "))
    assert len([row for row in rows if not row.startswith("    ")]) == 4
    assert reasons.count("budget: ") == reasons.count(" nats; ") == 4
    of_a_preset = invoke("plan", "--profile", "balanced-4bit", *measured)
    assert "predicted mean KL divergence: " in of_a_preset.stdout


def test_the_budget_never_loses_to_a_preset_of_its_size(measured, tmp_path):
    """Without floors, as presets have others."""
    free = tmp_path / "free.toml"
    free.write_text('description = "d"\ngood_for = "g"\n[budget]\n')
    for name in ("balanced-4bit", "mlp-low-precision", "two-bit", "ultra-low-1.5bit", "importance-tiers", "nvfp4-gguf"):
        fixed = output_of("plan", "--profile", name, *measured)
        solved = output_of("plan", "--profile", free, "--target-bpw", f"{fixed['bits_per_weight']:.17g}", *measured)
        assert solved["bits_per_weight"] <= fixed["bits_per_weight"]
        assert solved["predicted_kld"] <= fixed["predicted_kld"] * (1 + 1e-9), name


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--target-size", "100K"], "the smallest plan takes"),
        (["--target-size", "700K", "--target-kld", "1e-6"], "reach a predicted KL divergence of"),
        (["--target-bpw", "1"], "the smallest plan takes"),
    ],
)
def test_what_cannot_be_met_exits_with_the_frontier(measured, options, what):
    for command in (["plan"], []):
        failed = invoke(*command, *options, *measured)
        assert failed.exit_code == 1 and what in failed.stderr
        assert "remedy: nearest: " in failed.stderr and failed.stderr.count("  KLD ") >= 3
        assert f"where: {', '.join(options[::2])}" in failed.stderr


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--target-size", "big"], "'big' is no size"),
        (["--target-bpw", "-1"], "a positive number is expected"),
        (["--target-kld", "nan"], "target_kld is nan, which it cannot be"),
        (["--target-size", "1M", "--target-bpw", "4"], "two sizes for one file"),
        (["--profile", "budget"], "add --target-size SIZE"),
        (["--profile", "fp8", "--target-bpw", "4"], "a target chooses among formats of a GGUF"),
    ],
)
def test_bad_targets(measured, options, what):
    failed = invoke("plan", *options, *measured)
    assert failed.exit_code == 1 and what in failed.stderr


def test_a_table_of_another_model_is_refused(tiny, measured, tmp_path):
    other = shutil.copytree(tiny("llama-256"), tmp_path / "other")
    (shard,) = other.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-(1 << 20) :] = np.random.default_rng(0).integers(0, 16, 1 << 20, np.uint8).tobytes()
    shard.write_bytes(data)
    for model in (other, tiny("llama")):
        failed = invoke("plan", "--target-bpw", "6", *measured[:-1], model)
        assert failed.exit_code == 1 and "another model" in failed.stderr
    failed = invoke("plan", "--target-bpw", "6", "--sensitivity", tmp_path / "none.safetensors", tiny("llama"))
    assert failed.exit_code == 1 and "no such file" in failed.stderr


@pytest.mark.parametrize("model", ["llama-256", "qwen3_moe"])
@pytest.mark.parametrize("preset", [name for name in preset_names() if load_profile(name).target == "gguf"])
def test_every_preset_writes_what_it_plans(tiny, tmp_path, model, preset):
    directory = tiny(model)
    options = ["--imatrix", some_importance(directory, tmp_path / "imatrix.gguf"), "--effort", "fast"]
    options += ["--sensitivity", some_sensitivity(directory, tmp_path / "sensitivity.safetensors"), "--judge", "off"]
    options += ["--protect-super-weights", "off"]
    target = ["--target-bpw", "5.5"] if preset == "budget" else []
    arguments = ["--profile", preset, *target, "--output", tmp_path / "m.gguf", *options, directory]
    planned = output_of("plan", *arguments)
    assert output_of(*arguments)["artifact"]["bytes"] == planned["bytes"] == (tmp_path / "m.gguf").stat().st_size


def test_without_a_table_the_model_is_measured_first(tiny, tmp_path):
    model, output = tiny("llama"), tmp_path / "m.gguf"
    arguments = ["--target-bpw", "6", *SHORT, "--output", output, model]
    for dry in (["plan"], ["--dry-run"]):
        said = invoke(*dry, *arguments)
        assert said.exit_code == 0 and "which is not measured yet" in " ".join(said.stdout.split())
    assert not output.with_suffix(".bitwright").exists()
    report = output_of(*arguments)
    assert {"calibrate", "analyse", "encode"} <= set(report["seconds"])
    assert output.stat().st_size == report["artifact"]["bytes"]
    assert "--target-bpw=6.0" in report["arguments"] and "--samples=128" in report["arguments"]

    # Now that it is there, a dry run is a dry run, and the job is done.
    assert output_of("plan", *arguments)["plan_sha256"] == report["plan_sha256"]
    assert output_of(*arguments) == report
    table = output.with_suffix(".bitwright") / "sensitivity.safetensors"
    assert load_sensitivity(table).factors.samples == 32
    given = output_of("plan", *arguments[:-1], "--sensitivity", table, model)
    assert given["plan_sha256"] == report["plan_sha256"]

    # Measured by a command of its own, the table says the same.
    written = invoke("imatrix", "--sensitivity", *SHORT[:6], "--output", tmp_path / "own.gguf", model)
    own = tmp_path / "own.sensitivity.safetensors"
    assert written.stdout.split() == [str(tmp_path / "own.gguf"), str(own)], written.stderr
    assert load_sensitivity(own).losses == load_sensitivity(table).losses
    refused = invoke("imatrix", "--sensitivity", "--output", tmp_path / "x.gguf", tmp_path / "own.gguf")
    assert refused.exit_code == 1 and "give the model" in refused.stderr

    # The command of the report makes the same bytes.
    again = output_of(*report["arguments"][:-1], "--output", tmp_path / "again" / "m.gguf", "--judge", "off", model)
    assert again["artifact"]["files"][0]["sha256"] == report["artifact"]["files"][0]["sha256"]

    other = invoke("--target-bpw", "7", *SHORT, "--output", output, model)
    assert other.exit_code == 1 and "target" in other.stderr and "another job" in other.stderr


def test_an_analysis_that_is_stopped_continues_to_the_same_bytes(tiny, tmp_path):
    def job(name: str) -> Job:
        return Job(
            str(tiny("llama")),
            load_profile("budget"),
            output=tmp_path / name / "m.gguf",
            target_size=120_000,
            calibration="embedded",
            samples=128,
            sequence_length=16,
            effort="fast",
            judge="off",
        )

    run(job("whole"), Progress(quiet=True))
    stops = 0
    while True:
        polls = iter(range(4 + stops))  # a little further each time, as some work is kept as a whole

        def should_stop(polls=polls) -> bool:
            return next(polls, None) is None

        try:
            run(job("parts"), Progress(quiet=True), should_stop)
            break
        except Stopped:
            stops += 1
    assert stops > 3
    whole, parts = (tmp_path / name / "m.gguf" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    journals = [path.with_suffix(".bitwright") / "job.json" for path in (whole, parts)]
    plans = [json.loads(path.read_text())["plan"] for path in journals]
    assert plans[0] == plans[1] != "undecided"


def test_a_kill_during_the_analysis_loses_nothing(tiny, tmp_path):
    """Kill the process once the table has begun; the resumed run ends with the bytes of one that was not killed."""
    output, reference = tmp_path / "killed" / "m.gguf", tmp_path / "whole" / "m.gguf"
    arguments = [*map(str, ["--target-bpw", "6", *SHORT, tiny("llama"), "--output"])]
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from bitwright.converter.measure import sensitivity\n"
        "measure = sensitivity._Tensor.losses\n"
        "def losses(self, *arguments):\n"
        "    if self.spec.name == 'blk.1.attn_q.weight': os._exit(9)\n"
        "    return measure(self, *arguments)\n"
        "sensitivity._Tensor.losses = losses\n"
        "from bitwright.converter.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, *arguments, str(output)], capture_output=True, check=False)
    assert killed.returncode == 9, killed.stderr
    assert (output.with_suffix(".bitwright") / "sensitivity.jsonl").exists()
    output_of(*arguments, output)
    output_of(*arguments, reference)
    assert output.read_bytes() == reference.read_bytes()


def test_fresh_measures_again(tiny, tmp_path):
    arguments = ["--target-bpw", "6", *SHORT, "--output", tmp_path / "m.gguf", tiny("llama")]
    first = output_of(*arguments)
    table = tmp_path / "m.bitwright" / "sensitivity.safetensors"
    before = table.stat().st_mtime_ns
    again = output_of("--fresh", *arguments)
    assert table.stat().st_mtime_ns > before
    assert again["artifact"] == first["artifact"]


def test_an_output_of_another_job_is_not_replaced(tiny, tmp_path):
    (tmp_path / "m.gguf").write_text("precious")
    failed = invoke("--target-bpw", "6", *SHORT, "--output", tmp_path / "m.gguf", tiny("llama"))
    assert failed.exit_code == 1 and "the output exists" in failed.stderr
    assert (tmp_path / "m.gguf").read_text() == "precious"
