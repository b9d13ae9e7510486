"""The command line: parses, validates, calls. Data goes to stdout, everything else to stderr.

Nothing heavy is imported before a command runs, so that --help answers at once.
"""

import functools
import json
import shlex
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from converter import BUDGET_PROFILE, DEFAULT_PROFILE
from converter.boundary import clear_errors
from converter.interrupts import STOPPED, stops_at_once
from converter.streams import give_up_stdout, keep_streams_usable
from formats.errors import ConvertError

PATH = click.Path(path_type=Path)
# The largest file that the Hub asks for.
HUB_FILE_SIZE = "20GB"


class DefaultGroup(click.Group):
    """A group whose main command needs no name: `convert MODEL` is `convert convert-model MODEL`."""

    default = "convert-model"

    def main(self, *args: Any, **kwargs: Any) -> Any:
        keep_streams_usable()
        try:
            with clear_errors():
                return super().main(*args, **kwargs)
        except ConvertError as error:  # of --help and --version; a command tells its own
            click.echo(f"error: {error}", err=True)
            give_up_stdout()
            sys.exit(error.exit_code)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            if ctx.meta["as_json"]:
                say_as_json(error.format_message(), "the command line", "see --help", error.exit_code)
            raise

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["as_json"] = "--json" in args
        if args and args[0] not in self.commands and args[0] not in ("--help", "--version"):
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.commands[self.default].format_options(ctx, formatter)
        commands = [(name, c.get_short_help_str()) for name, c in self.commands.items() if name != self.default]
        with formatter.section("Other commands"):
            formatter.write_dl(commands)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "[OPTIONS] MODEL  |  COMMAND ...")


def fails_clearly(command: Callable[..., None]) -> Callable[..., None]:
    """Turn an error into three lines on stderr and an exit code, with --json into an object on stdout, too; --verbose
    adds the traceback. SIGTERM and SIGHUP end a command as Ctrl-C does."""

    @functools.wraps(command)
    def wrapped(*args: Any, verbose: bool, **kwargs: Any) -> None:
        try:
            with clear_errors(), stops_at_once():
                command(*args, **kwargs)
        except ConvertError as error:
            if verbose:
                traceback.print_exc()
            click.echo(f"error: {error}", err=True)
            if kwargs.get("as_json"):
                say_as_json(error.what, error.where, error.remedy, error.exit_code)
            give_up_stdout()
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("error: stopped at once; run the same command again to continue", err=True)
            if kwargs.get("as_json"):
                say_as_json("stopped at once", this_command(), "run the same command again to continue", STOPPED)
            sys.exit(STOPPED)

    return click.option("--verbose", is_flag=True, help="Show the traceback of an error.")(wrapped)


def say_as_json(what: str, where: str, remedy: str, exit_code: int) -> None:
    """An error for machines, on stdout."""
    error = {"what": what, "where": where, "remedy": remedy}
    with suppress(OSError):  # where stdout itself is the trouble, stderr and the exit code have said so
        click.echo(json.dumps({"error": error, "exit_code": exit_code}))


calibration_dtype_option = click.option(
    "--calibration-dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16"]),
    help="What the calibrated model computes in; auto: bfloat16 on cuda.",
)


