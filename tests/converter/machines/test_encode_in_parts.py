"""Tensors encoded by many machines: the bytes of one machine, and parts that cannot be put together are refused."""

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from bitwright.converter.artifact.writer import JOURNAL
from bitwright.converter.boundary.interrupts import STOPPED
from bitwright.converter.machines.part import Part
from bitwright.converter.machines.shares import rows_of
from bitwright.converter.preparation import prepare
from bitwright.formats.files.disk import Step, observed
from tests.converter.commands import convert, done, refused
from tests.converter.machines.elsewhere import run_elsewhere

_FAST = ["--judge", "off", "--effort", "fast", "--device", "cpu", "--threads", "2"]
_TEXT = ["--calibration", "embedded", "--samples", "128", "--sequence-length", "8"]
CASES = {
    "plain": (
        "m.gguf",
        [
            "-p",
            "mlp-low-precision",
            "--set",
            "mlp_*=IQ4_NL",
            "--no-analysis",
            "--no-error-feedback",
            "--split-size",
            "60kB",
        ],
    ),
    "scales": ("m.gguf", ["-p", "uniform-8bit", "--set", "mlp_*=NVFP4"]),
    "feedback": (
        "m.gguf",
        ["-p", "mlp-low-precision", "--set", "mlp_*=Q4_0", "--no-analysis", "--error-feedback=quick"],
    ),
    "measured": ("m.gguf", ["--target-bpw", "6", "--protect-super-weights", "off", "--no-error-feedback"]),
    "directory": ("m", ["-p", "w4a16", "--set", "attention_*=NVFP4"]),
    "smoothed directory": ("m", ["-p", "smoothquant-w8a8", "--no-error-feedback"]),
}


def digests(path: Path) -> dict[str, str]:
    files = [
        p for p in path.parent.rglob("*") if p.is_file() and p.relative_to(path.parent).parts[0].startswith(path.stem)
    ]
    own = [p for p in files if not any(part.endswith(("bitwright", "-work")) for part in p.parts)]
    return {str(p.relative_to(path.parent)): hashlib.sha256(p.read_bytes()).hexdigest() for p in own}


def plan_of(model: Path, directory: Path, options: list[str]) -> Path:
    done("plan", *options, *_FAST, *_TEXT, "--save", directory / "plan.json", "-q", model)
    return directory / "plan.json"


def copy_of(plan: Path, directory: Path) -> Path:
    """The plan with all that was measured for it, for a test alone."""
    return shutil.copytree(plan.parent, directory, ignore=shutil.ignore_patterns("whole")) / plan.name


def encode(plan: Path, i: int, n: int, *more: object) -> Path:
    output = plan.parent / f"{n}" / f"{i}.json"
    done("encode", "--plan", plan, "--part", f"{i}/{n}", "--output", output, "-q", *more)
    return output


