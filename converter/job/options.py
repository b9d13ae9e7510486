"""What a field of Job says of itself as an option. The command line, Python, the fingerprint and the recipe read it.

Nothing heavy is imported here, so that the command line can read the options before a command runs.
"""

from collections.abc import Callable
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, Literal, ParamSpec, get_args, get_origin, get_type_hints

from bitwright.converter.job.spelling import itself, spelt
from bitwright.formats.errors import ConvertError, nearest
from bitwright.formats.typed import is_a

P = ParamSpec("P")

SIZE_AND_QUALITY, CALIBRATION, DIRECTORIES = "Size and quality", "Calibration", "vLLM directories"
OUTPUT, HUB, MACHINE = "Output", "Hub", "Machine"
GROUPS = (SIZE_AND_QUALITY, CALIBRATION, DIRECTORIES, OUTPUT, HUB, MACHINE)
"""Headings of options, in the order of --help."""


@dataclass(frozen=True)
class Option:
    """A field of Job as an option.

    help, metavar: as `bitwright --help` shows them. shows_default: --help states the field's default. group: the
        heading that it is shown under.
    name: the option's name on the command line without its dashes, where it is not the field's own. short: a letter.
    commands: the commands that take the option; none for a field that only Python sets.
    least: the smallest number.
    parse(text, flag): the value of a text, where people write the field's values as texts. flag: as errors name it.
    identity(value): what decides whether a job may be continued, as plain JSON data; None where the value does not.
    recipe: whether the command that makes the same bytes again says the option: "always", "changed" for a value that is
        not the default, or "never".
    spell(value): the text of a value in that command; a tuple is one option for each of its items.
    of_text: the option counts only where the model runs over the calibration text.
    alone: the value of the option where none is written, which True stands for in Python; and what its negation,
        --no-..., and False stand for. None where the option is not that short.
    """

    help: str = ""
    metavar: str | None = None
    shows_default: bool = False
    group: str = SIZE_AND_QUALITY
    name: str | None = None
    short: str | None = None
    commands: tuple[str, ...] = ("convert",)
    least: int | None = None
    parse: Callable[[str, str], Any] | None = None
    identity: Callable[[Any], object] | None = itself
    recipe: Literal["always", "changed", "never"] = "changed"
    spell: Callable[[Any], str] = spelt
    of_text: bool = False
    alone: tuple[str, str] | None = None


def _as_metadata(make: Callable[P, Option]) -> Callable[P, dict[str, Option]]:
    return lambda *args, **kwargs: {"option": make(*args, **kwargs)}


option = _as_metadata(Option)
"""The metadata of a dataclass field that is an option; takes what Option takes."""


def option_of(field: "Field[Any]") -> Option:
    described: Option = field.metadata["option"]
    return described


def flag(field: "Field[Any]") -> str:
    """The option of a field as one types it: --split-size."""
    return f"--{option_of(field).name or field.name.replace('_', '-')}"


def negated(flag: str) -> str:
    """What says no to a choice of yes or no: --no-chat."""
    return flag.replace("--", "--no-", 1)


def given_value(field: "Field[Any]", value: Any) -> Any:
    """The field's value of what a caller gives: paths, and what the option parses, may be texts; a tuple may be a list,
    or None where it is empty; what may stand alone may be True or False.

    Raises ConvertError for a text that cannot be parsed.
    """
    parse, alone = option_of(field).parse, option_of(field).alone
    if isinstance(value, bool) and alone is not None:
        return alone[0] if value else alone[1]
    if isinstance(value, str) and parse is not None:
        return parse(value, flag(field))
    if isinstance(value, str) and is_a(Path(), field.type):
        return Path(value)
    if get_origin(field.type) is tuple and (value is None or isinstance(value, list)):
        return tuple(value or ())
    return value


def check_field(field: "Field[Any]", value: Any, declared: Any) -> None:
    """Raises ConvertError for a value that the field cannot have: of another type, or smaller than the least."""
    check_value(field.name, value, declared, flag(field))
    least = option_of(field).least
    if least is not None and value is not None and value < least:
        where = _where(field.name, flag(field))
        raise ConvertError(f"{field.name} is {value}, and is {least} at least", where, "leave it out")


def check_fields(job: Any) -> None:
    """The same of every field of a Job."""
    from bitwright.profiles.reading.rules import LayerQuantizationConfig
    from bitwright.profiles.reading.schema import QuantizationProfile

    heavy = {"LayerQuantizationConfig": LayerQuantizationConfig, "QuantizationProfile": QuantizationProfile}
    declared = get_type_hints(type(job), localns=heavy)
    for each in fields(job):
        check_field(each, getattr(job, each.name), declared[each.name])


def check_value(name: str, value: object, declared: Any, flag: str) -> None:
    """Raises ConvertError for a value that is not of the declared type, with the nearest of those that are named."""
    if is_a(value, declared) and "\0" not in str(value):
        return
    choices, kinds = choices_of(declared), _kinds(declared)
    named = isinstance(value, str) and len(choices) == len(kinds)
    remedy = nearest(str(value), choices) if named else f"give {' or '.join(sorted(kinds))}"
    raise ConvertError(f"{name} is {repr(value)[:60]}, which it cannot be", _where(name, flag), remedy)


def _where(name: str, flag: str) -> str:
    return f"{name}, {flag} of the command"


def choices_of(declared: Any) -> list[str]:
    """The texts that a type names."""
    if get_origin(declared) is Literal:
        return list(get_args(declared))
    return [choice for part in get_args(declared) for choice in choices_of(part)]


def _kinds(declared: Any) -> set[str]:
    """What a type takes, in words."""
    words = {str: "a text", int: "a whole number", float: "a number", bool: "True or False", Path: "a path"}
    if get_origin(declared) is Literal:
        return {repr(value) for value in get_args(declared)}
    if get_origin(declared) in (tuple, list):
        return {"a list of texts"}
    if declared in words:
        return {words[declared]}
    return {kind for part in get_args(declared) for kind in _kinds(part)}
