"""Write docs/api.md, the reference of what Python programs may call, from the docstrings in the source.

python -m scripts.api_reference            # writes docs/api.md
python -m scripts.api_reference --check    # exits with 1 where it is not what the docstrings say
"""

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
_INTRODUCTION = """# API reference

What Python programs may call, from the docstrings in the source: `python -m scripts.api_reference` writes this page.
Whatever goes wrong is a `ConvertError`. Nothing heavy is imported before a function is called. The
[guide](guide.md#from-python) has an example.
"""

# Heading, module, and its public names; all of them where none are named.
_SECTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("The commands", "bitwright.converter", ()),
    ("Errors", "bitwright.formats.errors", ("ConvertError", "TryAgain")),
    ("Profiles", "bitwright.profiles.reading.schema", ("load_profile", "parse_profile", "preset_names")),
    ("Importance matrices", "bitwright.calibration.statistics.imatrix_file", ("load_imatrix", "save_imatrix")),
    ("Sources", "bitwright.converter.source.open", ("open_checkpoint",)),
    ("GGUF formats", "bitwright.formats.registry", ("get_format",)),
    ("A GGUF format", "bitwright.formats.block_format", ("BlockFormat",)),
    ("Schemes of directories", "bitwright.formats.schemes.registry", ("get_scheme", "Scheme")),
)
_OPTIONS = """## Options of `convert` and `plan`

Beside the arguments that are named above, both take these as keywords: the fields of `Job`, which are the options
of the command line, too.

| keyword | option | default | |
|---|---|---|---|
"""


def reference() -> str:
    """The text of docs/api.md."""
    parts = [_INTRODUCTION]
    for heading, module, names in _SECTIONS:
        parts.append(f"## {heading}\n\n`from {module} import ...`\n")
        parts += [_described(node) for node in _definitions(module, names)]
        if module == "bitwright.converter":
            parts.append(_OPTIONS + "\n".join(_option_rows()) + "\n")
    return "\n".join(parts)


def _definitions(module: str, names: tuple[str, ...]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    path = ROOT / module.removeprefix("bitwright.").replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    found = {node.name: node for node in nodes if not node.name.startswith("_")}
    yield from (found[name] for name in names or found)


def _described(node: ast.FunctionDef | ast.ClassDef) -> str:
    lines = [f"### {node.name}", ""]
    if isinstance(node, ast.FunctionDef):
        return "\n".join([*lines, "```python", _signature(node), "```", "", _prose(node, _parameters(node)), ""])
    stated = [each for each in node.body if isinstance(each, ast.AnnAssign)]
    methods = [each for each in node.body if isinstance(each, ast.FunctionDef) and not each.name.startswith("_")]
    of_init = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
    names = [ast.unparse(each.target) for each in stated] + [name for each in of_init for name in _parameters(each)]
    lines += [_prose(node, names), ""]
    if stated or methods:
        lines += ["```python", *map(ast.unparse, stated), *map(_signature, methods), "```", ""]
    for method in methods:
        if ast.get_docstring(method):
            lines += [f"**{method.name}**", "", _prose(method, _parameters(method)), ""]
    return "\n".join(lines)


def _parameters(node: ast.FunctionDef) -> list[str]:
    arguments = node.args
    found = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return [each.arg for each in found if each is not None and each.arg != "self" and not each.arg.startswith("_")]


def _signature(node: ast.FunctionDef) -> str:
    """As the source has it, without what is private; a parameter a line where it is long."""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    if any(ast.unparse(each) == "property" for each in node.decorator_list):
        return f"{node.name}:{returns.removeprefix(' ->')}  # a property"
    shown = _parameters(node)
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + [*arguments.defaults]
    parts = [_parameter(each, value) for each, value in zip(positional, defaults, strict=True) if each.arg in shown]
    if arguments.kwonlyargs:
        parts.append("*")
        keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        parts += [_parameter(each, value) for each, value in keywords]
    if arguments.kwarg is not None:
        parts.append(f"**{_parameter(arguments.kwarg, None)}")
    short = f"def {node.name}({', '.join(parts)}){returns}"
    if len(short) <= 100:
        return short
    return "\n".join([f"def {node.name}(", *(f"    {part}," for part in parts), f"){returns}"])


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    annotation = f": {ast.unparse(argument.annotation)}" if argument.annotation is not None else ""
    equals = " = " if annotation else "="
    return (
        f"{argument.arg}{annotation}{equals}{ast.unparse(default)}"
        if default is not None
        else argument.arg + annotation
    )


def _prose(node: ast.FunctionDef | ast.ClassDef, names: Iterable[str]) -> str:
    """The docstring as Markdown. names: what is described as `name: text`, and becomes an item of a list."""
    text = re.sub(r"(?<!`)([*<>|])", r"\\\1", ast.get_docstring(node) or "")
    for match in re.findall(r"`[^`]*`", text):
        text = text.replace(match, match.replace("\\", ""))
    name = "|".join(map(re.escape, names)) or "(?!)"
    text = re.sub(rf"(?:(?<=\n)|(?<=\. )|(?<=; ))((?:{name})(?:, (?:{name}))*): ", r"\n\n- `\1`: ", text)
    text = re.sub(r"\n(?=(?:Raises|Reads|The bytes|Of) )", r"\n\n", text)
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    lines: list[str] = []
    for paragraph in filter(None, paragraphs):
        is_item = paragraph.startswith("- ")
        if lines and not (is_item and lines[-1].startswith("- ")):
            lines.append("")
        lines.append(paragraph.rstrip(";"))
    return "\n".join(lines)


def _option_rows() -> Iterator[str]:
    from bitwright.converter.job.job import Job
    from bitwright.converter.job.options import flag, option_of

    for field in fields(Job):
        described = option_of(field)
        if "convert" not in described.commands or field.name in ("profile", "output", "overrides"):
            continue
        default = "" if field.default is None else f"`{field.default!r}`"
        yield f"| `{field.name}` | `{flag(field)}` | {default} | {described.help.partition(' [default')[0]} |"


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Write nothing; exit with 1 where the page is another.")
def main(check: bool) -> None:
    text = reference()
    if check:
        sys.exit(int(not PAGE.is_file() or PAGE.read_text() != text))
    PAGE.write_text(text)
    click.echo(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