@pytest.fixture(scope="module")
def planned(tiny, tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """A saved plan of a case, and the artifact of one machine."""
    known: dict[str, tuple[Path, Path]] = {}

    def of(name: str) -> tuple[Path, Path]:
        if name not in known:
            directory = tmp_path_factory.mktemp("machines")
            output, options = CASES[name]
            whole = directory / "whole" / output
            done(*options, *_FAST, *_TEXT, "--output", whole, "-q", tiny("llama"))
            known[name] = plan_of(tiny("llama"), directory, options), whole
        return known[name]

    return of


@pytest.mark.parametrize(
    ("name", "counts"), [("plain", (1, 2, 3, 7)), *((name, (3,)) for name in CASES if name != "plain")]
)
def test_any_number_of_parts_gives_the_bytes_of_one_machine(name, counts, planned, tmp_path):
    plan, whole = planned(name)
    for n in counts:
        copied = copy_of(plan, tmp_path / str(n))
        parts = [encode(copied, i, n) for i in range(n, 0, -1)]
        output = tmp_path / f"{n}-made" / whole.name
        said = convert("finish", "--plan", copied, *parts, "--output", output, "--json", "-q")
        assert said.exit_code == 0, said.stderr
        assert digests(output) == digests(whole) and len(digests(output)) >= 1
        report = json.loads(said.stdout)
        assert report["feedback"] == json.loads(report_of(whole).read_text())["feedback"]
        again = convert("finish", "--plan", copied, *parts, "--output", output)
        assert again.exit_code == 0 and "already done" in again.stderr


def report_of(artifact: Path) -> Path:
    ending = ".bitwright" if artifact.suffix == ".gguf" else ".bitwright-work"
    return artifact.with_name(f"{artifact.stem}{ending}") / "report.json"


def test_parts_weigh_about_the_same_and_have_every_tensor_once(tiny):
    from bitwright.converter.job.build import build_job

    rows = prepare(build_job(tiny("llama"), "uniform-8bit", judge="off")).plan.tensors
    for n in (1, 2, 5, len(rows) + 3):
        shares = [rows_of(rows, Part(i, n)) for i in range(1, n + 1)]
        assert sorted(row.tensor.name for share in shares for row in share) == sorted(row.tensor.name for row in rows)
        loads = [sum(row.tensor.n_weights for row in share) for share in shares]
        assert max(loads) - min(loads) <= max(row.tensor.n_weights for row in rows)


def test_what_is_missing_cut_short_or_foreign_is_named_with_its_command(planned, tiny, tmp_path):
    plan = copy_of(planned("plain")[0], tmp_path / "p")
    first, third = encode(plan, 1, 3), encode(plan, 3, 3)
    finish = ["finish", "--plan", plan]
    said = refused(*finish, first, third)
    assert "part 2 of 3 is missing" in said
    assert f"bitwright encode --plan {plan} --part 2/3 --output {first.with_name('2.json')}" in said
    second = first.with_name("2.json")
    said = refused(*finish, first, second, third)
    assert "no such manifest" in said and str(second) in said
    second = encode(plan, 2, 3)
    other = plan_of(tiny("llama"), tmp_path, ["-p", "uniform-8bit"])
    foreign = encode(other, 2, 3)
    assert "is of another plan" in refused(*finish, first, foreign, third)
    assert "different numbers of parts" in refused(*finish, first, encode(plan, 2, 2), third)
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    said = refused(*finish, first, second, third)
    assert "damaged" in said and "--part 2/3" in said
    second.write_bytes(content.replace(b'"part": [\n  2', b'"part": [\n  1'))
    assert "not what was written" in refused(*finish, first, second, third)
    second.write_bytes(content)
    data = second.with_suffix(".piece")
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    assert "--part 2/3" in refused(*finish, first, second, third)
    data.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    said = refused(*finish, first, second, third, "--output", tmp_path / "n.gguf")
    assert "are not what was written" in said and str(data) in said
    data.unlink()
    assert "the data are missing" in refused(*finish, first, second, third)


def test_the_default_names_need_no_list(planned, tmp_path):
    plan, whole = planned("plain")
    copied = copy_of(plan, tmp_path / "p")
    for i in (1, 2):
        done("encode", "--plan", copied, "--part", f"{i}/2", "-q", "--scratch", tmp_path / "scratch")
    assert sorted(p.name for p in (copied.parent / "plan.parts").iterdir()) == [
        *("1-of-2.json", "1-of-2.piece", "2-of-2.json", "2-of-2.piece")
    ]
    assert list((tmp_path / "scratch").iterdir()) == []
    done("finish", "--plan", copied, "--output", tmp_path / "made" / whole.name, "-q")
    assert digests(tmp_path / "made" / whole.name) == digests(whole)
    assert "already done" in convert("encode", "--plan", copied, "--part", "1/2").stderr


def test_machines_of_different_instruction_sets_are_refused_together(planned):
    plan, _ = planned("scales")
    parts = [encode(plan, i, 3) for i in (1, 3)]
    second = parts[0].with_name("2.json")
    ran = run_elsewhere("default", "encode", "--plan", plan, "--part", "2/3", "--output", second, "-q")
    assert ran.returncode == 0, ran.stderr
    said = refused("finish", "--plan", plan, parts[0], second, parts[1])
    assert "what part 2/3 was made of, or with, is not the others': cpu is DEFAULT there" in said
    assert f"--part 2/3 --output {second}" in said


def test_a_plan_of_another_model_or_of_lost_measurements_is_refused(planned, tiny, tmp_path):
    plan, _ = planned("feedback")
    copied = copy_of(plan, tmp_path / "p")
    other = shutil.copytree(tiny("llama"), tmp_path / "other" / tiny("llama").name)
    weights = next(other.glob("*.safetensors"))
    done("encode", "--plan", copied, "--part", "1/2", "--model", other, "-q")  # a copy is the same
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    said = refused("encode", "--plan", copied, "--part", "2/2", "--model", other, "-q")
    assert "made of something else: files differ" in said
    (copied.parent / f"{copied.name}.bitwright-work" / "imatrix.gguf").unlink()
    assert "gone or was changed" in refused("encode", "--plan", copied, "--part", "2/2", "-q")
    (tmp_path / "no.json").write_text("{}")
    assert "no saved plan" in refused("encode", "--plan", tmp_path / "no.json", "--part", "1/2")
    assert "no saved plan" in refused("plan", "-p", "uniform-8bit", "--save", tmp_path / "no.json", tiny("llama"))


def test_a_part_that_is_stopped_continues(planned, tmp_path):
    plan, _ = planned("plain")
    expected = encode(plan, 1, 1)
    lines = 0

    def stop(step: Step, path: Path) -> None:
        nonlocal lines
        lines += step == "sync" and path.name == JOURNAL
        if lines == 5:
            lines += 1
            os.kill(os.getpid(), signal.SIGTERM)

    output = tmp_path / "1.json"
    arguments = ["encode", "--plan", plan, "--part", "1/1", "--output", output]
    with observed(stop):
        stopped = convert(*arguments)
    assert stopped.exit_code == STOPPED and "resume with" in stopped.stderr and not output.exists()
    kept = tmp_path / "1.json.bitwright-work" / JOURNAL
    assert 5 <= len(kept.read_text().splitlines()) < 20
    assert convert(*arguments).exit_code == 0
    assert output.with_suffix(".piece").read_bytes() == expected.with_suffix(".piece").read_bytes()
    assert json.loads(output.read_text())["tensors"] == json.loads(expected.read_text())["tensors"]
    assert not kept.exists()
