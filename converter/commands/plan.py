"""`bitwright plan MODEL`, and `bitwright MODEL --dry-run`: what would be written."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitwright.converter.commands.outcome import fails_clearly, this_command
from bitwright.converter.commands.parameters import PATH, GroupedCommand, json_option, options_of, quiet_option
from bitwright.formats.errors import ConvertError

if TYPE_CHECKING:
    from bitwright.converter.artifact.target import Prepared
    from bitwright.converter.job.job import Job


# What a plan is the same without.
IDLE = ("refine", "judge", "lm_eval", "lm_eval_limit", "threads", "device")


@click.command(cls=GroupedCommand, short_help="Print what would be written, to the byte.")
@click.argument("model")
@options_of("convert", idle=IDLE)
@json_option
@click.option("--explain", metavar="PATTERN", help="Show every tensor whose name or role matches, with the reason.")
@click.option(
    "--save", type=PATH, metavar="FILE", help="Measure what the plan needs, and write it for `bitwright encode`."
)
@click.option("--fresh", is_flag=True, help="With --save: forget what an earlier run has measured.")
@quiet_option
@fails_clearly
def plan(explain: str | None, as_json: bool, save: Path | None, fresh: bool, quiet: bool, **options: Any) -> None:
    """Print what would be written, to the byte (a dry run); with --save, do all of the job that comes before the
    encoding, so that other machines encode a part each."""
    if save is None:
        print_plan(build_job(**options), as_json, explain)
        return
    from bitwright.converter.boundary.interrupts import Stop
    from bitwright.converter.job.progress import Progress
    from bitwright.converter.machines.saved_plan import save_plan

    progress = Progress(quiet)
    try:
        with Stop().on_interrupt() as should_stop:
            prepared = save_plan(save, progress, should_stop, fresh=fresh, command=this_command(), **options)
    finally:
        progress.close()
    show_plan(prepared, as_json, explain)
    click.echo(f"saved in {save}", err=as_json)


def build_job(**options: Any) -> "Job":
    """The Job of a command's options."""
    from bitwright.converter.job.build import build_job as build

    return build(**options, command=this_command())


def print_plan(job: "Job", as_json: bool, explain: str | None) -> None:
    """explain: show only the tensors whose name or role matches, with the reason."""
    from bitwright.converter.pipeline import prepare

    prepared = prepare(job)
    for note in prepared.notes:
        click.echo(note, err=as_json)
    show_plan(prepared, as_json, explain)


def show_plan(prepared: "Prepared[Any]", as_json: bool, explain: str | None) -> None:
    """The same of a plan that is made."""
    from fnmatch import fnmatchcase

    from bitwright.converter.report.text import explanation, plan_text
    from bitwright.formats.errors import nearest

    data = prepared.to_dict()
    if explain is not None:
        rows = [r for r in data["tensors"] if fnmatchcase(r["tensor"], explain) or fnmatchcase(r["role"], explain)]
        if not rows:
            names = sorted({r["role"] for r in data["tensors"]}) + [r["tensor"] for r in data["tensors"]]
            raise ConvertError(f"no tensor matches {explain!r}", "--explain", nearest(explain, names))
        data["tensors"] = rows
    if as_json:
        click.echo(json.dumps(data))
        return
    if explain is not None:
        click.echo(explanation(data["tensors"]))
        return
    click.echo(plan_text(prepared.plan, data["bytes"]))
    click.echo(f"would write {prepared.run.output}, {prepared.run.job.profile.kind}")
