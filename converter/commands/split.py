"""`bitwright split`: an artifact in several files."""

from pathlib import Path

import click

from bitwright.converter.commands.outcome import fails_clearly
from bitwright.converter.commands.parameters import PATH, quiet_option, report_place_option


@click.command(short_help="Split an artifact, without encoding it again.")
@click.argument("artifact", type=PATH)
@click.option("--split-size", required=True, metavar="SIZE", help="The largest size of a file, for instance 20GB.")
@report_place_option
@quiet_option
@fails_clearly
def split(artifact: Path, split_size: str, work_dir: Path | None, quiet: bool) -> None:
    """Split ARTIFACT into several files, without encoding it again."""
    from bitwright.converter.job.progress import Progress
    from bitwright.converter.split import split as split_artifact
    from bitwright.profiles.sizes import parse_size

    progress = Progress(quiet)
    try:
        paths = split_artifact(artifact, parse_size(split_size, "--split-size"), work_dir, progress)
    finally:
        progress.close()
    click.echo("\n".join(map(str, paths)))
