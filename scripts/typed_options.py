"""Writes the types of the options that Python takes from the fields of Job, for editors and type checkers:

python -m scripts.typed_options
"""

import ast
import inspect
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, get_origin

from bitwright.converter.job import job as job_module
from bitwright.converter.job.job import Job
from bitwright.converter.job.options import option_of
from bitwright.formats.typed import is_a

TARGET = Path(__file__).parent.parent / "converter" / "typed_options.py"
# Parameters of their own in every function that takes options.
_NAMED = ("model", "profile", "output", "overrides")
_HEAD = '''"""The options that Python takes by name, for editors and type checkers.

Written by `python -m scripts.typed_options` from the fields of converter.job.job.Job, which describe each and decide at
run time. Nothing is to be changed here.
"""

from pathlib import Path
from typing import Literal, TypedDict

'''


def source() -> str:
    """The module as it is to be."""
    tree = ast.parse(inspect.getsource(job_module))
    (job,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == Job.__name__)
    declared = {
        node.target.id: ast.unparse(node.annotation).replace("'", '"')
        for node in job.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    taken = [field for field in fields(Job) if field.name not in _NAMED]
    names = {name for field in taken for name in _names(declared[field.name])}
    imports = [
        f"from {node.module} import {', '.join(kept)}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (kept := sorted(names & {alias.name for alias in node.names}))
        if str(node.module).startswith("bitwright")
    ]
    lines = ["\n".join(imports), "", "", "class Options(TypedDict, total=False):"]
    lines.append('    """As of converter.job.job.Job, where each is described."""\n')
    lines += [f"    {field.name}: {_taken(field, declared[field.name])}" for field in taken]
    return _HEAD + "\n".join(lines) + "\n"


def _names(annotation: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(annotation)) if isinstance(node, ast.Name)}


def _taken(field: "Field[Any]", declared: str) -> str:
    """The field's own type, and what options.given_value makes of other ones."""
    option = option_of(field)
    if get_origin(field.type) is tuple:
        return "str | list[str] | tuple[str, ...]" if option.parse is not None else "list[str] | tuple[str, ...]"
    kinds = [kind for kind in declared.split(" | ") if kind != "None"]
    if (option.parse is not None or is_a(Path(), field.type)) and "str" not in kinds:
        kinds.append("str")
    if option.alone is not None:
        kinds.append("bool")
    return " | ".join([*kinds, *(["None"] if declared.endswith("| None") else [])])


def main() -> None:
    TARGET.write_text(source(), encoding="utf-8")
    print(TARGET)


if __name__ == "__main__":
    main()
