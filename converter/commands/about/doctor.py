"""`bitwright doctor`: what a run finds here, for a look before one, and for reports of trouble."""

import json
from typing import Any

import click

from bitwright.converter.commands.outcome import fails_clearly
from bitwright.converter.commands.parameters import json_option


@click.command(short_help="Show versions, processor, caches, runtimes and GPUs.")
@json_option
@fails_clearly
def doctor(as_json: bool) -> None:
    """Show what a run finds here: versions, processor, memory, caches, runtimes and GPUs. Reports no token."""
    from bitwright.converter.commands.about.checkup import checkup

    found = checkup()
    if as_json:
        click.echo(json.dumps(found))
        return
    for topic, facts in found.items():
        click.echo(topic)
        for name, value in facts.items():
            click.echo(f"  {name:<22} {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "not there" if value is None else str(value)
