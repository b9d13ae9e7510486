"""`bitwright publish`: an artifact on the Hub."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bitwright.converter.commands.outcome import fails_clearly
from bitwright.converter.commands.parameters import PATH, json_option, option, quiet_option, report_place_option
from bitwright.converter.job.options import HUB


def card_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of publishing that `bitwright MODEL --push-to` and `bitwright publish` share."""
    command = option("--public", group=HUB, is_flag=True, help="Make a new repository public. [default: private]")(
        command
    )
    return option("--base-model", group=HUB, metavar="ORG/NAME", help="The source's id on the Hub, for the card.")(
        command
    )


@click.command(short_help="Publish an artifact on the Hub, with report and card.")
@click.argument("artifact", type=PATH)
@click.option("--to", "repository", required=True, metavar="ORG/NAME", help="The repository; created if there is none.")
@card_options
@click.option("--name", metavar="NAME.gguf", help="The name of a GGUF there. [default: its own, by GGUF naming]")
@click.option("--replace", is_flag=True, help="Replace another artifact of the same name in the repository.")
@report_place_option
@click.option("--dry-run", is_flag=True, help="Show the repository and the card as they would be; write nothing.")
@json_option
@quiet_option
@fails_clearly
def publish(artifact: Path, work_dir: Path | None, dry_run: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Publish ARTIFACT, a GGUF or a directory, on the Hub, with its report, its recipe and a model card."""
    from bitwright.converter.job.progress import Progress
    from bitwright.converter.publishing.outcome import outcome_text
    from bitwright.converter.publishing.stage import Target
    from bitwright.converter.publishing.stage import publish as publish_artifact

    progress = Progress(quiet)
    try:
        result = publish_artifact(artifact, Target(**options), progress, work_dir=work_dir, dry_run=dry_run)
    finally:
        progress.close()
    click.echo(json.dumps(result) if as_json else outcome_text(result))
