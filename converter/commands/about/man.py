"""`bitwright man`: the manual page, of the same texts as --help."""

import click

from bitwright.converter.commands.outcome import fails_clearly


@click.command(short_help="Print the manual page: bitwright man | man -l -")
@click.pass_context
@fails_clearly
def man(context: click.Context) -> None:
    """Print the manual page in roff, for `man -l -` or a file bitwright.1 in a directory of man pages."""
    group = context.find_root().command
    assert isinstance(group, click.Group)
    click.echo("\n".join(_page(group)))


def _page(group: click.Group) -> list[str]:
    lines = ['.TH BITWRIGHT 1 "" "" "User Commands"', ".SH NAME", "bitwright \\- low\\-bit models from checkpoints"]
    lines += [".SH SYNOPSIS", ".B bitwright", "[OPTIONS] MODEL", ".br", ".B bitwright", "COMMAND ..."]
    lines += [".SH DESCRIPTION", _text(group.help or "")]
    lines += _command("bitwright MODEL", next(command for command in group.commands.values() if command.hidden))
    for name, command in sorted(group.commands.items()):
        if not command.hidden:
            lines += _command(f"bitwright {name}", command)
    return lines


def _command(title: str, command: click.Command) -> list[str]:
    lines = [f'.SH "{_text(title).upper()}"', _text(command.help or "")]
    with click.Context(command, info_name=title) as context:
        records = [p.get_help_record(context) for p in command.params if isinstance(p, click.Option)]
    for usage, text in filter(None, records):
        lines += [".TP", f".B {_text(usage)}", _text(text)]
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            lines += [".TP", f".B {_text(f'{title} {name}')}", _text(inner.get_short_help_str(200))]
    return lines


def _text(text: str) -> str:
    """One line of roff that is the text: nothing in it is a request or an escape."""
    flat = " ".join(text.split()).replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{flat}" if flat.startswith((".", "'")) else flat
