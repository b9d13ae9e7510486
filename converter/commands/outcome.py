"""How a command ends: its data on stdout, its error on stderr, and the exit code."""

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

from bitwright.converter.boundary.errors import clear_errors
from bitwright.converter.boundary.interrupts import STOPPED, stops_at_once
from bitwright.converter.boundary.streams import give_up_stdout
from bitwright.formats.errors import ConvertError

_CONTINUE = "run the same command again to continue"


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
                say_as_json(error.to_dict(), error.exit_code)
            give_up_stdout()
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo(f"error: stopped at once; {_CONTINUE}", err=True)
            if kwargs.get("as_json"):
                say_as_json(ConvertError("stopped at once", this_command(), _CONTINUE).to_dict(), STOPPED)
            sys.exit(STOPPED)

    return click.option("--verbose", is_flag=True, help="Show the traceback of an error.")(wrapped)


def say_as_json(error: dict[str, str], exit_code: int) -> None:
    """An error for machines, on stdout. error: as of ConvertError.to_dict."""
    with suppress(OSError):  # where stdout itself is the trouble, stderr and the exit code have said so
        click.echo(json.dumps({"error": error, "exit_code": exit_code}))


def this_command() -> str:
    """The command line that is running, as one would type it."""
    return shlex.join([program(), *sys.argv[1:]])


def program() -> str:
    """The name that this program was called by."""
    name = Path(sys.argv[0]).stem
    return name if name in ("bitwright", "convert") else "bitwright"
