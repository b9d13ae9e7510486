"""`bitwright batch JOBS`: a file of conversions, one a line."""

import json
import shlex
import sys
from pathlib import Path

import click

from bitwright.converter.commands.outcome import fails_clearly
from bitwright.converter.commands.parameters import PATH, json_option, quiet_option


@click.command(short_help="Run a file of conversions, one a line.")
@click.argument("jobs", type=PATH)
@click.option("--parallel", default=1, show_default=True, type=click.IntRange(1), help="How many run at a time.")
@click.option(
    "--retries",
    default=3,
    show_default=True,
    type=click.IntRange(0),
    help="How often a failure of the network is retried.",
)
@click.option("--logs", type=PATH, help="Where each line has its log. [default: JOBS.logs]")
@json_option
@quiet_option
@fails_clearly
def batch(jobs: Path, parallel: int, retries: int, logs: Path | None, as_json: bool, quiet: bool) -> None:
    """Run the conversions of the file JOBS, one a line, each with what one would write after `bitwright`.

    A failure stops no other. Run the same file again: finished lines are recognised, interrupted ones continue. The
    exit code is 1 where a line has failed.
    """
    from bitwright.converter.several.batch import read_jobs, run_batch

    lines = read_jobs(jobs)
    directory = logs or jobs.with_name(f"{jobs.name}.logs")
    say = (lambda _line: None) if quiet else (lambda line: click.echo(line, err=True))
    outcomes = run_batch(lines, directory, parallel, retries, say)
    failed = [outcome for outcome in outcomes if outcome.code]
    if as_json:
        click.echo(json.dumps([outcome.to_dict() for outcome in outcomes]))
    else:
        click.echo(f"{len(outcomes) - len(failed)} of {len(outcomes)} conversions done")
        for outcome in failed:
            click.echo(f"failed ({outcome.code}): bitwright {shlex.join(outcome.arguments)}\n  log: {outcome.log}")
    sys.exit(1 if failed else 0)
