"""`bitwright profiles`: the presets, and the check of a profile of one's own."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitwright.converter.commands.outcome import fails_clearly
from bitwright.converter.commands.parameters import PATH, json_option
from bitwright.formats.errors import ConvertError

if TYPE_CHECKING:
    from bitwright.profiles.reading.schema import QuantizationProfile


@click.group(short_help="List the profiles, show one, or check a file.")
def profiles() -> None:
    """List the preset profiles, show one, or check a file."""


@profiles.command("list")
@json_option
@fails_clearly
def list_profiles(as_json: bool) -> None:
    """List every preset with what it does and when to use it, and every scheme, which works as a profile, too."""
    from bitwright.converter.report.text import wrapped
    from bitwright.formats.schemes.registry import SCHEMES
    from bitwright.profiles.reading.schema import load_profile, preset_names, profile_names

    if as_json:
        click.echo(json.dumps([_facts(load_profile(name), name in SCHEMES) for name in profile_names()]))
        return
    for name in preset_names():
        profile = load_profile(name)
        click.echo(f"{name}\n{wrapped(f'    {profile.description}', '    ')}")
        click.echo(wrapped(f"    good for: {profile.good_for}", "    "))
        if profile.target == "safetensors":
            click.echo("    target: a safetensors directory for vLLM and transformers")
    click.echo("schemes, each a profile of a safetensors directory:")
    for name in SCHEMES:
        click.echo(wrapped(f"    {name:<16}  {load_profile(name).description}", " " * 22))


def _facts(profile: "QuantizationProfile", is_scheme: bool) -> dict[str, Any]:
    """A profile as plain data."""
    return {
        "name": profile.name,
        "description": profile.description,
        "good_for": profile.good_for,
        "target": profile.target,
        "is_scheme": is_scheme,
        "decides_by_measurement": profile.needs_sensitivity,
    }


@profiles.command("show")
@click.argument("name")
@fails_clearly
def show_profile(name: str) -> None:
    """The TOML of a preset or a scheme: a starting point for a profile of your own."""
    from bitwright.profiles.reading.schema import load_profile

    click.echo(load_profile(name).text, nl=False)


@profiles.command("check")
@click.argument("file", type=PATH)
@fails_clearly
def check_profile(file: Path) -> None:
    """Read FILE as a profile, and say what it decides or what is wrong with it."""
    from bitwright.converter.report.text import wrapped
    from bitwright.profiles.reading.describe import profile_lines
    from bitwright.profiles.reading.schema import load_profile

    if file.suffix != ".toml":
        raise ConvertError("a profile's file ends in .toml", str(file), "rename it, or name another file")
    click.echo("\n".join(map(wrapped, profile_lines(load_profile(str(file))))))
