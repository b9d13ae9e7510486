"""`convert imatrix`: the importance matrix alone, and what else is measured of a model."""

from pathlib import Path
from typing import Any

import click

from bitwright.converter.commands.outcome import fails_clearly, this_command
from bitwright.converter.commands.parameters import PATH, GroupedCommand, option, options_of, quiet_option
from bitwright.converter.job.options import CALIBRATION, OUTPUT


@click.command(cls=GroupedCommand, short_help="Compute the importance matrix, and what else is measured.")
@click.argument("model")
@option(
    "-o",
    "--output",
    group=OUTPUT,
    type=PATH,
    help="The file to write, .gguf or .dat; with --activations .safetensors. [default: MODEL.imatrix.gguf]",
)
@options_of("imatrix")
@option("--super-weights", group=CALIBRATION, is_flag=True, help="Look for super weights, and keep them in the file.")
@option(
    "--sensitivity",
    group=CALIBRATION,
    is_flag=True,
    help="Measure the costs of formats, in a file beside it.",
)
@option(
    "--activations",
    group=CALIBRATION,
    is_flag=True,
    help="Write statistics of activations instead.",
)
@option(
    "--fresh",
    group=OUTPUT,
    is_flag=True,
    help="Start over in a work directory that holds another computation, and replace its output.",
)
@quiet_option
@fails_clearly
def imatrix(model: str, output: Path | None, quiet: bool, events: Path | None, **options: Any) -> None:
    """Compute the importance matrix of MODEL, or convert one between GGUF and .dat."""
    from bitwright.converter.boundary.interrupts import Stop
    from bitwright.converter.imatrix import write_importance
    from bitwright.converter.job.progress import Progress

    progress = Progress(quiet)
    with progress.recorded(events, this_command()), Stop().on_interrupt() as should_stop:
        written = write_importance(model, output, progress, should_stop, command=this_command(), **options)
    click.echo("\n".join(map(str, written)))
