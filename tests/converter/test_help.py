"""What the command line says of itself: groups, sentences, completion, the manual page, this machine."""

import json
from dataclasses import fields

import click
import pytest
from click.shell_completion import ShellComplete

from bitwright.converter.cli import EXAMPLES, main
from bitwright.converter.job.job import Job
from bitwright.converter.job.options import GROUPS, flag, option_of
from tests.converter.commands import convert


def commands() -> dict[str, click.Command]:
    found = {}
    for name, command in main.commands.items():
        found[name] = command
        if isinstance(command, click.Group):
            found |= {f"{name} {inner}": of for inner, of in command.commands.items()}
    return found


@pytest.mark.parametrize("name", commands())
def test_every_option_has_a_sentence(name):
    for parameter in commands()[name].params:
        if isinstance(parameter, click.Option):
            text = (parameter.help or "").partition(" [default")[0]
            assert text[:1] in text[:1].upper() and text.endswith(".") and len(text.split()) > 3, parameter.opts


@pytest.mark.parametrize("name", commands())
def test_every_command_says_what_it_does_in_a_line(name):
    command = commands()[name]
    assert command.help
    if " " not in name and not command.hidden:
        assert command.short_help and len(command.short_help) <= 62


def test_options_are_in_groups_and_four_examples_follow():
    text = convert("-h").stdout
    places = [text.index(f"\n{group}:") for group in (*GROUPS, "Other commands", "Examples")]
    assert places == sorted(places)
    shown = [flag(field) for field in fields(Job) if "convert" in option_of(field).commands]
    assert all(text.count(f"{option} ") for option in shown)
    assert len(EXAMPLES) == 4 and all(example in text for example in EXAMPLES)
    assert max(map(len, text.splitlines())) <= 80


def test_the_command_that_needs_no_name_has_none():
    for arguments in (["-h"], ["model", "more"], ["--nonsense", "model"], ["convert", "x", "y"], []):
        said = convert(*arguments)
        assert "convert-model" not in said.output, said.output


@pytest.mark.parametrize("name", ["plan", "profiles list", "doctor"])
def test_short_help(name):
    assert convert(*name.split(), "-h").stdout == convert(*name.split(), "--help").stdout


def test_what_changes_nothing_in_a_plan_is_taken_and_not_shown(tiny):
    text = convert("plan", "-h").stdout
    assert "--refine" not in text and "--events" not in text and "--profile" in text
    done = convert("plan", "--judge", "off", "--threads", 1, "-p", "uniform-8bit", tiny("llama-256"))
    assert done.exit_code == 0 and "a GGUF for llama.cpp" in done.stdout


@pytest.mark.parametrize("arguments", [["a.png", "b.jpg"], ["-resize", "50%", "photo.JPG", "out.webp"], ["x.pdf"]])
def test_pictures_are_for_imagemagick(arguments):
    said = convert(*arguments)
    assert said.exit_code == 1 and "ImageMagick" in said.stderr and "`bitwright`" in said.stderr


def completed(*arguments: str) -> list[str]:
    completion = ShellComplete(main, {}, "bitwright", "_BITWRIGHT_COMPLETE")
    return [item.value for item in completion.get_completions(list(arguments[:-1]), arguments[-1])]


def test_profiles_and_formats_complete():
    assert {"Q4_K_M", "Q4_0"} <= set(completed("--profile", "q4"))
    assert completed("plan", "--profile", "ultra-low-1.7") == ["ultra-low-1.75bit"]
    assert "mlp_down=" in completed("--set", "mlp_d")
    assert completed("--set", "mlp_down=IQ1") == ["mlp_down=IQ1_M", "mlp_down=IQ1_S"]
    assert "doctor" in completed("doc")


def test_the_manual_page_has_every_command_and_option():
    page = convert("man").stdout
    assert page.startswith(".TH BITWRIGHT 1")
    for name, command in main.commands.items():
        assert command.hidden or f'.SH "BITWRIGHT {name.upper()}"' in page
    for field in fields(Job):
        if option_of(field).commands:
            assert f"{flag(field)}".replace("-", "\\-") in page
    assert not [
        line
        for line in page.splitlines()
        if line.startswith(".") and line.split()[0] not in (".TH", ".SH", ".TP", ".B", ".br")
    ]


def test_the_doctor_shows_this_machine_and_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    said = convert("doctor")
    assert said.exit_code == 0 and "hf_secret" not in said.output
    found = json.loads(convert("doctor", "--json").stdout)
    assert list(found) == ["versions", "processor", "caches", "runtimes", "GPUs"]
    assert found["caches"]["logged in at the Hub"] is True
    assert found["processor"]["usable cores"] >= 1 and found["versions"]["bitwright"].startswith("0.")
    assert all(name in said.stdout for topic in found.values() for name in topic)


def test_profiles_as_data():
    rows = {row["name"]: row for row in json.loads(convert("profiles", "list", "--json").stdout)}
    assert rows["fp8"]["target"] == "safetensors" and rows["FP8"]["is_scheme"]
    assert rows["uniform-8bit"]["decides_by_measurement"] is False and rows["balanced-4bit"]["good_for"]