def job_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that describe a job: the same for `convert MODEL` and `convert plan MODEL`."""
    options = [
        click.argument("model"),
        click.option(
            "--profile", help=f"A preset, or a TOML file. [default: {DEFAULT_PROFILE}; with a target {BUDGET_PROFILE}]"
        ),
        click.option("--target-size", metavar="SIZE", help="Choose formats for the best file of 1.2GiB, for instance."),
        click.option("--target-bpw", type=float, metavar="BITS", help="The same by bits per weight."),
        click.option("--target-kld", type=float, metavar="NATS", help="The smallest file below this predicted KLD."),
        click.option(
            "--refine",
            type=click.IntRange(0),
            default=0,
            metavar="ROUNDS",
            help="Measure the target's plan as a whole so often, and correct it. [default: 0]",
        ),
        click.option("--output", type=PATH, help="The artifact's file or directory. [default: by GGUF naming]"),
        click.option("--set", "overrides", multiple=True, metavar="PATTERN=FORMAT", help="Override a role or tensor."),
        click.option(
            "--imatrix", type=PATH, help="Use this importance matrix (GGUF or .dat) instead of computing one."
        ),
        click.option("--sensitivity", type=PATH, help="Use this sensitivity table instead of measuring one."),
        click.option("--calibration", metavar="NAME|FILE", help="Text: a file, wikitext-2, or a Hub dataset."),
        click.option(
            "--chat/--no-chat", default=None, help="Calibrate on conversations. [default: with a chat template]"
        ),
        click.option("--samples", default=512, show_default=True, help="Calibration sequences, 128 to 1024."),
        click.option("--sequence-length", default=512, show_default=True, help="Tokens in a calibration sequence."),
        calibration_dtype_option,
        click.option(
            "--protect-super-weights",
            type=click.Choice(["auto", "off", "raise", "pin", "rescale", "exclude"]),
            help="How. [default: as the profile says: auto, what measurement shows to help]",
        ),
        click.option(
            "--alpha", metavar="0..1|auto", help="How far SmoothQuant moves outliers into weights. [default: 0.5]"
        ),
        click.option(
            "--activation-scales",
            type=click.Choice(["absmax", "average", "percentile", "mse"]),
            help="How static activation scales are found. [default: mse]",
        ),
        click.option("--effort", type=click.Choice(["best", "fast"]), default="best", show_default=True),
        click.option(
            "--error-feedback",
            is_flag=True,
            help="Choose codes so that the errors of a row make up for each other; much slower.",
        ),
        click.option("--pre-tokenizer", metavar="NAME", help="llama.cpp's name, where it cannot be recognised."),
        click.option("--split-size", metavar="SIZE", help="Split the artifact, for instance 20GB."),
        click.option("--work-dir", type=PATH, help="Where checkpoints are kept. [default: beside the output]"),
        click.option("--threads", default=0, help="Encoder threads. [default: all cores]"),
        click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda", "mps"])),
        click.option("--seed", default=0, show_default=True, help="Seed of whatever is drawn at random."),
        click.option(
            "--quality/--no-quality", default=True, help="Measure perplexity and KL divergence. [default: on]"
        ),
        click.option("--lm-eval", metavar="TASKS", help="Run tasks of the lm-evaluation-harness, by comma, too."),
        click.option("--lm-eval-limit", type=click.IntRange(1), help="Examples of each task. [default: all]"),
        click.option("--json", "as_json", is_flag=True, help="Print data for machines on stdout."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def build_job(split_size: str | None, alpha: str | None, **options: Any):
    """The Job of a command's options."""
    from calibration.smoothing import parse_alpha
    from converter.options import build_job as build

    smooth = None if alpha is None else parse_alpha(alpha)
    return build(**options, shard_bytes=split_size, alpha=smooth, command=this_command())


def this_command() -> str:
    """The command line that is running, as one would type it."""
    return shlex.join(["convert", *sys.argv[1:]])


@click.group(cls=DefaultGroup, context_settings={"max_content_width": 120})
@click.version_option(package_name="bitwright")
def main() -> None:
    """Turn a Hugging Face checkpoint into the smallest GGUF, or safetensors directory, that still behaves.

    MODEL is a Hub id (org/name[@revision]), a directory with safetensors, or a GGUF in F32, F16 or BF16. Running the
    same command again continues where the last run stopped.
    """


