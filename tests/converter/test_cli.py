"""The command line from outside: what it prints, what it imports, and how it fails."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from click.testing import CliRunner, Result

from bitwright.calibration.statistics.imatrix_file import save_imatrix
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.converter.cli import main
from bitwright.converter.job.work_directory import WorkDirectory, default_work_dir


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    """A copy of the tiny sharded llama, for damaging."""
    return shutil.copytree(tiny("llama"), tmp_path / "model")


@pytest.fixture
def single(tiny, tmp_path) -> Path:
    """A copy of a tiny llama in one file."""
    return shutil.copytree(tiny("llama-256"), tmp_path / "single")


def test_help_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['convert', '--help']\n"
        "from bitwright.converter.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numba', 'numpy', 'datasets', 'gguf'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for option in ("--profile", "--output", "--set", "--imatrix", "--calibration", "--samples", "--dry-run", "--fresh"):
        assert option in done.stdout
    for command in ("imatrix", "plan", "evaluate", "inspect", "verify", "profiles"):
        assert command in done.stdout


def test_a_plan_needs_no_torch(tiny):
    code = (
        "import sys; sys.argv = ['convert', '--dry-run', sys.argv[1]]\n"
        "from bitwright.converter.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny("llama-256"))], check=True, stdout=subprocess.DEVNULL)


def test_profiles_are_listed_and_shown():
    assert "mlp-low-precision" in convert("profiles", "list").stdout
    assert "base = " in convert("profiles", "show", "balanced-4bit").stdout
    assert "W8A16_CHANNEL     weights in INT8, a scale for a row; inputs as" in convert("profiles", "list").stdout
    assert 'base = "FP8_BLOCK"' in convert("profiles", "show", "FP8_BLOCK").stdout
    failed = convert("profiles", "show", "balanced")
    assert failed.exit_code == 1 and "did you mean" in failed.stderr


def test_a_plan_explains_every_tensor(tiny):
    shown = convert("plan", "--explain", "mlp_down", "--set", "blk.1.ffn_down.weight=Q8_0", tiny("llama-256"))
    assert shown.exit_code == 0, shown.stderr
    assert "--set 'blk.1.ffn_down.weight=Q8_0'" in shown.stdout
    assert "balanced-4bit.toml, rule 2" in shown.stdout
    assert "attn_q" not in shown.stdout
    data = json.loads(convert("plan", "--json", tiny("llama-256")).stdout)
    assert data["bytes"] > sum(row["bytes"] for row in data["tensors"])
    missing = convert("plan", "--explain", "mlp_dwn", tiny("llama-256"))
    assert missing.exit_code == 1 and "did you mean 'mlp_down'?" in missing.stderr


def test_split_artifacts_are_verified_and_inspected_as_one(tiny, tmp_path):
    arguments = ["--profile", "uniform-8bit", "--judge", "off", "--split-size", "200K"]
    done = convert(*arguments, "--output", tmp_path / "m.gguf", "--json", tiny("llama-256"))
    assert done.exit_code == 0, done.stderr
    files = [file["path"] for file in json.loads(done.stdout)["artifact"]["files"]]
    assert len(files) > 2 and all(Path(file).stat().st_size < 600_000 for file in files)
    assert convert("verify", files[0], "--against", tiny("llama-256")).exit_code == 0
    assert json.loads(convert("inspect", "--json", files[0]).stdout)["files"] == len(files)
    whole = json.loads(convert("inspect", "--json", files[0]).stdout)
    assert json.loads(convert("inspect", "--json", files[1]).stdout) == whole  # any shard stands for all
    Path(files[1]).unlink()
    failed = convert("verify", files[0], "--against", tiny("llama-256"))
    assert failed.exit_code == 1 and "shard of the artifact is missing" in failed.stderr


def test_the_recipe_is_in_the_artifact(tiny, tmp_path):
    convert("--profile", "uniform-8bit", "--judge", "off", "--output", tmp_path / "m.gguf", tiny("llama-256"))
    metadata = json.loads(convert("inspect", "--json", tmp_path / "m.gguf").stdout)["metadata"]
    assert metadata["bitwright.profile"] == "uniform-8bit"
    assert metadata["bitwright.source.model"] == "llama-256"
    assert metadata["general.file_type"] == 7
    assert metadata["general.quantization_version"] == 2


# What goes wrong: each function breaks a model in one way.


def missing_shard(model: Path) -> None:
    sorted(model.glob("model-*.safetensors"))[1].unlink()


def truncated_shard(model: Path) -> None:
    shard = sorted(model.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def absent_tensor(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    first = next(iter(table["weight_map"].values()))
    table["weight_map"]["model.layers.0.mlp.extra.weight"] = first
    index.write_text(json.dumps(table))


def header_beyond_the_file(model: Path) -> None:
    shard = sorted(model.glob("model-*.safetensors"))[0]
    shard.write_bytes((1 << 40).to_bytes(8, "little") + shard.read_bytes()[8:])


def pickle_only(model: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x02")


def unknown_architecture(model: Path) -> None:
    edit_json(model / "config.json", model_type="lamma", architectures=["LammaForCausalLM"])


def remote_code(model: Path) -> None:
    edit_json(
        model / "config.json",
        model_type="mystery",
        architectures=["MysteryForCausalLM"],
        auto_map={"AutoModelForCausalLM": "modeling_mystery.MysteryForCausalLM"},
    )


def unknown_tokenizer(model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "[aeiou]+|x"}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


def no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def nothing(model: Path) -> None:
    """The arguments are what is wrong."""


@pytest.mark.parametrize(
    ("damage", "arguments", "words"),
    [
        (missing_shard, [], ["model-00002-of-", "missing"]),
        (truncated_shard, [], ["model-00002-of-"]),
        (absent_tensor, [], ["mlp.extra"]),
        (header_beyond_the_file, [], ["model-00001-of-", "header"]),
        (pickle_only, [], ["safetensors", "save_pretrained"]),
        (unknown_architecture, [], ["lamma", "llama.cpp", "transformers"]),
        (remote_code, [], ["code"]),
        (unknown_tokenizer, [], ["--pre-tokenizer", "[aeiou]+|x"]),
        (no_tokenizer, [], ["tokenizer"]),
        (nothing, ["--profile", "mlp-low-precison"], ["did you mean mlp-low-precision, "]),
        (nothing, ["--set", "mlp_down=Q4K"], ["unknown format 'Q4K'", "did you mean 'Q4_K'?"]),
        (nothing, ["--set", "mlp_dwn=Q4_K"], ["matches no tensor", "did you mean 'mlp_down'?"]),
        (nothing, ["--samples", "5"], ["128 to 1024"]),
        (nothing, ["--sequence-length", "1"], ["--sequence-length"]),
        (nothing, ["--calibration", "no/such/file.txt"], ["no/such/file.txt"]),
        (nothing, ["--imatrix", "no-such-file.gguf"], ["no-such-file.gguf"]),
        (nothing, ["--pre-tokenizer", "qwen"], ["qwen2"]),
        (nothing, ["--split-size", "much"], ["--split-size"]),
        (nothing, ["--output", "/proc/nowhere/model.gguf"], ["/proc", "--output"]),
        (nothing, ["--work-dir", "/proc/nowhere"], ["/proc"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_bad_input_is_refused_before_any_work(model, tmp_path, monkeypatch, damage, arguments, words):
    monkeypatch.chdir(tmp_path)
    damage(model)
    before = sorted(tmp_path.rglob("*"))
    failed = convert(*arguments, model)
    assert failed.exit_code == 1
    assert failed.stdout == ""
    message = failed.stderr
    assert message.startswith("error: ") and "\n  where: " in message and "\n  remedy: " in message
    assert "Traceback" not in message
    for word in words:
        assert word in message, message
    assert not list(tmp_path.rglob("*.gguf"))
    assert {path for path in before if path.is_file()} == {path for path in tmp_path.rglob("*") if path.is_file()}


def test_verbose_adds_the_traceback(model):
    assert "Traceback" in convert("--verbose", "--profile", "none", model).stderr


def test_no_such_model():
    failed = convert("no-such-directory/at/all")
    assert failed.exit_code == 1 and "no such directory" in failed.stderr


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("model.layers.2.mlp.up_proj.weight", []),
        ("model.layers.2.input_layernorm.weight", []),  # stays in F32
        ("model.embed_tokens.weight", ["--set", "embedding=BF16"]),
        ("lm_head.weight", ["--set", "output=F16"]),
    ],
)
def test_weights_that_are_no_numbers_are_named(single, tmp_path, value, name, arguments):
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    weights = load_torch(single / "model.safetensors")
    weights[name].view(-1, 256)[-1, 17] = torch.tensor(value)
    row = weights[name].numel() // 256 - 1
    save_torch(weights, single / "model.safetensors", metadata={"format": "pt"})
    options = ["--profile", "uniform-8bit", "--judge", "off", "--output", tmp_path / "m.gguf"]
    failed = convert(*options, *arguments, single)
    assert failed.exit_code == 1
    assert f"the weight {value} is not a finite number" in failed.stderr
    assert f"tensor {name}, row {row}, column 17" in failed.stderr
    assert not (tmp_path / "m.gguf").exists()


def importance_of(shape: tuple[int, int], name: str) -> ImportanceMatrix:
    return ImportanceMatrix(sums={name: np.ones(shape)}, counts={name: np.ones(shape[0], np.int64)})


@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "blk.77.attn_q.weight"])
def test_an_importance_matrix_of_another_model_is_refused(single, tmp_path, name):
    save_imatrix(tmp_path / "other.gguf", importance_of((1, 128), name))
    failed = convert("--imatrix", tmp_path / "other.gguf", "--output", tmp_path / "m.gguf", single)
    assert failed.exit_code == 1
    assert "of another model" in failed.stderr and name in failed.stderr


def test_an_importance_matrix_that_lacks_experts_is_refused_as_partial(tiny, tmp_path):
    save_imatrix(tmp_path / "partial.gguf", importance_of((2, 64), "blk.0.ffn_up_exps.weight"))
    failed = convert("--imatrix", tmp_path / "partial.gguf", "--output", tmp_path / "m.gguf", tiny("qwen3_moe"))
    assert failed.exit_code == 1
    assert "is partial: it has 2 of the" in failed.stderr and "blk.0.ffn_up_exps.weight" in failed.stderr


def test_a_format_that_needs_importance_is_refused_without_that_of_its_tensor(tiny, tmp_path):
    save_imatrix(tmp_path / "some.gguf", importance_of((1, 256), "blk.0.attn_q.weight"))
    arguments = ["--imatrix", tmp_path / "some.gguf", "--set", "mlp_up=IQ1_S", "--output", tmp_path / "m.gguf"]
    failed = convert(*arguments, tiny("llama-256"))
    assert failed.exit_code == 1
    assert "IQ1_S cannot be encoded without importance" in failed.stderr and "blk.0.ffn_up.weight" in failed.stderr


def test_the_importance_matrix_of_a_model_of_another_name_is_said(single, tmp_path):
    matrix = replace(importance_of((1, 256), "blk.0.attn_q.weight"), model="org/other")
    save_imatrix(tmp_path / "other.gguf", matrix)
    options = ["--profile", "uniform-8bit", "--judge", "off", "--output", tmp_path / "m.gguf"]
    done = convert("--imatrix", tmp_path / "other.gguf", *options, single)
    assert done.exit_code == 0
    assert "was computed of org/other" in done.stderr


def test_another_jobs_work_directory_is_refused_with_the_difference(tiny, tmp_path):
    arguments = ["--judge", "off", "--work-dir", tmp_path / "work", "--output", tmp_path / "m.gguf", tiny("llama-256")]
    assert convert("--profile", "uniform-8bit", *arguments).exit_code == 0
    failed = convert("--profile", "uniform-8bit", "--set", "token_embd*=F16", *arguments)
    assert failed.exit_code == 1
    assert "belongs to another job" in failed.stderr and "overrides" in failed.stderr
    assert convert("--profile", "uniform-8bit", "--set", "token_embd*=F16", "--fresh", *arguments).exit_code == 0


def test_a_file_that_is_not_ours_is_not_replaced(tiny, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"precious")
    arguments = ["--profile", "uniform-8bit", "--judge", "off", "--output", tmp_path / "m.gguf", tiny("llama-256")]
    failed = convert(*arguments)
    assert failed.exit_code == 1 and "not of this job" in failed.stderr
    assert (tmp_path / "m.gguf").read_bytes() == b"precious"
    assert convert("--fresh", *arguments).exit_code == 0


def test_two_processes_in_one_work_directory(tiny, tmp_path):
    output = tmp_path / "m.gguf"
    with WorkDirectory(default_work_dir(output)).locked():
        failed = convert("--profile", "uniform-8bit", "--judge", "off", "--output", output, tiny("llama-256"))
    assert failed.exit_code == 75 and "another process is working" in failed.stderr


def test_a_disk_too_small_is_noticed_before_any_work(tiny, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    failed = convert("--profile", "uniform-8bit", "--output", tmp_path / "m.gguf", tiny("llama-256"))
    assert failed.exit_code == 1
    assert "1.00 MiB free" in failed.stderr and "for the artifact" in failed.stderr


def test_a_memory_too_small_is_noticed_before_any_work(tiny, tmp_path, monkeypatch):
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=1 << 20))
    failed = convert("--profile", "uniform-8bit", "--output", tmp_path / "m.gguf", tiny("llama-256"))
    assert failed.exit_code == 1
    assert "1.00 MiB of memory are available" in failed.stderr and "--judge", "off" in failed.stderr


def test_a_disk_that_fills_up_loses_nothing(tiny, tmp_path):
    """A limit on file size stands in for the full disk: both are an OSError in the middle of writing."""
    arguments = ["--profile", "uniform-8bit", "--judge", "off", "--output", tmp_path / "m.gguf", tiny("llama-256")]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
    code = limit + "import sys; from bitwright.converter.cli import main; main(sys.argv[1:])"
    failed = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert failed.returncode == 1
    assert "writing failed" in failed.stderr and "it continues from here" in failed.stderr
    assert not (tmp_path / "m.gguf").exists()
    assert convert(*arguments).exit_code == 0
    other = tmp_path / "other" / "m.gguf"
    assert convert(*arguments[:-2], other, arguments[-1]).exit_code == 0
    assert other.read_bytes() == (tmp_path / "m.gguf").read_bytes()


def test_interrupt_finishes_the_layer_and_prints_how_to_resume(tiny, tmp_path):
    """Ctrl-C once the work has begun."""
    import os
    import signal

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 2000)
    command = [
        sys.executable,
        "-m",
        "bitwright.converter",
        "--judge",
        "off",
        "--samples",
        "128",
        "--sequence-length",
        "64",
        "--no-analysis",
        "--no-error-feedback",
        "--effort",
        "fast",
    ]
    command += ["--calibration", str(text), "--output", str(tmp_path / "m.gguf"), str(tiny("llama-256"))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    checkpoint = tmp_path / "m.bitwright" / "calibration" / "stream.npz"
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "resume with: bitwright --judge off --samples 128" in errors
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert (tmp_path / "m.gguf").exists()


def test_a_profile_file_is_checked(tmp_path):
    path = tmp_path / "mine.toml"
    head = 'description = "mine"\ngood_for = "me"\nextends = "budget"\n'
    path.write_text(head + '[[rule]]\nroles = "output"\nlayers = "all"\nformat = "q8_0"\n[budget]\nsize = "1G"\n')
    done = convert("profiles", "check", path)
    assert done.exit_code == 0, done.stderr
    assert "Q8_0 for output (mine.toml, rule 1)" in done.stdout
    assert "a budget of 1000000000 bytes for what no rule names" in done.stdout
    assert "no fewer bits than IQ2_XXS for attention_*" in done.stdout
    path.write_text(head + '[[rule]]\nroles = "outptu"\nformat = "q8_0"\n')
    failed = convert("profiles", "check", path)
    assert failed.exit_code == 1 and "mine.toml, rule 1, key roles" in failed.stderr
    assert "did you mean 'output'?" in failed.stderr
    assert convert("profiles", "check", tmp_path / "absent.toml").exit_code == 1
    assert "ends in .toml" in convert("profiles", "check", tmp_path).stderr
