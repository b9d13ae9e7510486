"""Calibration by many machines: the bytes of one, for any number of parts; others are refused."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from bitwright.calibration.stream.device.totals import Totals
from bitwright.calibration.stream.micro_batches import N_GROUPS, Excerpt, is_held_out, spans_of_samples
from bitwright.calibration.stream.observer import GroupedSums, add_sums
from bitwright.converter.boundary.interrupts import STOPPED
from bitwright.converter.job.cache import arrays_identity
from bitwright.converter.machines.measuring import importance
from bitwright.converter.machines.measuring.group_sums import load_part
from bitwright.formats.files.disk import observed
from tests.converter.commands import convert, done, refused

TEXT = ["--calibration", "embedded", "--samples", "130", "--sequence-length", "16"]
HERE = [*TEXT, "--device", "cpu", "--threads", "2", "-q"]


def part_of(model: Path, directory: Path, i: int, n: int, *more: object) -> Path:
    output = directory / f"{i}-of-{n}.safetensors"
    done("imatrix", model, *HERE, "--part", f"{i}/{n}", "--output", output, *more)
    return output


@pytest.mark.parametrize(("name", "counts"), [("llama", (1, 2, 3, 7)), ("qwen3_moe", (3,)), ("gemma3", (2,))])
def test_any_number_of_parts_gives_the_importance_of_one_machine(name, counts, tiny, tmp_path):
    done("imatrix", tiny(name), *HERE, "--output", tmp_path / "whole.gguf")
    sums = set()
    for n in counts:
        parts = [part_of(tiny(name), tmp_path / f"{n}", i, n) for i in range(n, 0, -1)]
        groups = {group: of for part in parts for group, of in load_part(part).importance.items()}
        assert len(groups) == N_GROUPS
        sums.add(arrays_identity(*(of for _, kinds in sorted(groups.items()) for of in kinds.values())))
        assert len(list((tmp_path / f"{n}").iterdir())) == n
        done("imatrix", "--merge", *parts, "--output", tmp_path / f"{n}" / "whole.gguf", "-q")
        assert (tmp_path / f"{n}" / "whole.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert len(sums) == 1  # in float64


def test_sums_over_a_text_are_those_of_its_groups_in_order():
    """Whose rounding depends on the order: all in a row they are others."""
    values = np.random.default_rng(0).random((130, 500)) ** 9

    def accepts(_: object) -> None:
        """Whatever the sums are."""

    whole, apart = Excerpt.whole(130), GroupedSums({"sums": {}}, Excerpt.whole(130), accepts, apart=True)
    total = GroupedSums({"sums": {}}, whole, accepts)
    for grouped in (total, apart):
        for sample, row in enumerate(values):
            of_sample: Totals[str] = Totals()
            of_sample.host["a"] = row.copy()
            grouped.add(sample, {"sums": of_sample})
    again = GroupedSums({"sums": {}}, whole, accepts)
    again.load_arrays(apart.to_arrays())
    merged: dict[str, dict[str, np.ndarray]] = {"sums": {}}
    for group in sorted(again.groups):
        add_sums(merged, again.groups[group])
    assert total.to_arrays()["sums/a"].tobytes() == merged["sums"]["a"].tobytes()
    in_a_row = np.zeros(500)
    for row in values:
        in_a_row += row
    assert (in_a_row != merged["sums"]["a"]).any()
    np.testing.assert_allclose(in_a_row, merged["sums"]["a"])


def test_sensitivity_in_parts_is_that_of_one_machine(tiny, tmp_path):
    model = tiny("llama")
    done("imatrix", model, *HERE, "--sensitivity", "--output", tmp_path / "whole.gguf")
    parts = [part_of(model, tmp_path / "p", i, 3, "--sensitivity") for i in (1, 2, 3)]
    merged = tmp_path / "p" / "whole.gguf"
    done("imatrix", "--merge", *parts, "--sensitivity", "--output", merged, "-q")
    for path in (merged, merged.with_suffix(".sensitivity.safetensors")):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    without = part_of(model, tmp_path / "q", 1, 1)
    said = refused("imatrix", "--merge", without, "--sensitivity", "--output", tmp_path / "n.gguf")
    assert "have no gradients" in said and not (tmp_path / "n.gguf").exists()


def test_parts_that_are_missing_damaged_or_foreign_are_named_with_their_commands(tiny, tmp_path, monkeypatch):
    model = tiny("llama")
    first, third = (part_of(model, tmp_path, i, 3) for i in (1, 3))
    merge = ["imatrix", "--merge", "--output", tmp_path / "m.gguf"]
    said = refused(*merge, first, third)
    second = tmp_path / "2-of-3.safetensors"
    assert "part 2 of 3 is missing" in said and f"--part 2/3 --output {second}" in said
    second.write_bytes(third.read_bytes()[:-1])
    assert "damaged" in refused(*merge, first, second, third)
    content = bytearray(third.read_bytes())
    content[-1] ^= 1
    second.write_bytes(content)
    assert "its sums are not what was written" in refused(*merge, first, second, third)
    second.unlink()
    other = shutil.copytree(tiny("qwen2"), tmp_path / "other")
    part_of(other, tmp_path, 2, 3)
    said = refused(*merge, first, second, third)
    assert "what part 2/3 was made of" in said and "model is other there and llama" in said.replace(model.name, "llama")
    second.unlink()
    here = importance.machine_identity
    monkeypatch.setattr(importance, "machine_identity", lambda device: here(device) | {"cpu": "OTHER"})
    part_of(model, tmp_path, 2, 3, "--scratch", tmp_path / "scratch")
    assert "cpu is OTHER there" in refused(*merge, first, second, third)
    assert not (tmp_path / "m.gguf").exists() and list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "1/17", *TEXT], "cannot be cut into 17 parts"),
        (["--part", "1/2", "--samples", "128"], "choose different ones"),
        (["--part", "1/2", *TEXT, "--fresh"], "nothing to start over"),
        (["--scratch", "x", *TEXT], "--scratch is where a part is worked on"),
        (["--merge"], "name it with --output"),
        (["another"], "one model at a time"),
    ],
)
def test_what_goes_with_no_part_is_refused(arguments, message, tiny):
    assert message in refused("imatrix", tiny("llama"), *arguments)


def test_a_part_that_is_stopped_continues(tiny, tmp_path):
    expected = part_of(tiny("llama"), tmp_path / "whole", 1, 4)
    output, steps = tmp_path / "1-of-4.safetensors", 0

    def stop(step: str, path: Path) -> None:
        nonlocal steps
        steps += step == "rename" and path.name == "stream.npz"
        if steps == 2:
            steps += 1
            os.kill(os.getpid(), signal.SIGTERM)

    arguments = ["imatrix", tiny("llama"), *HERE, "--part", "1/4", "--output", output]
    with observed(stop):
        assert convert(*arguments).exit_code == STOPPED
    assert not output.exists() and (tmp_path / f"{output.name}.bitwright-work").is_dir()
    assert convert(*arguments).exit_code == 0
    whole, resumed = load_part(expected), load_part(output)
    assert whole.fingerprint == resumed.fingerprint
    for group, kinds in whole.importance.items():
        assert arrays_identity(*kinds.values()) == arrays_identity(*resumed.importance[group].values())
    assert "already done" in convert(*[a for a in arguments if a != "-q"]).stderr


@pytest.mark.parametrize("n", [1, 5, 16, 130, 1000])
def test_micro_batches_end_with_groups_wherever_an_excerpt_begins(n):
    whole = Excerpt.whole(n)
    for batch in (1, 2, 100):
        all_spans = spans_of_samples(n, batch, whole)
        for count in (1, 3, N_GROUPS):
            spans = []
            for i in range(count):
                part = Excerpt.of_groups(range(N_GROUPS * i // count, N_GROUPS * (i + 1) // count), n)
                inside = spans_of_samples(part.n_samples, batch, part)
                spans += [(part.first + start, part.first + stop) for start, stop in inside]
            assert spans == all_spans
        for start, stop in all_spans:
            assert len({(whole.group_of(s), is_held_out(s)) for s in range(start, stop)}) == 1
