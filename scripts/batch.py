"""Run a file of conversions, one a line, and list what failed.

    # models of the week; a line is what one would write after `convert`
    --profile balanced-4bit --output out/ org/model-a
    --profile mlp-low-precision --output out/ org/model-b

A failure does not stop the others. Run the same file again: finished lines are recognised, interrupted ones continue.
"""

import shlex
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click


def read_jobs(path: Path) -> list[list[str]]:
    """The argument lists of a jobs file; blank lines and comments do not count."""
    return [words for line in path.read_text().splitlines() if (words := shlex.split(line, comments=True))]


def run_job(arguments: list[str], lock: threading.Lock) -> int:
    """Run one conversion; its output comes whole, when it is done, so that parallel ones do not mix."""
    command = [sys.executable, "-m", "converter", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    with lock:
        click.echo(f"== convert {shlex.join(arguments)}\n{done.stdout}", nl=False)
    return done.returncode


@click.command(help=__doc__)
@click.argument("jobs_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--parallel", default=1, show_default=True, type=click.IntRange(1), help="Conversions at a time.")
def main(jobs_file: Path, parallel: int) -> None:
    jobs = read_jobs(jobs_file)
    lock = threading.Lock()
    with ThreadPoolExecutor(parallel) as pool:
        codes = list(pool.map(lambda arguments: run_job(arguments, lock), jobs))
    failed = [(code, arguments) for code, arguments in zip(codes, jobs, strict=True) if code]
    click.echo(f"{len(jobs) - len(failed)} of {len(jobs)} conversions done")
    for code, arguments in failed:
        click.echo(f"failed ({code}): convert {shlex.join(arguments)}", err=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
