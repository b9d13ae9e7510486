"""`convert evaluate` and `convert verify`: an artifact beside its source, its quality and its tensors."""

import json
from pathlib import Path
from typing import Any, get_args

import click

from bitwright.calibration.choices import CacheRounding
from bitwright.converter.commands.outcome import fails_clearly, this_command
from bitwright.converter.commands.parameters import PATH, against_option, job_option, json_option, quiet_option


@click.command(short_help="Measure the quality of an artifact beside its source.")
@click.argument("artifact", type=PATH)
@against_option
@click.option("--text", metavar="NAME|FILE", help="Text to evaluate on. [default: text that calibration never sees]")
@job_option("samples", default=16, help="How many sequences are evaluated.")
@job_option("sequence_length", help="Tokens in a sequence; the second half counts.")
@job_option("threads", help="How many CPU threads are used. [default: all cores]")
@job_option("device")
@job_option("cache")
@click.option("--kv", type=click.Choice(get_args(CacheRounding)), help="Keep keys and values in this format.")
@json_option
@quiet_option
@fails_clearly
def evaluate(artifact: Path, model: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Perplexity, KL divergence and top-1 agreement of ARTIFACT, a GGUF or a directory, against its source, and
    whether its runtime computes the same."""
    from bitwright.calibration.evaluation.quality import QualityReport
    from bitwright.converter.job.progress import Progress
    from bitwright.converter.judge.open import evaluate_artifact
    from bitwright.converter.report.data import Agreement
    from bitwright.converter.report.text import (
        agreement_lines,
        below_label,
        cache_lines,
        figures_text,
        quality_lines,
        wrapped,
    )
    from bitwright.converter.report.verdict import agreement_warning, grade_of_loss, quality_warning
    from bitwright.formats.typed import from_plain

    progress = Progress(quiet)
    with progress.recorded(None, this_command()):
        evaluation = evaluate_artifact(artifact, model, progress, **options)
    quality, agreement = from_plain(QualityReport, evaluation), from_plain(Agreement | None, evaluation["agreement"])
    lines = [
        wrapped(f"Verdict: {grade_of_loss(quality)} ({figures_text(quality)})"),
        "",
        *map(below_label, quality_lines(quality)),
        *cache_lines(evaluation),
        *map(below_label, agreement_lines(agreement)),
    ]
    click.echo(json.dumps(evaluation) if as_json else "\n".join(lines))
    target = "safetensors" if artifact.is_dir() else "gguf"
    for warning in filter(None, (quality_warning(quality, target), agreement_warning(agreement))):
        click.echo(f"warning: {warning}", err=True)
