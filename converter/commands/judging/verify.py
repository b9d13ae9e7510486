"""`bitwright verify`: an artifact's tensors beside those of its source."""

import json
from pathlib import Path

import click

from bitwright.converter.commands.outcome import fails_clearly, this_command
from bitwright.converter.commands.parameters import PATH, against_option, job_option, json_option, quiet_option


@click.command(short_help="Compare every tensor of an artifact with its source.")
@click.argument("artifact", type=PATH)
@against_option
@job_option("events", group="")
@json_option
@quiet_option
@fails_clearly
def verify(artifact: Path, model: str, events: Path | None, as_json: bool, quiet: bool) -> None:
    """Decode every tensor of ARTIFACT and compare it with the source. GGUFs are decoded by the gguf package."""
    from bitwright.converter.job.progress import Progress
    from bitwright.converter.judge.open import verify_artifact
    from bitwright.converter.report.text import error_table

    progress = Progress(quiet)
    with progress.recorded(events, this_command()):
        errors = verify_artifact(artifact, model, progress)
    click.echo(json.dumps([error.to_dict() for error in errors]) if as_json else error_table(errors))
