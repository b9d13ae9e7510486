"""`bitwright MODEL`: the whole conversion, and what may follow it."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from bitwright.converter.commands.outcome import fails_clearly, this_command
from bitwright.converter.commands.parameters import MainCommand, json_option, option, options_of, quiet_option
from bitwright.converter.commands.plan import build_job, print_plan
from bitwright.converter.commands.publish import card_options
from bitwright.converter.job.options import HUB, OUTPUT
from bitwright.formats.errors import ConvertError
from bitwright.formats.typed import ABSENT, Absent

if TYPE_CHECKING:
    from bitwright.converter.job.job import Job
    from bitwright.converter.job.progress import Progress
    from bitwright.converter.publishing.stage import Target
    from bitwright.converter.report.data import OnMachine

# The largest file that the Hub asks for.
HUB_FILE_SIZE = "20GB"
# What a ladder decides itself, or what is one artifact's own.
_OF_ONE_ARTIFACT = ("profile", "target_size", "target_bpw", "target_kld", "work_dir")


@click.command("convert-model", cls=MainCommand, hidden=True)
@click.argument("model")
@options_of("convert")
@option("--ladder", metavar="RUNGS", help="Make several artifacts: profiles, sizes or 4.5bpw, comma-separated.")
@option("--push-to", group=HUB, metavar="ORG/NAME", help="Publish the result in this repository, split at 20 GB.")
@card_options
@option("--lora-gguf", group=OUTPUT, is_flag=True, help="Write a LoRA GGUF of an adapter for llama.cpp, and no model.")
@option("--advise", metavar="NAME|this", help="Take the profile that `bitwright advise` recommends for a machine.")
@option("--dry-run", group=OUTPUT, is_flag=True, help="Print the plan with its exact size, and write nothing.")
@option("--fresh", group=OUTPUT, is_flag=True, help="Forget what an earlier run has done, and replace its output.")
@option("--strict", is_flag=True, help="End with exit code 3 when the model is damaged.")
@json_option
@quiet_option
@fails_clearly
def convert_model(quiet: bool, events: Path | None, **options: Any) -> None:
    """Convert MODEL."""
    from bitwright.converter.job.progress import Progress

    progress = Progress(quiet)
    with progress.recorded(events, this_command()):
        damaged = _convert(progress, **options)
    if damaged:
        from bitwright.converter.report.verdict import EXIT_CODE

        sys.exit(EXIT_CODE)


def _convert(
    progress: "Progress",
    ladder: str | None,
    advise: str | None,
    lora_gguf: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> bool:
    """What the options ask for; returns whether --strict refuses what came out."""
    if ladder is not None:
        if dry_run or options["strict"] or lora_gguf or options["push_to"] is not None:
            raise ConvertError(
                "a ladder is neither planned alone nor judged or published as a whole",
                "--ladder with --dry-run, --strict, --lora-gguf or --push-to",
                "plan a rung with `bitwright plan --profile RUNG`, publish each with `bitwright publish`",
            )
        for name in ("strict", "push_to", "public", "base_model"):
            del options[name]
        climb_ladder(ladder, progress, as_json, **options)
        return False
    machine: OnMachine | Absent = ABSENT
    if advise is not None:
        options["profile"], machine = advised(advise, options)
    hub = _Hub(*(options.pop(name) for name in ("push_to", "public", "base_model")))
    fresh, strict = options.pop("fresh"), options.pop("strict")
    if hub.repository is not None:
        options["shard_bytes"] = options["shard_bytes"] or HUB_FILE_SIZE
    job = build_job(**options)
    if lora_gguf:
        from bitwright.converter.lora_gguf import write_lora_gguf

        written = write_lora_gguf(job.model, job.base, job.output)
        click.echo(json.dumps({"path": str(written)}) if as_json else f"wrote {written}")
        return False
    target = hub.target(job.shard_bytes)
    if dry_run:
        print_plan(job, as_json, None)
        return False
    if strict and job.judge == "off":
        raise ConvertError("--strict judges what --judge off leaves out", "--strict", "leave out one of the two")
    return _convert_one(job, progress, target, (fresh, strict, as_json), machine)


class _Hub(NamedTuple):
    """What is said of publishing."""

    repository: str | None
    public: bool
    base_model: str | None

    def target(self, shard_bytes: int | None) -> "Target | None":
        """Where it goes, and whether it may; None where it is not published. Raises ConvertError."""
        if self.repository is None:
            if self.public or self.base_model is not None:
                raise ConvertError("nothing is published", "--public, --base-model", "say where: --push-to org/name")
            return None
        from bitwright.converter.publishing.stage import Target, preflight

        target = Target(self.repository, self.public, self.base_model)
        preflight(target, shard_bytes, lambda line: click.echo(line, err=True))
        return target


def _convert_one(
    job: "Job",
    progress: "Progress",
    target: "Target | None",
    switches: tuple[bool, bool, bool],
    machine: "OnMachine | Absent",
) -> bool:
    """switches: fresh, strict, as_json."""
    from bitwright.converter.boundary.interrupts import Stop
    from bitwright.converter.pipeline import run
    from bitwright.converter.report.text import report_text
    from bitwright.converter.report.verdict import is_damaged, verdict_line

    fresh, strict, as_json = switches
    with Stop().on_interrupt() as should_stop:
        prepared, report = run(job, progress, should_stop, fresh, machine)
    if not as_json:
        click.echo(report_text(report, prepared.plan, verdict_line(report)))
    if strict and report.not_judged:
        raise ConvertError(
            "the system kept ending the runtime, so the artifact could not be judged",
            report.artifact.first.path,
            "free some memory and run the same command again; the artifact is complete",
        )
    damaged, shown = strict and is_damaged(report.verdict), report.to_dict()
    if target is not None and not damaged:
        with progress.stage("publish"):
            shown["published"] = push(report.artifact.location, prepared.run.work_dir, target, progress, as_json)
    elif target is not None:
        progress.say(f"not published in {target.repository}: --strict, and the model is damaged")
    if as_json:
        click.echo(json.dumps(shown))
    return damaged


def advised(hardware: str, options: dict[str, Any]) -> "tuple[str, OnMachine]":
    """The profile that is recommended for a machine, and what the report is to say of it. Raises ConvertError where
    none is, and for a profile that is named as well."""
    from bitwright.converter.advice.on_machine import on_machine
    from bitwright.converter.advice.request import request_of
    from bitwright.converter.advice.stage import advise

    if options["profile"] is not None:
        raise ConvertError("--advise chooses the profile", "--profile", "leave out one of the two")
    names = ("from_quantized", "base", "sensitivity", "work_dir")
    advice = advise(request_of(options["model"], hardware=hardware, **{name: options[name] for name in names}))
    if advice.best is None:
        raise ConvertError(advice.reason, f"--advise {hardware}", f"bitwright advise --hardware {hardware} tells more")
    click.echo(f"{advice.best.profile} for {advice.machine.name}: {advice.reason}", err=True)
    return advice.best.profile, on_machine(advice, advice.best)


def push(
    location: Path, work_dir: Path | None, target: "Target", progress: "Progress", as_json: bool
) -> dict[str, Any]:
    """Publish the artifact that has just been converted: the directory, or the GGUF that begins with this file."""
    from bitwright.converter.publishing.outcome import outcome_text
    from bitwright.converter.publishing.stage import publish as publish_artifact

    result = publish_artifact(location, target, progress, work_dir=work_dir)
    if not as_json:
        click.echo("\n" + outcome_text(result))
    return result


def climb_ladder(rungs: str, progress: "Progress", as_json: bool, fresh: bool, **options: Any) -> list[Path]:
    """Write every rung, print what came out, and return where the artifacts are. options: those of a job."""
    for name in _OF_ONE_ARTIFACT:
        if options.pop(name, None) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ConvertError("a rung says this for each artifact", f"--ladder, {flag}", f"leave {flag} out")
    from bitwright.converter.boundary.interrupts import Stop
    from bitwright.converter.report.text import ladder_text
    from bitwright.converter.several.ladder import PAGE, SUMMARY, climb, parse_rungs

    directory = Path(options.pop("output") or ".")
    model, overrides = options.pop("model"), options.pop("overrides")
    told = {"overrides": overrides, "command": this_command(), **options}
    with Stop().on_interrupt() as should_stop:
        reports = climb(model, parse_rungs(rungs), directory, progress, should_stop, fresh, **told)
    if as_json:
        click.echo(json.dumps([report.to_dict() for report in reports]))
    else:
        click.echo(ladder_text(reports))
        click.echo(f"compared in {directory / PAGE}, {directory / SUMMARY}")
    return [report.artifact.location for report in reports]
