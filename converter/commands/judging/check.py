"""`bitwright check`: whether a runtime loads a directory and writes with it."""

import json
from pathlib import Path
from typing import get_args

import click

from bitwright.converter.commands.outcome import fails_clearly
from bitwright.converter.commands.parameters import PATH, json_option, quiet_option
from bitwright.converter.judge.engines.ask import PROMPT, Engine


@click.command(short_help="Load a directory in vLLM or transformers, and generate.")
@click.argument("directory", type=PATH)
@click.option("--runtime", required=True, type=click.Choice(get_args(Engine)), help="What is to load the directory.")
@click.option("--python", type=PATH, help="The Python that has the runtime installed. [default: this one]")
@click.option("--prompt", default=PROMPT, show_default=True, help="The text that is to be continued.")
@click.option(
    "--tokens", default=24, show_default=True, type=click.IntRange(min=1), help="How many tokens are generated."
)
@click.option(
    "--tensor-parallel",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    metavar="GPUS",
    help="How many GPUs vLLM cuts the model over.",
)
@json_option
@quiet_option
@fails_clearly
def check(
    directory: Path,
    runtime: Engine,
    python: Path | None,
    prompt: str,
    tokens: int,
    tensor_parallel: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Load DIRECTORY in a real engine and let it continue a text; exit with 1 where it does not."""
    from bitwright.converter.judge.engines.ask import load_in_engine

    if not quiet:
        click.echo(f"{runtime} loads {directory}, which may take minutes", err=True)
    loaded = load_in_engine(directory, runtime, python, prompt, tokens, tensor_parallel)
    if as_json:
        click.echo(json.dumps(loaded.to_dict()))
    else:
        click.echo(f"{loaded.runtime} loads {directory} and continues {loaded.prompt!r}:\n{loaded.text.strip()}")
