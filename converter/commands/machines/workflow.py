"""`bitwright workflow DIRECTORY`: conversions on a cluster, as a workflow of Snakemake."""

from pathlib import Path

import click

from bitwright.converter.commands.outcome import fails_clearly
from bitwright.converter.commands.parameters import PATH


@click.command(short_help="Write a workflow for clusters: Snakemake, Slurm, Kubernetes.")
@click.argument("directory", type=PATH)
@click.option("--model", metavar="MODEL", help="Put this model into the configuration.")
@fails_clearly
def workflow(directory: Path, model: str | None) -> None:
    """Write into DIRECTORY a workflow that converts models on many machines: a Snakefile with its configuration,
    profiles for Slurm and Kubernetes, and a script for Slurm alone."""
    from bitwright.converter.machines.shipped import CONFIG, write_workflow

    for path in write_workflow(directory, model):
        click.echo(str(path))
    click.echo(f"say in {directory / CONFIG} what to convert, then: snakemake --profile profiles/local", err=True)