def card_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of publishing that `convert MODEL --push-to` and `convert publish` share."""
    command = click.option("--public", is_flag=True, help="Publish for everybody to see. [default: private]")(command)
    return click.option("--base-model", metavar="ORG/NAME", help="The source's id on the Hub, for the card.")(command)


@main.command("convert-model", hidden=True)
@job_options
@click.option("--push-to", metavar="ORG/NAME", help="Then publish it in this repository on the Hub, split at 20 GB.")
@card_options
@click.option("--dry-run", is_flag=True, help="Print the plan with its exact size; write nothing.")
@click.option("--fresh", is_flag=True, help="Forget what an earlier run has done, and replace its output.")
@click.option("--strict", is_flag=True, help="End with exit code 3 when the model is severely damaged.")
@fails_clearly
def convert_model(
    dry_run: bool,
    fresh: bool,
    strict: bool,
    as_json: bool,
    push_to: str | None,
    public: bool,
    base_model: str | None,
    split_size: str | None,
    **options: Any,
) -> None:
    """Convert MODEL."""
    job = build_job(**options, split_size=split_size or (HUB_FILE_SIZE if push_to is not None else None))
    target = None
    if push_to is not None:
        from converter.publish import Target, preflight

        if job.profile.target != "gguf":
            raise ConvertError(
                "only a GGUF is published so far, and this profile makes a safetensors directory",
                "--push-to",
                "convert it first, then send the directory: hf upload ORG/NAME DIRECTORY",
            )

        target = Target(push_to, public, base_model)
        preflight(target, job.shard_bytes, lambda line: click.echo(line, err=True))
    elif public or base_model is not None:
        raise ConvertError("nothing is published", "--public, --base-model", "say where: --push-to org/name")
    if dry_run:
        print_plan(job, as_json, None)
        return
    if strict and not options["quality"]:
        raise ConvertError("--strict judges what --no-quality leaves out", "--strict", "leave out one of the two")
    from converter.interrupts import Stop
    from converter.pipeline import run
    from converter.progress import Progress
    from converter.report import report_text
    from converter.verdict import EXIT_CODE, is_severe, not_judged

    progress = Progress()
    try:
        with Stop().on_interrupt() as should_stop:
            prepared, report = run(job, progress, should_stop, fresh)
        if not as_json:
            click.echo(report_text(report, prepared.plan))
        if strict and not_judged(report):
            raise ConvertError(
                "the system kept ending the runtime, so the artifact could not be judged",
                report["artifact"]["files"][0]["path"],
                "free some memory and run the same command again; the artifact is complete",
            )
        damaged = strict and is_severe(report["verdict"])
        if target is not None and not damaged:
            report = {**report, "published": push(report, prepared.job.work_dir, target, progress, as_json)}
        elif target is not None:
            progress.say(f"not published in {target.repository}: --strict, and the model is severely damaged")
    finally:
        progress.close()
    if as_json:
        click.echo(json.dumps(report))
    if damaged:
        sys.exit(EXIT_CODE)


def push(report: dict, work_dir: Path | None, target, progress, as_json: bool) -> dict:
    """Publish what has just been converted."""
    from converter.publish import publish as publish_artifact
    from converter.publish import result_text

    first = Path(report["artifact"]["files"][0]["path"])
    result = publish_artifact(first, target, progress, work_dir=work_dir)
    if not as_json:
        click.echo("\n" + result_text(result))
    return result


@main.command()
@click.argument("artifact", type=PATH)
@click.option("--to", "repository", required=True, metavar="ORG/NAME", help="The repository; made where there is none.")
@card_options
@click.option("--name", metavar="NAME.gguf", help="The artifact's name there. [default: its own, by GGUF naming]")
@click.option("--replace", is_flag=True, help="Put it in the place of another artifact that has its name.")
@click.option("--work-dir", type=PATH, help="Where its report is. [default: beside the artifact]")
@click.option("--dry-run", is_flag=True, help="Show the repository and the card as they would be; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print data for machines on stdout.")
@fails_clearly
def publish(artifact: Path, work_dir: Path | None, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Publish ARTIFACT on the Hub, with its report, its recipe and a model card."""
    from converter.progress import Progress
    from converter.publish import Target, result_text
    from converter.publish import publish as publish_artifact

    progress = Progress()
    try:
        result = publish_artifact(artifact, Target(**options), progress, work_dir=work_dir, dry_run=dry_run)
    finally:
        progress.close()
    click.echo(json.dumps(result) if as_json else result_text(result))


