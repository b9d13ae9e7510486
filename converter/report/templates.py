"""Templates (*.j2) beside the modules that fill them in: what they print is escaped, and what they name must exist."""

from collections.abc import Callable
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined


def templates(
    package: str, filters: dict[str, Callable[..., Any]], escape: Callable[[Any], Any] | None = None
) -> Environment:
    """The templates in the directory of a package. escape: of a value that is printed, for another language than HTML;
    it gives Markup."""
    environment = Environment(
        loader=FunctionLoader(lambda name: files(package).joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    return environment
