"""`bitwright encode`: one part of a plan, on one of many machines."""

from pathlib import Path
from typing import Any

import click

from bitwright.converter.commands.outcome import fails_clearly, this_command
from bitwright.converter.commands.parameters import PATH, job_option, part_option, quiet_option, scratch_option


@click.command(short_help="Encode a part of a saved plan, on one of many machines.")
@click.option("--plan", "plan", required=True, type=PATH, metavar="FILE", help="What `bitwright plan --save` wrote.")
@part_option
@click.option(
    "-o", "--output", type=PATH, help="The manifest to write; its data go beside it. [default: PLAN.parts/I-of-N.json]"
)
@click.option("--model", metavar="MODEL", help="Where the model is on this machine. [default: as planned]")
@job_option("imatrix", help="Where the importance matrix is on this machine. [default: as planned]")
@job_option("statistics", help="Where the statistics are on this machine. [default: as planned]")
@scratch_option
@job_option("threads")
@quiet_option
@fails_clearly
def encode(plan: Path, part: str | None, output: Path | None, quiet: bool, **changes: Any) -> None:
    """Encode the tensors of one part of a plan. Any number of parts, on any machines, give the bytes that one machine
    gives; `bitwright finish` puts them together."""
    from bitwright.converter.boundary.interrupts import Stop
    from bitwright.converter.job.progress import Progress
    from bitwright.converter.machines.encode import encode_part
    from bitwright.converter.machines.part import part_of

    progress = Progress(quiet)
    try:
        with Stop().on_interrupt() as should_stop:
            written = encode_part(plan, part_of(part), output, progress, should_stop, command=this_command(), **changes)
    finally:
        progress.close()
    click.echo(str(written))
