"""`bitwright finish`: the parts of a plan become the artifact."""

import json
from pathlib import Path
from typing import Any

import click

from bitwright.converter.commands.outcome import fails_clearly, this_command
from bitwright.converter.commands.parameters import PATH, job_option, json_option, quiet_option


@click.command(short_help="Make an artifact of the parts that were encoded.")
@click.argument("parts", nargs=-1, type=PATH)
@click.option("--plan", "plan", required=True, type=PATH, metavar="FILE", help="What `bitwright plan --save` wrote.")
@job_option("output", help="The file or directory to write. [default: as planned]")
@job_option("judge", default=None, help="How the artifact is judged. [default: as planned]")
@job_option("threads")
@json_option
@quiet_option
@fails_clearly
def finish(parts: tuple[Path, ...], plan: Path, as_json: bool, quiet: bool, **changes: Any) -> None:
    """Make the artifact of the PARTS, the manifests that `bitwright encode` wrote: assemble, verify, judge and report
    it. Parts that are missing, damaged or of another plan are named, with the commands that encode them."""
    from bitwright.converter.boundary.interrupts import Stop
    from bitwright.converter.job.progress import Progress
    from bitwright.converter.machines.finish import finish as finish_job
    from bitwright.converter.report.text import report_text
    from bitwright.converter.report.verdict import verdict_line

    progress = Progress(quiet)
    try:
        with Stop().on_interrupt() as should_stop:
            prepared, report = finish_job(plan, parts, progress, should_stop, command=this_command(), **changes)
    finally:
        progress.close()
    click.echo(json.dumps(report.to_dict()) if as_json else report_text(report, prepared.plan, verdict_line(report)))
