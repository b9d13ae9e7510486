"""Second moments and activations measured by many machines: the bytes of one, and artifacts that are made with them."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bitwright.calibration.statistics.quarter_sums import add_quarters
from bitwright.calibration.stream.micro_batches import N_GROUPS, groups_of_part
from bitwright.calibration.super_weights.removal_stream import Removal
from bitwright.calibration.super_weights.removals import Removals
from bitwright.converter.boundary.interrupts import STOPPED
from bitwright.converter.machines.measuring.group_sums import load_part
from bitwright.formats.files.disk import observed
from tests.converter.commands import convert, done, refused
from tests.converter.gguf import planted_model
from tests.converter.machines.test_encode_in_parts import digests, encode

TEXT = ["--calibration", "embedded", "--samples", "130", "--sequence-length", "16"]
HERE = ["--device", "cpu", "--threads", "2", "-q"]
FED = ["-p", "mlp-low-precision", "--set", "attention_*=Q4_0", "--no-analysis"]
SMOOTHED = ["-p", "smoothquant-w8a8"]
MAKING = ["--judge", "off", "--effort", "fast", *TEXT, *HERE]


def part_of(model: Path, directory: Path, i: int, n: int, *more: object) -> Path:
    output = directory / f"{i}-of-{n}.safetensors"
    done("imatrix", model, *TEXT, *HERE, "--part", f"{i}/{n}", "--output", output, *more)
    return output


@pytest.fixture(scope="module")
def merged(tiny, tmp_path_factory) -> Callable[..., Path]:
    """The statistics of a model, in so many parts, beside the importance."""
    known: dict[tuple[str, int], Path] = {}

    def of(name: str, n: int) -> Path:
        if (name, n) not in known:
            directory = tmp_path_factory.mktemp(f"{name}-{n}")
            parts = [
                part_of(tiny(name), directory / "parts", i, n, "--moments", "--activations") for i in range(n, 0, -1)
            ]
            done("imatrix", "--merge", *parts, "--output", directory / "imatrix.gguf", "-q")
            known[name, n] = directory / "imatrix.statistics"
        return known[name, n]

    return of


@pytest.fixture(scope="module")
def planned(tiny, tmp_path_factory) -> Callable[..., Path]:
    """The work directory of what one machine has measured for a plan."""
    known: dict[tuple[str, str], Path] = {}

    def of(name: str, *options: str) -> Path:
        key = name, " ".join(options)
        if key not in known:
            plan = tmp_path_factory.mktemp("planned") / "plan.json"
            done("plan", *options, *MAKING, "--save", plan, tiny(name))
            known[key] = plan.with_name(f"{plan.name}.bitwright-work")
        return known[key]

    return of


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix in (".npz", ".json")}


@pytest.mark.parametrize(("name", "counts"), [("llama", (1, 2, 3, 7)), ("qwen3_moe", (3,))])
def test_any_number_of_parts_gives_the_moments_of_one_machine(name, counts, merged, planned):
    one = planned(name, *FED)
    assert len(contents(one / "moments")) > 4
    for n in counts:
        assert contents(merged(name, n) / "moments") == contents(one / "moments")
        assert (merged(name, n).with_suffix(".gguf")).read_bytes() == (one / "imatrix.gguf").read_bytes()


@pytest.mark.parametrize(("name", "counts"), [("llama", (1, 2, 3, 7)), ("qwen3_moe", (3,))])
def test_any_number_of_parts_gives_the_activations_of_one_machine(name, counts, merged, planned):
    one = planned(name, *SMOOTHED)
    assert len(contents(one / "activation-rows")) > 4
    for n in counts:
        assert contents(merged(name, n) / "activation-rows") == contents(one / "activation-rows")
        file = "activations.safetensors"
        assert (merged(name, n) / file).read_bytes() == (one / file).read_bytes()


def test_any_number_of_parts_has_one_identity(merged):
    records = {(merged("llama", n) / "statistics.json").read_bytes() for n in (1, 2, 3, 7)}
    assert len(records) == 1


@pytest.mark.parametrize(("output", "options"), [("m.gguf", FED), ("m", [*SMOOTHED, "--error-feedback=quick"])])
def test_an_artifact_that_rests_on_them_is_that_of_one_machine(output, options, merged, tiny, tmp_path):
    whole, statistics = tmp_path / "whole" / output, merged("llama", 3)
    done(*options, *MAKING, "--output", whole, tiny("llama"))
    given = ["--statistics", statistics]
    if output == "m.gguf":
        given += ["--imatrix", statistics.with_suffix(".gguf")]
    plan = tmp_path / "plan.json"
    done("plan", *options, *given, *MAKING, "--save", plan, tiny("llama"))
    work = plan.with_name(f"{plan.name}.bitwright-work")
    assert not (work / "moments").exists() and not (work / "activations.safetensors").exists()
    elsewhere = shutil.copytree(statistics, tmp_path / "elsewhere")
    parts = [encode(plan, 1, 2), encode(plan, 2, 2, "--statistics", elsewhere)]
    made = tmp_path / "made" / output
    said = convert("finish", "--plan", plan, *parts, "--output", made, "--json", "-q")
    assert said.exit_code == 0, said.stderr
    assert digests(made) == digests(whole) and len(digests(made)) >= 1
    report = json.loads(said.stdout)
    assert report["feedback"]["kept"] > 0 and (output == "m.gguf" or report["smoothing"]["groups"])


def test_super_weights_whose_trials_are_shared_are_those_of_one_machine(tiny, tmp_path, monkeypatch):
    model = planted_model.build(tiny("llama-256"), tmp_path / "model", 2, {(100, 300): 9.0, (30, 200): 7.0})
    text = ["--calibration", planted_model.text(model, tmp_path / "text.txt"), "--samples", "128"]
    more = [*text, "--sequence-length", "32", "--no-chat", *HERE]
    making = [*FED, "--set", "mlp_down=Q2_K", "--protect-super-weights", "pin", "--no-error-feedback"]
    making += ["--judge", "off", "--effort", "fast"]

    def found(name: str, *given: object) -> dict[str, object]:
        done("plan", *making, *given, *more, "--save", tmp_path / name / "plan.json", model)
        return json.loads((tmp_path / name / "plan.json.bitwright-work" / "super_weights.json").read_text())

    parts = [tmp_path / f"{i}.safetensors" for i in (1, 2)]
    for i, part in enumerate(parts, start=1):
        done("imatrix", model, *more, "--super-weights", "--part", f"{i}/2", "--output", part)
        assert load_part(part).trials
    done("imatrix", "--merge", *parts, "--output", tmp_path / "i.gguf", "-q")
    whole = found("whole")
    assert whole["weights"]
    measured: list[Removal] = []
    measure = Removals._measure

    def noted(self: Removals, removals: list[Removal], part: int, stage: str) -> None:
        measured.extend(removals)
        measure(self, removals, part, stage)

    monkeypatch.setattr(Removals, "_measure", noted)
    assert found("given", "--statistics", tmp_path / "i.statistics", "--cache", "off") == whole
    assert all(len(removal.weights) > 1 for removal in measured)


@pytest.mark.parametrize("n", range(1, N_GROUPS + 1))
def test_groups_that_are_added_up_in_parts_are_what_they_are_at_once(n):
    """Bit for bit, also where a group has nothing; and few sums are ever there."""
    random = np.random.default_rng(n)
    groups = {i: random.standard_normal(500).astype(np.float32) ** 9 for i in range(N_GROUPS) if i not in (4, 9, 15)}
    most = 0

    def summed(of: range) -> dict[int, np.ndarray]:
        nonlocal most
        sums: dict[int, np.ndarray] = {}
        for group in of:
            if group in groups:
                sums[group] = groups[group].copy()
            most = max(most, len(sums))
            add_quarters(sums, of.start, group + 1)
        return sums

    (whole,) = summed(range(N_GROUPS)).values()
    assert most <= 3
    parts = [summed(groups_of_part(i, n)) for i in range(1, n + 1)]
    assert all(len(part) <= 4 for part in parts)
    if n in (1, 4):
        assert all(len(part) == 1 for part in parts)
    together = {first: sums for part in parts for first, sums in part.items()}
    add_quarters(together, 0, N_GROUPS)
    ((first, total),) = together.items()
    assert first == 0 and total.tobytes() == whole.tobytes()
    in_a_row = np.zeros(500, np.float32)
    for group in sorted(groups):
        in_a_row += groups[group]
    assert (in_a_row != whole).any()  # the order matters


def test_data_that_are_missing_cut_short_or_changed_are_named(tiny, tmp_path):
    model = tiny("llama")
    parts = [part_of(model, tmp_path, i, 2, "--moments") for i in (1, 2)]
    merge = ["imatrix", "--merge", *parts, "--output", tmp_path / "m.gguf"]
    data = parts[1].with_suffix(".data")
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    said = refused(*merge)
    assert f"it is not the {len(content)} bytes" in said and f"--part 2/2 --output {parts[1]}" in said
    data.unlink()
    assert f"--part 2/2 --output {parts[1]}" in refused(*merge)
    data.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said = refused(*merge)
    assert "in it is not what was written" in said and str(data) in said and f"--part 2/2 --output {parts[1]}" in said
    assert not (tmp_path / "m.gguf").exists() and not (tmp_path / "m.statistics").exists()
    parts[1].unlink()
    part_of(model, tmp_path, 2, 2)
    assert "moments is False there and True in the others" in refused(*merge)


def test_a_part_that_is_stopped_continues_and_a_merge_replaces_only_its_own(tiny, tmp_path):
    expected = part_of(tiny("llama"), tmp_path / "whole", 1, 1, "--moments", "--activations")
    output, steps = tmp_path / "1-of-1.safetensors", 0

    def stop(step: str, path: Path) -> None:
        nonlocal steps
        steps += step == "rename" and path.name == "stream.npz"
        if steps in (2, 6):
            steps += 1
            os.kill(os.getpid(), signal.SIGTERM)

    more = ["--moments", "--activations", "--part", "1/1", "--output", output]
    arguments = ["imatrix", tiny("llama"), *TEXT, *HERE, *more]
    with observed(stop):
        for _ in range(2):
            assert convert(*arguments).exit_code == STOPPED
    assert convert(*arguments).exit_code == 0
    assert output.with_suffix(".data").read_bytes() == expected.with_suffix(".data").read_bytes()
    for what in ("activations", "inputs", "moments"):
        assert repr(getattr(load_part(output), what)) == repr(getattr(load_part(expected), what))
    merge = ["imatrix", "--merge", output, "--output", tmp_path / "m.gguf", "-q"]
    done(*merge)
    assert "exists and is not of this job" in refused(*merge)
    done(*merge, "--fresh")
    (tmp_path / "m.statistics" / "statistics.json").unlink()
    assert "exists and is not of this job" in refused(*merge, "--fresh")


def test_statistics_of_another_model_or_of_no_use_are_refused(merged, tiny, tmp_path):
    def plan(model: Path, statistics: Path, *more: object) -> str:
        options = ["--statistics", statistics, *MAKING, *more]
        return refused("plan", *options, "--save", tmp_path / "plan.json", model)

    statistics = merged("llama", 3)
    assert "the statistics are of another model, " in plan(tiny("qwen2"), statistics, *FED)
    sequential = [*FED, *MAKING, "--sequential", "--statistics", statistics, "--output", tmp_path / "m.gguf"]
    assert "in sequence the inputs of a layer are those in the artifact" in refused(*sequential, tiny("llama"))
    assert "no statistics are in this directory" in plan(tiny("llama"), tmp_path, *FED)
    copied = shutil.copytree(statistics, tmp_path / "copied")
    record = json.loads((copied / "statistics.json").read_text())
    without = {name: sha for name, sha in record["files_sha256"].items() if not name.startswith("moments/")}
    (copied / "statistics.json").write_text(json.dumps(record | {"files_sha256": without}))
    assert "these statistics have no second moments and no trials" in plan(tiny("llama"), copied, *FED)
    (copied / "statistics.json").write_text(json.dumps(record | {"version": 0}))
    assert "damaged, or of another release" in plan(tiny("llama"), copied, *FED)


def test_moments_that_were_given_and_are_gone_are_not_measured_again(merged, tiny, tmp_path):
    statistics = shutil.copytree(merged("llama", 3), tmp_path / "statistics")
    next((statistics / "moments").glob("*down_proj*.npz")).unlink()
    given = ["--statistics", statistics, "--imatrix", merged("llama", 3).with_suffix(".gguf")]
    said = refused(*FED, *given, *MAKING, "--output", tmp_path / "m.gguf", tiny("llama"))
    assert "the second moments cannot be read" in said and "merge the parts again" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--moments", *TEXT], "add --part I/N"),
        (["--merge", "--moments", "--output", "m.gguf"], "add no --part"),
        (["--merge", "--activations", "--output", "m.gguf"], "add no --part"),
        (["--moments", *TEXT, "--part", "1/2", "--output", "1.part"], "ends in .safetensors"),
    ],
)
def test_what_goes_with_no_part_is_refused(arguments, message, tiny):
    assert message in refused("imatrix", tiny("llama"), *arguments)
