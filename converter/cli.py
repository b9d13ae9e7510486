"""The command line: parses, validates, calls. Data goes to stdout, everything else to stderr.

Each command is a module of its name in commands/, or in commands/about/ where it tells of what there is. Nothing heavy
is imported before a command runs, so that --help answers at once.
"""

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from bitwright.converter.boundary.errors import clear_errors
from bitwright.converter.boundary.streams import give_up_stdout, keep_streams_usable
from bitwright.converter.commands.about.architectures import architectures
from bitwright.converter.commands.about.cache import cache
from bitwright.converter.commands.about.doctor import doctor
from bitwright.converter.commands.about.man import man
from bitwright.converter.commands.about.profiles import profiles
from bitwright.converter.commands.advise import advise
from bitwright.converter.commands.batch import batch
from bitwright.converter.commands.convert import convert_model
from bitwright.converter.commands.imatrix import imatrix
from bitwright.converter.commands.inspect import inspect
from bitwright.converter.commands.judging.check import check
from bitwright.converter.commands.judging.evaluate import evaluate
from bitwright.converter.commands.judging.verify import verify
from bitwright.converter.commands.machines.encode import encode
from bitwright.converter.commands.machines.finish import finish
from bitwright.converter.commands.machines.workflow import workflow
from bitwright.converter.commands.outcome import say_as_json
from bitwright.converter.commands.plan import plan
from bitwright.converter.commands.publish import publish
from bitwright.converter.commands.split import split
from bitwright.formats.errors import ConvertError

EXAMPLES = {
    "bitwright org/model": "A GGUF of about 4 bits a weight.",
    "bitwright --target-size 5GiB org/model": "The best GGUF of at most 5 GiB.",
    "bitwright -p smoothquant-w8a8 org/model": "A directory for vLLM.",
    "bitwright plan -p Q4_K_M org/model": "What would be written, before anything is.",
}
# Names that ImageMagick's convert is given, and no model has.
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".tif", ".tiff", ".bmp", ".pdf", ".heic")


class DefaultGroup(click.Group):
    """A group whose main command needs no name: `bitwright MODEL` converts."""

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
                told = ConvertError(error.format_message(), "the command line", "see --help")
                say_as_json(told.to_dict(), error.exit_code)
            raise

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["as_json"] = "--json" in args
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help", "--version"):
            if any(Path(argument).suffix.lower() in _PICTURES for argument in args if not argument.startswith("-")):
                raise ConvertError(
                    "that is a picture, and this converts language models",
                    shlex.join(args),
                    "ImageMagick's command is `magick`, or /usr/bin/convert; this one is called `bitwright`, too",
                )
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.commands[self.default].format_options(ctx, formatter)
        commands = [(name, c.get_short_help_str()) for name, c in self.commands.items() if name != self.default]
        with formatter.section("Other commands"):
            formatter.write_dl(commands)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            formatter.write_dl(list(EXAMPLES.items()), col_max=45)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "[OPTIONS] MODEL  |  COMMAND ...")


@click.group(cls=DefaultGroup, context_settings={"max_content_width": 120, "help_option_names": ["-h", "--help"]})
@click.version_option(package_name="bitwright")
def main() -> None:
    """Turn a Hugging Face checkpoint into the smallest GGUF, or safetensors directory, that still behaves.

    MODEL is a Hub id (org/name[@revision]), a directory with safetensors, or a GGUF. Running the
    same command again continues where the last run stopped.
    """


_COMMANDS = (
    *(convert_model, publish, split, plan, advise, profiles, architectures, imatrix, evaluate, verify, check),
    *(inspect, batch, encode, finish, workflow, doctor, man, cache),
)
for command in _COMMANDS:
    main.add_command(command)
