"""What was measured of a source serves its next conversions: the same bytes, in a fraction of the work."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from bitwright.calibration.stream.forward import LayerStream
from bitwright.converter.cli import main
from bitwright.converter.job.cache import DIRECTORY_VARIABLE, cache_directory
from bitwright.converter.judge.guard import PROMPTS

PLAIN = ("--judge", "off", "--no-analysis", "--no-error-feedback", "--profile", "balanced-4bit")
STATISTICS = ("imatrix.gguf", "sensitivity.safetensors", "super_weights.json")


@pytest.fixture
def passes(monkeypatch) -> Iterator[list[str]]:
    """The stages of all passes through the layers that are not known already."""
    run, seen = LayerStream.run, []

    def noted(stream: LayerStream, stage: str = "calibrate") -> None:
        if not stream._checkpoint.complete:
            seen.append(stage)
        run(stream, stage)

    monkeypatch.setattr(LayerStream, "run", noted)
    return seen


def convert(model: Path, directory: Path, *options: str) -> tuple[dict[str, bytes], str]:
    """The artifact's bytes and what was measured, by name; and what was said."""
    directory.mkdir()
    arguments = ["--output", directory / "m.gguf", "--samples", "128", "--sequence-length", "16", "--effort", "fast"]
    arguments += ["--calibration", "embedded", *options, model]
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == 0, done.stderr
    paths = [directory / "m.gguf", *(directory / "m.bitwright" / name for name in STATISTICS)]
    made = {path.name: path.read_bytes() for path in paths if path.exists()}
    report = json.loads((directory / "m.bitwright" / "report.json").read_text())
    made["judged"] = json.dumps([report["quality"], report["coherence"]]).encode()
    return made, done.stderr


EVERYTHING = ("--profile", "importance-tiers", "--protect-super-weights", "pin")


def test_the_next_conversion_of_the_same_weights_measures_nothing_again(tiny, tmp_path, cache_dir, passes, monkeypatch):
    monkeypatch.setattr("bitwright.converter.judge.guard.PROMPTS", PROMPTS[:3])
    monkeypatch.setattr("bitwright.converter.judge.guard.HELD_OUT_PROMPTS", 4)
    first, said = convert(tiny("llama-256"), tmp_path / "first", *EVERYTHING)
    assert "from the cache" not in said and set(STATISTICS) <= set(first)
    computed = [*passes]
    passes.clear()
    second, said = convert(tiny("llama-256"), tmp_path / "second", *EVERYTHING)
    assert second == first
    for what in ("importance", "sensitivity", "super weights", "source states", "answers"):
        assert f"{what}: from the cache, {cache_dir}" in said
    of_source = {"calibrate", "run source", "look for spikes"}
    assert of_source <= set(computed) and not of_source & set(passes)
    monkeypatch.setenv(DIRECTORY_VARIABLE, "off")
    without, said = convert(tiny("llama-256"), tmp_path / "without", *EVERYTHING)
    assert without == first and "cache" not in said


@pytest.mark.parametrize("options", [("--seed", "1"), ("--samples", "129"), ("--calibration-dtype", "bfloat16")])
def test_other_settings_are_another_calibration(tiny, tmp_path, cache_dir, passes, options):
    plain = ("--judge", "off", "--no-analysis", "--profile", "balanced-4bit")
    convert(tiny("llama-256"), tmp_path / "first", *plain)
    passes.clear()
    _, said = convert(tiny("llama-256"), tmp_path / "second", *plain, *options)
    assert "calibrate" in passes and "from the cache" not in said


def test_other_weights_of_the_same_name_are_another_source(tiny, tmp_path, cache_dir, passes):
    plain = ("--judge", "off", "--no-analysis", "--profile", "balanced-4bit")
    models = []
    for place in ("one", "two"):
        copy = tmp_path / place / "model"
        copy.mkdir(parents=True)
        for path in tiny("llama-256").iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        models.append(copy)
    weights = models[1] / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2000:] = bytes(2000)
    weights.write_bytes(data)
    first, _ = convert(models[0], tmp_path / "first", *plain)
    second, said = convert(models[1], tmp_path / "second", *plain)
    assert "from the cache" not in said and first["m.gguf"] != second["m.gguf"]


def test_second_moments_serve_error_feedback_again(tiny, tmp_path, cache_dir, passes):
    options = ("--judge", "off", "--no-analysis", "--profile", "balanced-4bit", "--error-feedback")
    first, _ = convert(tiny("llama-256"), tmp_path / "first", *options)
    passes.clear()
    second, said = convert(tiny("llama-256"), tmp_path / "second", *options)
    assert second == first and "second moments: from the cache" in said and passes == []


def test_a_damaged_entry_is_measured_again(tiny, tmp_path, cache_dir, passes):
    plain = ("--judge", "off", "--no-analysis", "--profile", "balanced-4bit")
    first, _ = convert(tiny("llama-256"), tmp_path / "first", *plain)
    for entry in cache_dir.iterdir():
        entry.write_bytes(entry.read_bytes()[:-10] + b"0123456789")
    passes.clear()
    second, said = convert(tiny("llama-256"), tmp_path / "second", *plain)
    assert second == first and "calibrate" in passes and "from the cache" not in said
    third, said = convert(tiny("llama-256"), tmp_path / "third", *plain)
    assert third == first and "importance: from the cache" in said


def test_what_is_too_large_for_the_cache_is_told(tiny, tmp_path, cache_dir):
    _, said = convert(tiny("llama"), tmp_path / "first", *PLAIN, "--cache-size", "1KiB")
    assert f"importance: too large for the cache, {cache_dir}: see --cache-size" in said
    assert "from the cache" not in convert(tiny("llama"), tmp_path / "second", *PLAIN)[1]


def test_a_cache_that_cannot_be_written_ends_no_job(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    options = (
        "--judge",
        "off",
        "--no-analysis",
        "--profile",
        "balanced-4bit",
        "--cache",
        str(tmp_path / "file" / "cache"),
    )
    made, said = convert(tiny("llama-256"), tmp_path / "first", *options)
    assert made["m.gguf"] and "importance: not kept in the cache" in said


def test_the_commands_list_and_clear(tiny, tmp_path, cache_dir):
    convert(tiny("llama-256"), tmp_path / "first", *PLAIN)
    listed = CliRunner().invoke(main, ["cache", "list"])
    assert "importance" in listed.output and "1 entries" in listed.output and str(cache_dir) in listed.output
    (row,) = json.loads(CliRunner().invoke(main, ["cache", "list", "--json"]).stdout)
    assert row["result"] == "importance" and Path(row["path"]).stat().st_size == row["bytes"]
    cleared = CliRunner().invoke(main, ["cache", "clear"])
    assert cleared.exit_code == 0 and list(cache_dir.iterdir()) == []
    off = CliRunner().invoke(main, ["cache", "list", "--cache", "off"])
    assert off.exit_code == 1 and "switched off" in off.stderr


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "by-variable"))
    assert cache_directory(tmp_path / "given") == tmp_path / "given"
    assert cache_directory(None) == tmp_path / "by-variable" and cache_directory(Path("off")) is None
    monkeypatch.delenv(DIRECTORY_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory(None) == tmp_path / "bitwright"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_directory(None) == tmp_path / "home" / ".cache" / "bitwright"
