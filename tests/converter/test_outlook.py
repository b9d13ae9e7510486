"""A dry run of what rests on measurements that nobody has made: what the headers say of it."""

import json

import pytest

from bitwright import converter
from bitwright.converter.job.build import build_job
from bitwright.converter.outlook import outlook
from bitwright.formats.errors import ConvertError
from tests.converter.commands import TEXT, convert, done, refused


def test_a_size_is_answered_by_the_smallest_and_the_largest_file(tiny, tmp_path):
    arguments = ["plan", "--target-size", "1MiB", *TEXT, "--output", tmp_path / "m.gguf", tiny("llama-256")]
    said = convert(*arguments)
    assert said.exit_code == 0, said.stderr
    for words in ("asked for    1.00 MiB", "smallest ", "largest ", "importance and sensitivity", "more than"):
        assert words in said.stdout, said.stdout
    data = json.loads(convert(*arguments, "--json").stdout)
    bounds = data["bounds"]
    assert data["bytes"] is None and bounds["asked_bytes"] == 1 << 20
    assert bounds["smallest_bytes"] < 1 << 20 < bounds["largest_bytes"] and bounds["smallest_bits"] < 3
    assert converter.plan(tiny("llama-256"), target_size="1MiB", output=tmp_path / "m.gguf")["bounds"]["missing"] == [
        "importance",
        "sensitivity",
    ]
    assert list(tmp_path.iterdir()) == []


def test_the_command_that_it_names_measures_what_is_missing(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import shlex

    arguments = ["--target-bpw", 4.5, *TEXT, tiny("llama-256")]
    bounds = json.loads(convert("plan", "--json", *arguments).stdout)["bounds"]
    program, *measuring = shlex.split(bounds["command"])
    assert program == "bitwright"
    done(*measuring)
    planned = json.loads(convert("plan", "--json", *shlex.split(bounds["options"]), *arguments).stdout)
    assert bounds["smallest_bytes"] <= planned["bytes"] <= bounds["largest_bytes"] and planned["bits_per_weight"] <= 4.5
    # And the smallest plan by what is measured is the one that the headers have told, but for the header's own text.
    least = bounds["smallest_bits"] + 0.01
    smallest = json.loads(
        convert("plan", "--json", *shlex.split(bounds["options"]), "--target-bpw", least, *arguments[2:]).stdout
    )
    assert abs(smallest["bytes"] - bounds["smallest_bytes"]) < 4096
    too_small = ["--target-bpw", bounds["smallest_bits"] - 0.01, *arguments[2:]]
    assert "cannot be met" in refused("plan", *shlex.split(bounds["options"]), *too_small)
    assert "no choice of formats is that small" in refused("plan", *too_small)


@pytest.mark.parametrize("target", [["--target-size", "100KiB"], ["--target-bpw", "1"]])
def test_what_no_choice_of_formats_meets_is_refused_before_anything_runs(tiny, tmp_path, target):
    said = refused(*target, *TEXT, "--output", tmp_path / "m.gguf", tiny("llama-256"))
    assert "no choice of formats is that small" in said and "the smallest file takes" in said and target[0] in said
    assert list(tmp_path.iterdir()) == []


def test_a_divergence_has_no_size_yet(tiny):
    bounds = outlook(build_job(tiny("llama-256"), target_kld=0.1, calibration="embedded")).bounds
    assert bounds is not None and bounds.asked_bytes is None and bounds.smallest_bytes < bounds.largest_bytes


def test_a_name_of_a_size_has_one(tiny):
    """As many bits as llama.cpp's mix takes of this model."""
    seen = outlook(build_job(tiny("llama-256"), "Q4_K_M", calibration="embedded"))
    assert seen.bounds is not None and seen.bounds.asked_bytes is not None
    assert 4 < 8 * seen.bounds.asked_bytes / seen.bounds.largest_bytes * 2 < 6


def test_nothing_is_explained_before_there_is_a_plan(tiny):
    said = refused("plan", "--target-bpw", "4", "--calibration", "embedded", "--explain", "mlp_*", tiny("llama-256"))
    assert "has not been measured yet" in said


def test_importance_that_is_given_is_not_measured_again(tiny, tmp_path):
    done("imatrix", *TEXT, "--output", tmp_path / "i.gguf", tiny("llama-256"))
    bounds = outlook(build_job(tiny("llama-256"), target_bpw=4.0, imatrix=tmp_path / "i.gguf")).bounds
    assert bounds is not None and bounds.missing == ("sensitivity",) and str(tmp_path / "i.gguf") in bounds.options


def test_a_profile_of_tiers_alone_cannot_be_answered(tiny):
    with pytest.raises(ConvertError, match="no plan before the analysis"):
        outlook(build_job(tiny("llama-256"), "importance-tiers", calibration="embedded"))
