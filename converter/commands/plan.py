"""`bitwright plan MODEL`, and `bitwright MODEL --dry-run`: what would be written."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitwright.converter.commands.outcome import fails_clearly, this_command
from bitwright.converter.commands.parameters import PATH, GroupedCommand, json_option, options_of, quiet_option
from bitwright.formats.errors import ConvertError, nearest

if TYPE_CHECKING:
    from bitwright.converter.artifact.target import Prepared
    from bitwright.converter.job.job import Job


# What changes nothing of a plan or of its forecast.
IDLE = ("refine", "events")


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
    """Print what would be written, to the byte, and what that takes (a dry run); with --save, do all of the job that
    comes before the encoding, so that other machines encode a part each."""
    from bitwright.converter.boundary.interrupts import Stop
    from bitwright.converter.job.progress import Progress

    progress = Progress(quiet)
    with progress.recorded(None, this_command()):
        if save is None:
            print_plan(build_job(**options), as_json, explain)
            return
        from bitwright.converter.machines.saved_plan import save_plan

        with Stop().on_interrupt() as should_stop:
            prepared = save_plan(save, progress, should_stop, fresh=fresh, command=this_command(), **options)
    show_plan(prepared, as_json, explain)
    click.echo(f"saved in {save}", err=as_json)


def build_job(**options: Any) -> "Job":
    """The Job of a command's options."""
    from bitwright.converter.job.build import build_job as build

    return build(**options, command=this_command())


def print_plan(job: "Job", as_json: bool, explain: str | None) -> None:
    """explain: show only the tensors whose name or role matches, with the reason."""
    from bitwright.converter.measure.evidence import analysis_is_needed
    from bitwright.converter.outlook import outlook
    from bitwright.converter.report.text import bounds_text, plan_text, wrapped

    seen = outlook(job)
    for note in seen.notes:
        click.echo(wrapped(note), err=as_json)
    if explain is not None and seen.prepared is None:
        raise analysis_is_needed(job)
    data, lines = seen.to_dict(), []
    if seen.prepared is not None:
        lines.append(plan_text(seen.prepared.plan, data["bytes"]))
    elif seen.bounds is not None:
        lines.append(bounds_text(seen.bounds, seen.run.job.profile.name))
    lines.append(f"would write {seen.run.output}, {seen.run.job.profile.kind}")
    _print(data, as_json, explain, [*lines, *map(wrapped, seen.forecast.lines())])


def show_plan(prepared: "Prepared[Any]", as_json: bool, explain: str | None) -> None:
    """The same of a plan that is made."""
    from bitwright.converter.report.text import plan_text

    data, run = prepared.to_dict(), prepared.run
    lines = [plan_text(prepared.plan, data["bytes"]), f"would write {run.output}, {run.job.profile.kind}"]
    _print(data, as_json, explain, lines)


def _print(data: dict[str, Any], as_json: bool, explain: str | None, lines: list[str]) -> None:
    """lines: for people, of the whole plan."""
    from bitwright.converter.report.text import explanation

    if explain is not None:
        data["tensors"] = matching(explain, data["tensors"])
    if as_json:
        click.echo(json.dumps(data))
    else:
        click.echo(explanation(data["tensors"]) if explain is not None else "\n".join(lines))


def matching(pattern: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tensors whose name or role matches. Raises ConvertError where none does."""
    from fnmatch import fnmatchcase

    matched = [row for row in rows if fnmatchcase(row["tensor"], pattern) or fnmatchcase(row["role"], pattern)]
    if not matched:
        names = sorted({row["role"] for row in rows}) + [row["tensor"] for row in rows]
        raise ConvertError(f"no tensor matches {pattern!r}", "--explain", nearest(pattern, names))
    return matched
