"""The front matter of model cards: somebody else's YAML, read as a tree, so that what is small stays small."""

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from bitwright.formats.errors import ConvertError
from bitwright.formats.files.regular_file import read_whole

LARGEST_CARD_BYTES = 1 << 20
# Of a number; of base 60, as YAML has them, a long one takes minutes.
_MOST_DIGITS = 400
# What becomes a list of texts: of an artifact, and of a card about it.
_LISTED = ("tags", "pipeline_tag", "language", "languages")


class SenselessFrontMatter(ValueError):
    """Front matter that cannot be read, or whose entries are not of their kinds; a line says why."""


class _TreeLoader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML declares no types
    """Refuses anchors and aliases: with them some hundred bytes stand for more than any memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(problem="it has anchors or aliases", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def compose_scalar_node(self, anchor: dict[Any, yaml.Node]) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and len(node.value) > _MOST_DIGITS:
            raise yaml.MarkedYAMLError(problem="it has a number without end", problem_mark=node.start_mark)
        return node


def parse_front_matter(text: str) -> dict[str, Any]:
    """The entries of the YAML between a card's first lines of hyphens. Raises SenselessFrontMatter."""
    try:
        entries = yaml.load(text, Loader=_TreeLoader)
    # What is no date or no number, cannot be a key, or is nested too deeply.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise SenselessFrontMatter(" ".join(str(error).split())) from None
    if entries is None:
        return {}
    if not isinstance(entries, dict):
        raise SenselessFrontMatter("it has no entries")
    return entries


def read_front_matter(path: Path) -> dict[str, Any]:
    """The entries of a model's README.md, found in it as gguf finds them; none where there is no such file, or no front
    matter in it. Raises SenselessFrontMatter."""
    if not path.is_file():
        return {}
    try:
        first, *lines = read_whole(path, LARGEST_CARD_BYTES).decode().splitlines() or [""]
    except ConvertError as error:
        raise SenselessFrontMatter(error.what) from None
    except UnicodeDecodeError:
        raise SenselessFrontMatter("it is no UTF-8") from None
    if first != "---":
        return {}
    text = "\n".join(lines[: lines.index("---")] if "---" in lines else lines) + "\n"
    # The language code of Norwegian is meant, and indents are meant to be of spaces.
    entries = parse_front_matter(text.replace("- no\n", '- "no"\n').replace("\t", "  "))
    for key in _LISTED:
        if not is_listable(entries.get(key)):
            raise SenselessFrontMatter(f"{key} is no text and no list of texts")
    return entries


def is_listable(value: object) -> bool:
    """Whether the value is a scalar, or a list of scalars."""
    return all(_is_scalar(item) for item in (value if isinstance(value, list) else [value]))


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | date)


def front_matter_file(entries: Mapping[str, Any]) -> str:
    """A README.md of these entries alone."""
    return f"---\n{yaml.safe_dump(dict(entries), sort_keys=False, width=float('inf'))}---\n"