@main.command()
@click.argument("artifact", type=PATH)
@click.option("--split-size", required=True, metavar="SIZE", help="Bytes in a file at most, for instance 20GB.")
@click.option("--work-dir", type=PATH, help="Where its report is. [default: beside the artifact]")
@fails_clearly
def split(artifact: Path, split_size: str, work_dir: Path | None) -> None:
    """Split ARTIFACT into several files, without encoding it again."""
    from converter.progress import Progress
    from converter.split import split as split_artifact
    from profiles.budget import parse_size

    progress = Progress()
    try:
        paths = split_artifact(artifact, parse_size(split_size, "--split-size"), work_dir, progress)
    finally:
        progress.close()
    click.echo("\n".join(map(str, paths)))


@main.command()
@job_options
@click.option("--explain", metavar="PATTERN", help="Show every tensor whose name or role matches, with the reason.")
@fails_clearly
def plan(explain: str | None, as_json: bool, **options: Any) -> None:
    """Print what would be written, to the byte (a dry run)."""
    print_plan(build_job(**options), as_json, explain)


def print_plan(job, as_json: bool, explain: str | None) -> None:
    from fnmatch import fnmatchcase

    from converter.pipeline import prepare
    from converter.report import explanation, plan_text
    from formats.errors import nearest

    prepared = prepare(job)
    for note in prepared.notes:
        click.echo(note, err=as_json)
    data = prepared.to_dict()
    if explain is not None:
        rows = [r for r in data["tensors"] if fnmatchcase(r["tensor"], explain) or fnmatchcase(r["role"], explain)]
        if not rows:
            names = sorted({r["role"] for r in data["tensors"]}) + [r["tensor"] for r in data["tensors"]]
            raise ConvertError(f"no tensor matches {explain!r}", "--explain", nearest(explain, names))
        data["tensors"] = rows
    if as_json:
        click.echo(json.dumps(data))
        return
    if explain is not None:
        click.echo(explanation(data["tensors"]))
        return
    click.echo(plan_text(prepared.plan, data["bytes"]))
    click.echo(f"would write {prepared.job.output}")


@main.group()
def profiles() -> None:
    """List the preset profiles, show one, or check a file."""


@profiles.command("list")
@fails_clearly
def list_profiles() -> None:
    """Every preset with what it does and when to use it, and every scheme, which is a profile, too."""
    from formats.schemes import SCHEMES
    from profiles.schema import load_profile, preset_names

    for name in preset_names():
        profile = load_profile(name)
        click.echo(f"{name}\n    {profile.description}\n    good for: {profile.good_for}")
        if profile.target == "safetensors":
            click.echo("    target: a safetensors directory for vLLM and transformers")
    click.echo("schemes, each a profile of a safetensors directory:")
    for name in SCHEMES:
        click.echo(f"    {name:<16}  {load_profile(name).description}")


@profiles.command("show")
@click.argument("name")
@fails_clearly
def show_profile(name: str) -> None:
    """The TOML of a preset or a scheme: a starting point for a profile of your own."""
    from profiles.schema import load_profile

    click.echo(load_profile(name).text, nl=False)


@profiles.command("check")
@click.argument("file", type=PATH)
@fails_clearly
def check_profile(file: Path) -> None:
    """Read FILE as a profile, and say what it decides or what is wrong with it."""
    from profiles.describe import profile_lines
    from profiles.schema import load_profile

    if file.suffix != ".toml":
        raise ConvertError("a profile's file ends in .toml", str(file), "rename it, or name another file")
    click.echo("\n".join(profile_lines(load_profile(str(file)))))


