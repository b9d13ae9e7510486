"""What the commands have in common of their arguments. The options of a job are read from the fields of Job."""

from collections.abc import Callable, Collection
from dataclasses import MISSING, Field, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

import click

from bitwright.converter.job.job import Job
from bitwright.converter.job.options import GROUPS, SIZE_AND_QUALITY, choices_of, flag, negated, option_of
from bitwright.formats.typed import is_a

Command = Callable[..., None]

PATH = click.Path(path_type=Path)


class GroupedOption(click.Option):
    """An option that --help shows under a heading. group: one of GROUPS, "" for what every command has."""

    def __init__(self, *args: Any, group: str = "", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose --help shows its options by their groups. Options of a job that may stand alone do not take the
    next word for their value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = {}
        for field in fields(Job):
            if (alone := option_of(field).alone) is not None:
                words[negated(flag(field))] = f"{flag(field)}={alone[1]}"
                words[flag(field)] = f"{flag(field)}={alone[0]}"
        choices = {flag(field): choices_of(field.type) for field in fields(Job)}
        spelled = [
            arg if arg not in words or following in choices.get(arg, ()) else words[arg]
            for arg, following in zip_longest(args, args[1:])
        ]
        return super().parse_args(ctx, spelled)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        shown: dict[str, list[tuple[str, str]]] = {group: [] for group in (*GROUPS, "")}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                shown[getattr(parameter, "group", "")].append(record)
        for group, records in shown.items():
            if records:
                with formatter.section(group or "Others"):
                    formatter.write_dl(records)


class _MainContext(click.Context):
    """The command that needs no name is called as the group is."""

    @property
    def command_path(self) -> str:
        return self.parent.command_path if self.parent is not None else super().command_path


class MainCommand(GroupedCommand):
    context_class = _MainContext


def option(*names: str, group: str = SIZE_AND_QUALITY, **settings: Any) -> Callable[[Command], Command]:
    """An option of a command whose options have groups."""
    return click.option(*names, cls=GroupedOption, group=group, **settings)


json_option = click.option("--json", "as_json", is_flag=True, help="Print data for machines on stdout.")

quiet_option = click.option("-q", "--quiet", is_flag=True, help="Say nothing on stderr but errors.")

against_option = click.option(
    "--against", "model", required=True, metavar="MODEL", help="The source: a directory, Hub id or GGUF."
)

part_option = click.option(
    "--part", metavar="I/N", help="Which part of how many; /N, or nothing, as Slurm's or Kubernetes' variables say."
)

scratch_option = click.option(
    "--scratch",
    type=PATH,
    metavar="DIR",
    help="A disk of this machine for unfinished work. [default: beside the output]",
)

report_place_option = click.option("--work-dir", type=PATH, help="Where its report is. [default: beside the artifact]")


def options_of(command: str, job: type[Job] = Job, idle: Collection[str] = ()) -> Callable[[Command], Command]:
    """The options of the job that this command does, in the order of the fields. idle: fields whose options change
    nothing here; they are taken, so that a command line serves another command, too, and not shown."""
    taken = [
        option_for(field, **({"hidden": True} if field.name in idle else {}))
        for field in fields(job)
        if command in option_of(field).commands
    ]

    def decorate(function: Command) -> Command:
        for option in reversed(taken):
            function = option(function)
        return function

    return decorate


def job_option(name: str, **changes: Any) -> Callable[[Command], Command]:
    """An option of a job in a command that does something else. changes: what click.option is told otherwise."""
    return option_for(next(field for field in fields(Job) if field.name == name), **changes)


def option_for(field: "Field[Any]", **changes: Any) -> Callable[[Command], Command]:
    """The option of the command line that a field of Job describes, under the field's name in Python."""
    option, name = option_of(field), flag(field)
    default = None if field.default is MISSING or option.parse is not None else field.default
    kind = _kind(field)
    if kind.get("is_flag") and default is not False:
        name = f"{name}/{negated(name)}"
    settings: dict[str, Any] = {"help": option.help, "metavar": option.metavar, "show_default": option.shows_default}
    settings |= {"cls": GroupedOption, "group": option.group, "shell_complete": COMPLETIONS.get(field.name)}
    names = [*([f"-{option.short}"] if option.short else []), name, field.name]
    return click.option(*names, **{"default": default, **settings, **kind, **changes})


def _profiles(_ctx: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    """Names of profiles that begin so, for the shell."""
    from bitwright.profiles.reading.known_names import other_names
    from bitwright.profiles.reading.schema import profile_names

    names = dict.fromkeys([*profile_names(), *other_names()])
    return [name for name in names if name.casefold().startswith(begun.casefold())]


def _overrides(_ctx: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    """PATTERN=FORMAT: roles before the equals sign, formats and schemes after it."""
    from bitwright.formats.registry import FORMATS
    from bitwright.formats.schemes.registry import SCHEMES
    from bitwright.profiles.vocabulary import Role

    pattern, equals, chosen = begun.partition("=")
    if not equals:
        return [f"{role.value}=" for role in Role if role.value.startswith(pattern)]
    return [f"{pattern}={name}" for name in (*FORMATS, *SCHEMES) if name.startswith(chosen.upper())]


COMPLETIONS = {"profile": _profiles, "overrides": _overrides}
"""What the shell completes the values of these fields by."""


def _kind(field: "Field[Any]") -> dict[str, Any]:
    """What click is told of a field's type; what is parsed later on is a text."""
    option, declared = option_of(field), field.type
    if option.parse is not None or isinstance(declared, str):
        return {"type": str, "multiple": option.parse is None and field.default == ()}
    if is_a(True, declared):
        return {"is_flag": True}
    if choices := choices_of(declared):
        return {"type": click.Choice(choices)}
    for kind, sample in ((PATH, Path()), (click.FLOAT, 0.5)):
        if is_a(sample, declared):
            return {"type": kind}
    if is_a(0, declared):
        return {"type": click.INT if option.least is None else click.IntRange(option.least)}
    return {"type": str}
