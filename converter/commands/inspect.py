"""`bitwright inspect`: what is in a file."""

import json
from pathlib import Path

import click

from bitwright.converter.commands.outcome import fails_clearly
from bitwright.converter.commands.parameters import PATH, json_option


@click.command(short_help="Show what is in a file.")
@click.argument("file", type=PATH)
@click.option("--plot", type=PATH, metavar="FILE", help="Draw it by layer and role instead, as .svg or .html.")
@json_option
@fails_clearly
def inspect(file: Path, plot: Path | None, as_json: bool) -> None:
    """Show what is in FILE: an artifact with its recipe, importance, sensitivity, activations, smoothing."""
    if plot is not None:
        from bitwright.converter.report.inspect import plot_file

        plot_file(file, plot)
        click.echo(plot)
        return
    from bitwright.converter.report.inspect import inspect_file, inspect_text

    data = inspect_file(file)
    click.echo(json.dumps(data) if as_json else inspect_text(data))
