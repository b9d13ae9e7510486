"""`bitwright architectures`: which models convert, and what works for each."""

import json

import click

from bitwright.converter.commands.outcome import fails_clearly
from bitwright.converter.commands.parameters import json_option


@click.command(short_help="List the models that convert, and what works for each.")
@json_option
@click.option("--markdown", is_flag=True, help="Print the table of docs/architectures.md.")
@fails_clearly
def architectures(as_json: bool, markdown: bool) -> None:
    """List every architecture with a data file, and what works for it.

    GGUF, directory: what can be made of it. calibration: importance, by running it over a text. gradients: profiles
    that measure sensitivity. smoothing: profiles that move outliers of inputs into weights. A GGUF of any other
    architecture converts, too, and a directory of any decoder that transformers has.
    """
    from bitwright.converter.architectures.capabilities import markdown_table, plain_table, supported

    rows = supported()
    if as_json:
        click.echo(json.dumps([row.to_dict() for row in rows]))
    else:
        click.echo(markdown_table(rows) if markdown else plain_table(rows))