@main.command()
@click.argument("model")
@click.option("--output", type=PATH, required=True, help="importance.gguf, or .dat (legacy); activations.safetensors.")
@click.option("--calibration", metavar="NAME|FILE", help="Text: a file, wikitext-2, or a Hub dataset.")
@click.option("--chat/--no-chat", default=None, help="Calibrate on conversations. [default: with a chat template]")
@click.option("--samples", default=512, show_default=True, help="Calibration sequences, 128 to 1024.")
@click.option("--sequence-length", default=512, show_default=True, help="Tokens in a calibration sequence.")
@calibration_dtype_option
@click.option("--work-dir", type=PATH, help="Where checkpoints are kept. [default: beside the output]")
@click.option("--threads", default=0, help="CPU threads; changes no byte. [default: all cores]")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda", "mps"]))
@click.option("--seed", default=0, show_default=True, help="Seed of whatever is drawn at random.")
@click.option("--super-weights", is_flag=True, help="Look for super weights too, and keep them in the file.")
@click.option("--sensitivity", is_flag=True, help="Measure what every format costs every tensor too: a file beside it.")
@click.option("--activations", is_flag=True, help="Write activation statistics instead, to a .safetensors file.")
@click.option(
    "--fresh",
    is_flag=True,
    help="Start over in a work directory that holds another computation, and replace its output.",
)
@fails_clearly
def imatrix(model: str, output: Path, **options: Any) -> None:
    """Compute the importance matrix of MODEL, or convert one between GGUF and .dat."""
    from converter.importance import write_importance
    from converter.interrupts import Stop
    from converter.progress import Progress

    progress = Progress()
    try:
        with Stop().on_interrupt() as should_stop:
            written = write_importance(model, output, progress, should_stop, command=this_command(), **options)
    finally:
        progress.close()
    click.echo("\n".join(map(str, written)))


@main.command()
@click.argument("artifact", type=PATH)
@click.option("--against", "model", required=True, metavar="MODEL", help="The source: a directory, Hub id or GGUF.")
@click.option("--text", metavar="NAME|FILE", help="Text to evaluate on. [default: text that calibration never sees]")
@click.option("--samples", default=16, show_default=True, help="Sequences to evaluate.")
@click.option("--sequence-length", default=512, show_default=True, help="Tokens in a sequence; the second half counts.")
@click.option("--threads", default=0, help="CPU threads. [default: all cores]")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda", "mps"]))
@click.option("--json", "as_json", is_flag=True, help="Print data for machines on stdout.")
@fails_clearly
def evaluate(artifact: Path, model: str, as_json: bool, **options: Any) -> None:
    """Perplexity, KL divergence and top-1 agreement of ARTIFACT, a GGUF or a directory, against its source, and
    whether its runtime computes the same."""
    from converter.progress import Progress
    from converter.quality import evaluate_artifact
    from converter.report import agreement_lines, quality_lines, quality_warning
    from converter.verdict import agreement_warning

    progress = Progress()
    try:
        quality = evaluate_artifact(artifact, model, progress, **options)
    finally:
        progress.close()
    lines = [*quality_lines(quality), *agreement_lines(quality["agreement"])]
    click.echo(json.dumps(quality) if as_json else "\n".join(lines))
    for warning in filter(None, (quality_warning(quality), agreement_warning(quality["agreement"]))):
        click.echo(f"warning: {warning}", err=True)


@main.command()
@click.argument("artifact", type=PATH)
@click.option("--against", "model", required=True, metavar="MODEL", help="The source: a directory, Hub id or GGUF.")
@click.option("--json", "as_json", is_flag=True, help="Print data for machines on stdout.")
@fails_clearly
def verify(artifact: Path, model: str, as_json: bool) -> None:
    """Decode every tensor of ARTIFACT, of a GGUF with the gguf package, and hold it against its source."""
    from converter.progress import Progress
    from converter.report import error_table
    from converter.verify_artifact import verify_artifact

    progress = Progress()
    try:
        errors = verify_artifact(artifact, model, progress)
    finally:
        progress.close()
    rows = [error.to_dict() for error in errors]
    click.echo(json.dumps(rows) if as_json else error_table(rows))


@main.command()
@click.argument("file", type=PATH)
@click.option("--plot", type=PATH, metavar="FILE", help="Draw it by layer and role instead, as .svg or .html.")
@click.option("--json", "as_json", is_flag=True, help="Print data for machines on stdout.")
@fails_clearly
def inspect(file: Path, plot: Path | None, as_json: bool) -> None:
    """Show what is in FILE: an artifact with its recipe, importance, sensitivity, activations, smoothing."""
    if plot is not None:
        from converter.plot import plot_file

        plot_file(file, plot)
        click.echo(plot)
        return
    from converter.inspect import inspect_file, inspect_text

    data = inspect_file(file)
    click.echo(json.dumps(data) if as_json else inspect_text(data))
