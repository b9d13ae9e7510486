"""What a job meets at its borders: files that are traps, streams that fail, signals, and callers that err."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bitwright.converter import convert as convert_from_python
from bitwright.converter.boundary.errors import clear_errors
from bitwright.converter.boundary.interrupts import Stop, stops_at_once
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from tests.converter.test_cli import convert


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    """A copy of a tiny llama in one file, for setting traps in."""
    return shutil.copytree(tiny("llama-256"), tmp_path / "model")


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def link(target: str):
    def make(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return make


def huge(path: Path) -> None:
    """Of holes, which take no place on the disk."""
    path.touch()
    os.truncate(path, 1 << 40)


def directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


@pytest.mark.parametrize(
    ("name", "trap", "words"),
    [
        ("README.md", pipe, "a pipe and no regular file"),
        ("vocab.json", pipe, "a pipe and no regular file"),
        ("config.json", pipe, "a pipe and no regular file"),
        ("tokenizer.json", link("/dev/zero"), "a link to a place outside of the model"),
        ("generation_config.json", link("/etc/hostname"), "a link to a place outside of the model"),
        ("chat_template.jinja", link("../../secret"), "a link to a place outside of the model"),
        ("tokenizer_config.json", link("nowhere"), "No such file"),
        ("special_tokens_map.json", link("special_tokens_map.json"), "symbolic links"),
        ("merges.txt", huge, "1099511627776 bytes"),
        ("added_tokens.json", directory, "a directory and no regular file"),
        ("model.safetensors", huge, "belong to none"),
    ],
)
def test_a_trap_in_a_model_is_named_and_not_opened(model, tmp_path, monkeypatch, name, trap, words):
    monkeypatch.chdir(tmp_path)
    trap(model / name)
    failed = convert("--dry-run", model)
    assert failed.exit_code == 1 and failed.stdout == ""
    assert failed.stderr.startswith("error: ") and "\n  where: " in failed.stderr and "\n  remedy: " in failed.stderr
    assert words in failed.stderr and name in failed.stderr


def test_files_that_nothing_reads_harm_nothing(model):
    """They are not hashed, and not part of what the model is."""
    before = open_checkpoint(str(model)).files()
    pipe(model / "notes.json")
    link("/dev/zero")(model / "training_args.json")
    link("nowhere")(model / "trainer_state.json")
    huge(model / "optimizer.json")
    assert open_checkpoint(str(model)).files() == before
    assert "tokenizer.json" in [name for name, _, _ in before]


def test_links_within_the_hubs_cache_are_followed(model, tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(model.iterdir())):
        shutil.move(path, repository / "blobs" / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    assert open_checkpoint(str(snapshot)).config["model_type"] == "llama"


@pytest.mark.parametrize("option", ["--imatrix", "--sensitivity", "--profile"])
def test_a_pipe_given_for_a_file_is_refused(model, tmp_path, option):
    path = tmp_path / f"given{'.toml' if option == '--profile' else '.safetensors'}"
    os.mkfifo(path)
    # Of the profiles only one that measures wants the table.
    extra = ["--profile", "budget", "--target-bpw", "4"] if option == "--sensitivity" else []
    failed = convert("--dry-run", *extra, option, path, model)
    assert failed.exit_code == 1 and "a pipe and no regular file" in failed.stderr


def test_a_file_without_the_right_to_read_it(model, monkeypatch):
    opened = os.open

    def refuse(path: Any, *options: Any) -> int:
        if Path(path).name == "model.safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *options)

    monkeypatch.setattr(os, "open", refuse)
    failed = convert("--dry-run", model)
    assert failed.exit_code == 1 and "(Permission denied)" in failed.stderr and "Traceback" not in failed.stderr


def test_a_name_that_the_system_refuses(model, tmp_path):
    output = tmp_path / f"{'n' * 300}.gguf"
    failed = convert("--profile", "uniform-8bit", "--judge", "off", "--output", output, model)
    assert (
        failed.exit_code == 1
        and "the file's name would have 305 bytes" in failed.stderr
        and "choose a shorter one" in failed.stderr
    )


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "/somewhere"), ["No space left", "/somewhere", "make room"]),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), ["invalid start byte", "UTF-8"]),
        (RecursionError("too deep"), ["nested too deeply"]),
        (MemoryError(), ["memory does not suffice"]),
        (ConvertError("what", "where", "remedy"), ["what", "where", "remedy"]),
    ],
)
def test_what_the_system_raises_is_explained(error, words):
    with pytest.raises(ConvertError) as caught, clear_errors():
        raise error
    for word in words:
        assert word in str(caught.value)


def test_errors_of_our_own_stay_what_they_are():
    for error in (ValueError("a bug"), BrokenPipeError()):
        with pytest.raises(type(error)), clear_errors():
            raise error


def test_json_says_errors_too(model, tmp_path):
    absent = tmp_path / "absent"
    for arguments, code in (
        (["plan", "--json", absent], 1),
        (["--json", "--profile", "none", model], 1),
        (["evaluate", absent, "--against", absent, "--json"], 1),
        (["inspect", absent, "--json"], 1),
        (["plan", "--json", "--samples", "many", model], 2),
    ):
        failed = convert(*arguments)
        said = json.loads(failed.stdout)
        assert failed.exit_code == said["exit_code"] == code
        assert said["error"].keys() == {"what", "where", "remedy"} and all(said["error"].values())
        assert said["error"]["what"] in failed.stderr


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", "2>/dev/full <&-"])
def test_a_stderr_that_fails_ends_no_job(model, tmp_path, redirection):
    command = [sys.executable, "-m", "bitwright.converter", "--profile", "uniform-8bit", "--judge", "off", "--json"]
    command += ["--output", str(tmp_path / "m.gguf"), str(model)]
    done = subprocess.run(["sh", "-c", f'"$@" {redirection}', "sh", *command], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["artifact"]["files"][0]["path"] == str(tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize("arguments", ["plan {}", "profiles list", "--help", "plan --help", "--version"])
def test_a_full_stdout_is_an_error(model, arguments):
    command = f"{sys.executable} -m bitwright.converter {arguments.format(model)} >/dev/full"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert "No space left on device" in done.stderr and "stdout" in done.stderr and "Exception" not in done.stderr


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_every_signal_stops_as_ctrl_c_does(signum, capsys):
    before = signal.getsignal(signum)
    with Stop().on_interrupt() as stop:
        assert not stop()
        os.kill(os.getpid(), signum)
        assert stop() and "finishing this layer" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signum)
    with pytest.raises(KeyboardInterrupt), stops_at_once():
        os.kill(os.getpid(), signum)
    assert signal.getsignal(signum) is before


def test_a_hangup_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stops_at_once(), Stop().on_interrupt() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"protect_super_weights": "pinn"}, "did you mean 'pin'?"),
        ({"activation_scales": "msee"}, "did you mean 'mse'?"),
        ({"effort": "bset"}, "did you mean 'best'?"),
        ({"sample": 256}, "did you mean 'samples'?"),
        ({"calibraton": "embedded"}, "did you mean 'calibration'?"),
        ({"alpha": "half"}, "a number from 0 to 1, or auto"),
        ({"alpha": True}, "give 'auto' or a number"),
        ({"alpha": 2}, "a number from 0 to 1"),
        ({"threads": -1}, "0 at least"),
        ({"seed": -1}, "0 at least"),
        ({"threads": True}, "give a whole number"),
        ({"samples": "256"}, "give a whole number"),
        ({"chat": "yes"}, "give True or False"),
        ({"target_bpw": float("nan")}, "give a number"),
        ({"target_size": "much"}, "write for example 500M"),
        ({"shard_bytes": 0}, "1 at least"),
        ({"imatrix": 3}, "give a path"),
        ({"work_dir": "a\0b"}, "give a path"),
        ({"overrides": [3]}, "give a list of texts"),
        ({"profile": 3}, "give a path or a text"),
        ({"lm_eval": [3]}, "give a list of texts"),
        ({"fresh": "no"}, "give True or False"),
        ({"device": "cdua"}, "did you mean 'cuda'?"),
    ],
)
def test_python_is_held_to_the_same_options(tmp_path, options, words):
    with pytest.raises(ConvertError) as caught:
        convert_from_python(str(tmp_path), **options)
    assert words in str(caught.value)
    assert next(iter(options)) in str(caught.value) or "--target-size" in str(caught.value)
