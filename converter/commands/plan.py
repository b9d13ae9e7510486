"""`convert plan MODEL`, and `convert MODEL --dry-run`: what would be written."""

import json
from typing import TYPE_CHECKING, Any

import click

from bitwright.converter.commands.outcome import fails_clearly, this_command
from bitwright.converter.commands.parameters import GroupedCommand, json_option, options_of
from bitwright.formats.errors import ConvertError, nearest

if TYPE_CHECKING:
    from bitwright.converter.job.job import Job


# What changes nothing of a plan or of its forecast.
IDLE = ("refine", "events")


@click.command(cls=GroupedCommand, short_help="Print what would be written, to the byte.")
@click.argument("model")
@options_of("convert", idle=IDLE)
@json_option
@click.option("--explain", metavar="PATTERN", help="Show every tensor whose name or role matches, with the reason.")
@fails_clearly
def plan(explain: str | None, as_json: bool, **options: Any) -> None:
    """Print what would be written, to the byte, and what that takes (a dry run)."""
    from bitwright.converter.job.progress import Progress

    with Progress().recorded(None, this_command()):
        print_plan(build_job(**options), as_json, explain)


def build_job(**options: Any) -> "Job":
    """The Job of a command's options."""
    from bitwright.converter.job.build import build_job as build

    return build(**options, command=this_command())


def print_plan(job: "Job", as_json: bool, explain: str | None) -> None:
    """explain: show only the tensors whose name or role matches, with the reason."""
    from bitwright.converter.measure.evidence import analysis_is_needed
    from bitwright.converter.outlook import outlook
    from bitwright.converter.report.text import bounds_text, explanation, plan_text, wrapped

    seen = outlook(job)
    for note in seen.notes:
        click.echo(wrapped(note), err=as_json)
    data = seen.to_dict()
    if explain is not None:
        if seen.prepared is None:
            raise analysis_is_needed(job)
        data["tensors"] = matching(explain, data["tensors"])
    if as_json:
        click.echo(json.dumps(data))
    elif explain is not None:
        click.echo(explanation(data["tensors"]))
    else:
        if seen.prepared is not None:
            click.echo(plan_text(seen.prepared.plan, data["bytes"]))
        elif seen.bounds is not None:
            click.echo(bounds_text(seen.bounds, seen.run.job.profile.name))
        click.echo(f"would write {seen.run.output}, {seen.run.job.profile.kind}")
        click.echo("\n".join(map(wrapped, seen.forecast.lines())))


def matching(pattern: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tensors whose name or role matches. Raises ConvertError where none does."""
    from fnmatch import fnmatchcase

    matched = [row for row in rows if fnmatchcase(row["tensor"], pattern) or fnmatchcase(row["role"], pattern)]
    if not matched:
        names = sorted({row["role"] for row in rows}) + [row["tensor"] for row in rows]
        raise ConvertError(f"no tensor matches {pattern!r}", "--explain", nearest(pattern, names))
    return matched
