"""The workflow that comes with the tool, run by the real Snakemake, and its commands for Slurm alone."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bitwright.converter.job.cache import DIRECTORY_VARIABLE, OFF
from tests.converter.commands import convert, done, refused
from tests.converter.machines import killed_once
from tests.converter.machines.test_encode_in_parts import digests

ROOT = Path(__file__).parents[3]
SNAKEMAKE = Path(os.environ.get("SNAKEMAKE", ROOT / ".venv-snakemake/bin/snakemake")).absolute()
TEXT = "--calibration embedded --samples 128 --sequence-length 8"
PLAN = "--judge off --effort fast --no-analysis --set mlp_*=IQ4_NL"
SMOOTHED = f"--judge off --effort fast {TEXT}"


@pytest.fixture(scope="module")
def one_machine(tiny, tmp_path_factory) -> Path:
    """The artifact that one machine makes, with error feedback, of the importance that one machine computes."""
    directory = tmp_path_factory.mktemp("one")
    done("imatrix", tiny("llama"), *TEXT.split(), "-q", "--output", directory / "importance.gguf")
    options = [*PLAN.split(), "-p", "mlp-low-precision", "--imatrix", directory / "importance.gguf"]
    done(*options, *TEXT.split(), "--error-feedback=quick", "--output", directory / "m.gguf", "-q", tiny("llama"))
    return directory / "m.gguf"


def test_snakemake_makes_the_bytes_of_one_machine_though_a_part_is_killed(one_machine, tiny, tmp_path):
    assert SNAKEMAKE.is_file(), f"{SNAKEMAKE} is missing: make test makes it, or set SNAKEMAKE"
    done("workflow", tmp_path)
    marker = tmp_path / "killed"
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config |= {
        "bitwright": f"{sys.executable} -m {killed_once.__name__} {marker}",
        "calibration": TEXT,
        "calibration_parts": 1,
        "encode_parts": 2,
        "jobs": {
            "small": {
                "model": str(tiny("llama")),
                "profile": "mlp-low-precision",
                "options": PLAN,
                "statistics": "--moments",
                "output": str(tmp_path / "made" / "m.gguf"),
            },
            "smoothed": {
                "model": str(tiny("llama")),
                "profile": "smoothquant-w8a8",
                "options": SMOOTHED,
                "measure": "none",
                "statistics": "--activations",
                "encode_parts": 1,
                "output": str(tmp_path / "made" / "smoothed"),
            },
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    profile = tmp_path / "profiles" / "local" / "config.yaml"
    profile.write_text(profile.read_text().replace("cores: all", "cores: 2"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), DIRECTORY_VARIABLE: OFF}
    command = [SNAKEMAKE, "--profile", profile.parent]

    def snakemake(*more: str) -> subprocess.CompletedProcess[str]:
        ran = subprocess.run(
            [*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
        return ran

    said = snakemake()
    assert "Error in rule encode" in said.stderr and "Trying to restart job" in said.stderr
    assert int(marker.read_text()) == killed_once.AFTER_TENSORS  # of the part that was killed, and continued
    assert (tmp_path / "made" / "m.gguf").read_bytes() == one_machine.read_bytes()
    done(*SMOOTHED.split(), "-p", "smoothquant-w8a8", "--output", tmp_path / "whole" / "smoothed", "-q", tiny("llama"))
    assert digests(tmp_path / "made" / "smoothed") == digests(tmp_path / "whole" / "smoothed")
    report = json.loads((tmp_path / "work" / "small" / "report.json").read_text())
    assert report["feedback"]["kept"] > 0
    assert report["artifact"]["files"][0]["path"] == str(tmp_path / "made" / "m.gguf")
    assert "Nothing to be done" in snakemake().stderr


def test_the_script_for_slurm_submits_commands_that_make_the_same(one_machine, tiny, tmp_path, monkeypatch):
    """sbatch is one that writes down what it is given; every task is then run as Slurm runs it."""
    done("workflow", tmp_path / "w")
    calls = tmp_path / "calls"
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        f"#!{sys.executable}\nimport json, sys\nfrom pathlib import Path\n"
        f"calls = Path({str(calls)!r})\n"
        'known = calls.read_text() if calls.exists() else ""\n'
        'calls.write_text(known + json.dumps(sys.argv[1:]) + "\\n")\n'
        "print(len(known.splitlines()) + 1)\n"
    )
    sbatch.chmod(0o755)
    environment = os.environ | {"PATH": f"{sbatch.parent}:{os.environ['PATH']}", "PARTS": "2", "CALIBRATION": TEXT}
    environment["STATISTICS"] = "--moments"
    output = tmp_path / "made" / "m.gguf"
    script = ["bash", tmp_path / "w" / "array.sh", tiny("llama"), output, *PLAN.split(), "-p", "mlp-low-precision"]
    subprocess.run(script, env=environment, check=True, capture_output=True, cwd=tmp_path)
    submitted = [json.loads(line) for line in calls.read_text().splitlines()]
    assert len(submitted) == 5
    for number, words in enumerate(submitted, start=1):
        assert (f"--dependency=afterok:{number - 1}" in words) == (number > 1)
        (wrapped,) = [word.removeprefix("--wrap=") for word in words if word.startswith("--wrap=")]
        command = wrapped.partition(";")[0].removeprefix("srun bitwright ")
        for task in (1, 2) if "--array=1-2" in words else (None,):
            values = {} if task is None else {"ID": task, "COUNT": 2, "MIN": 1, "MAX": 2}
            with monkeypatch.context() as patched:
                for name, value in values.items():
                    patched.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
                echo = subprocess.run(
                    ["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True
                )
                ran = convert(*echo.stdout.splitlines())
                assert ran.exit_code == 0, ran.stderr
    assert output.read_bytes() == one_machine.read_bytes()
    assert "75|130) scontrol requeue $SLURM_JOB_ID" in wrapped


def test_the_workflow_is_written_once_and_replaces_nothing(tmp_path):
    said = convert("workflow", tmp_path, "--model", "it's: mine")
    assert said.exit_code == 0 and str(tmp_path / "Snakefile") in said.stdout
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["jobs"]["example"]["model"] == "it's: mine"
    assert convert("workflow", tmp_path, "--model", "it's: mine").exit_code == 0
    (tmp_path / "config.yaml").write_text("jobs: {}\n")
    assert "changed on purpose" in refused("workflow", tmp_path)
    for path in tmp_path.rglob("profiles/*/config.yaml"):
        assert yaml.safe_load(path.read_text())["keep-going"] is True
    assert (
        shlex.split(f"bash -n {tmp_path / 'array.sh'}")
        and not subprocess.run(["bash", "-n", tmp_path / "array.sh"], check=True).returncode
    )
