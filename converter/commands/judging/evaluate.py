"""`bitwright evaluate` and `bitwright verify`: an artifact beside its source, its quality and its tensors."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from bitwright.calibration.choices import CacheRounding
from bitwright.converter.commands.outcome import fails_clearly, this_command
from bitwright.converter.commands.parameters import (
    PATH,
    job_option,
    json_option,
    part_option,
    quiet_option,
    scratch_option,
)
from bitwright.formats.errors import ConvertError

if TYPE_CHECKING:
    from bitwright.converter.job.progress import Progress


@click.command(short_help="Measure the quality of an artifact beside its source.")
@click.argument("artifacts", nargs=-1, required=True, type=PATH, metavar="ARTIFACT | PARTS...")
@click.option("--against", "model", metavar="MODEL", help="The source: a directory, Hub id or GGUF.")
@click.option("--text", metavar="NAME|FILE", help="Text to evaluate on. [default: text that calibration never sees]")
@job_option("samples", default=16, help="How many sequences are evaluated.")
@job_option("sequence_length", help="Tokens in a sequence; the second half counts.")
@job_option("threads", help="How many CPU threads are used. [default: all cores]")
@job_option("device")
@job_option("cache")
@job_option("events", group="")
@click.option("--kv", type=click.Choice(get_args(CacheRounding)), help="Keep keys and values in this format.")
@part_option
@click.option("-o", "--output", type=PATH, help="With --part: the file to write. [default: ARTIFACT.parts/I-of-N]")
@scratch_option
@click.option("--merge", is_flag=True, help="Make the report of PARTS, the files of `evaluate --part`.")
@json_option
@quiet_option
@fails_clearly
def evaluate(
    artifacts: tuple[Path, ...],
    model: str | None,
    part: str | None,
    output: Path | None,
    scratch: Path | None,
    merge: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Perplexity, KL divergence and top-1 agreement of ARTIFACT, a GGUF or a directory, against its source, and
    whether its runtime computes the same; or a part of it on one of many machines (--part), or what PARTS have found
    together (--merge)."""
    from bitwright.calibration.evaluation.quality import QualityReport
    from bitwright.converter.advice.cache_quality import keep_cache_quality
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

    artifact = artifacts[0]
    progress = Progress(quiet)
    with progress.recorded(options.pop("events"), this_command()):
        if merge:
            from bitwright.converter.machines.evaluation import merge_scores

            evaluation = merge_scores(artifacts)
        else:
            if model is None or len(artifacts) > 1:
                raise ConvertError(
                    "one artifact is evaluated beside its source",
                    " ".join(map(str, artifacts)),
                    "name the source with --against MODEL; the files of parts are merged with --merge",
                )
            if part is not None:
                click.echo(str(_part(artifact, model, part, output, scratch, progress, options)))
                return
            if output is not None or scratch is not None:
                raise ConvertError("--output and --scratch are of a part", "--output, --scratch", "add --part I/N")
            evaluation = evaluate_artifact(artifact, model, progress, **options)
            if options["kv"] is not None:
                keep_cache_quality(artifact, evaluation, progress)
    quality, agreement = from_plain(QualityReport, evaluation), from_plain(Agreement | None, evaluation["agreement"])
    lines = [
        wrapped(f"Verdict: {grade_of_loss(quality)} ({figures_text(quality)})"),
        "",
        *map(below_label, quality_lines(quality)),
        *cache_lines(evaluation),
        *map(below_label, agreement_lines(agreement)),
    ]
    click.echo(json.dumps(evaluation) if as_json else "\n".join(lines))
    target = "safetensors" if artifact.is_dir() else "gguf"  # of merged parts nothing is known
    for warning in filter(None, (quality_warning(quality, target), agreement_warning(agreement))):
        click.echo(f"warning: {warning}", err=True)


def _part(
    artifact: Path,
    model: str,
    part: str,
    output: Path | None,
    scratch: Path | None,
    progress: "Progress",
    options: dict[str, Any],
) -> Path:
    """Measure a part; returns its file."""
    from bitwright.converter.boundary.interrupts import Stop
    from bitwright.converter.machines.evaluation import write_scores
    from bitwright.converter.machines.part import part_of

    which = part_of(part)
    if options.pop("kv") is not None:
        raise ConvertError(
            "keys and values are rounded on one machine only", "--kv with --part", "leave out one of them"
        )
    options.pop("cache")
    named = artifact.with_name(f"{artifact.name}.parts") / f"{which.index}-of-{which.count}.safetensors"
    words = shlex.split(this_command())
    with Stop().on_interrupt() as should_stop:
        return write_scores(
            artifact, model, which, output or named, progress, should_stop, words=words, scratch=scratch, **options
        )
