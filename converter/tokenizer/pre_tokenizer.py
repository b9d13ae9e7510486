"""From the `pre_tokenizer` of a tokenizer.json to the name that llama.cpp has for it (`tokenizer.ggml.pre`).

llama.cpp holds the regular expressions itself and finds them by name. A definition is brought to a normal form, one
line a step, and looked up in pre_tokenizers.toml; nothing is guessed from token ids.
"""

import difflib
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from bitwright.converter.tokenizer.files import objects, steps
from bitwright.formats.errors import ConvertError, nearest

_NFC = {"type": "NFC"}
_COMPOSES = (
    "The tokenizer composes characters first (NFC), llama.cpp does not: text that is not composed gets other tokens."
)

# What a ByteLevel step splits by when its `use_regex` is on: GPT-2's expression.
_GPT2_EXPRESSION = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class PreTokenizer:
    """A pre-tokenizer in normal form.

    steps: the expressions that the text is split by; a step that is no such split is there as tokenizer.json has it.
    ignore_merges: a piece that is a token is taken before any merge.
    """

    steps: tuple[str, ...]
    ignore_merges: bool

    def __str__(self) -> str:
        return "\n    ".join([*self.steps, f"ignore_merges: {str(self.ignore_merges).lower()}"])


@dataclass(frozen=True)
class PreTokenizerName:
    """name: llama.cpp's. notes: what it will do otherwise than tokenizer.json says, a sentence each. older: a name with
    the same expressions that more runtimes know, which does not ignore merges."""

    name: str
    notes: tuple[str, ...] = ()
    older: str | None = None


@cache
def _table() -> tuple[dict[PreTokenizer, PreTokenizerName], list[str]]:
    """The known definitions with llama.cpp's name for each, and every name that llama.cpp loads."""
    table = files("bitwright.converter.tokenizer").joinpath("pre_tokenizers.toml")
    content = tomllib.loads(table.read_text(encoding="utf-8"))
    known = {
        PreTokenizer(tuple(entry["expressions"]), entry["ignore_merges"]): PreTokenizerName(
            entry["name"],
            (f"llama.cpp cuts some text otherwise than this tokenizer: {entry['differs']}.",)
            if "differs" in entry
            else (),
            entry.get("older"),
        )
        for entry in content["definition"]
    }
    return known, content["names"]


def check_name(name: str) -> None:
    """Raise ConvertError unless llama.cpp has a pre-tokenizer of that name."""
    names = _table()[1]
    if name not in names:
        raise ConvertError(
            f"llama.cpp has no pre-tokenizer {name!r}: {nearest(name, names)}",
            "--pre-tokenizer",
            f"choose one of {', '.join(names)}",
        )


def find_name(definition: dict[str, Any], where: str) -> PreTokenizerName:
    """llama.cpp's name for the pre-tokenizer of a parsed tokenizer.json; an unknown one is an error that shows it."""
    found = normal_form(definition, where)
    known, names = _table()
    composes = (_COMPOSES,) if _NFC in steps(definition, "normalizer", where) else ()
    otherwise = PreTokenizer(found.steps, not found.ignore_merges)
    entry = known.get(found)
    newer: tuple[str, ...] = ()
    if (entry is None or entry.older) and otherwise in known and _merges_reach_all_tokens(definition, where):
        if entry is not None:
            newer = (
                f"The file gets the name {entry.older}, which every runtime knows. Newer ones cut more text right with "
                f"--pre-tokenizer {entry.name}; older ones refuse it.",
            )
        entry = known[otherwise]
    if entry is not None:
        return PreTokenizerName(entry.name, entry.notes + newer + composes)
    closest = max(known, key=lambda candidate: difflib.SequenceMatcher(None, str(found), str(candidate)).ratio())
    raise ConvertError(
        f"llama.cpp has no name for this pre-tokenizer:\n    {found}\n"
        f"  the nearest known one is {known[closest].name!r}:\n    {closest}",
        where,
        f"if you know which one it is, say so with --pre-tokenizer NAME, one of {', '.join(names)}",
    )


def normal_form(definition: dict[str, Any], where: str) -> PreTokenizer:
    """The pre-tokenizer of a parsed tokenizer.json: the same for all ways to spell the same thing."""
    # llama.cpp normalises nothing for this kind. NFC leaves composed text as it is.
    pieces = [f"normalizer {one}" for one in steps(definition, "normalizer", where) if one != _NFC]
    *splits, last = steps(definition, "pre_tokenizer", where) or [{}]
    pieces += [_split(step) for step in splits]
    match last:
        # Bytes become letters in the last step, behind all splits, as in llama.cpp.
        case {"type": "ByteLevel", "add_prefix_space": False}:
            pieces += [_GPT2_EXPRESSION] if last.get("use_regex", True) else []
        case _:
            pieces.append(str(last))
    return PreTokenizer(tuple(pieces), bool(definition["model"].get("ignore_merges")))


def merge_pairs(definition: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """The merges of a parsed tokenizer.json by rank: "left right" in older files, ["left", "right"] in newer ones."""
    vocabulary = definition["model"]["vocab"]
    pairs = []
    for merge in definition["model"]["merges"]:
        parts = merge.split(" ", 1) if isinstance(merge, str) else merge
        if type(parts) is not list or len(parts) != 2 or type(parts[0]) is not str or type(parts[1]) is not str:
            raise ConvertError(f"a merge has not two parts: {merge!r}", where, "fetch the file again")
        left, right = parts
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            unknown = next(text for text in (left, right, left + right) if text not in vocabulary)
            raise ConvertError(f"a merge has {unknown!r}, which is no token", where, "fetch the file again")
        pairs.append((left, right))
    return pairs


def _split(step: dict[str, Any]) -> str:
    """The expression that a step splits by, or the step itself when it does something else."""
    match step:
        case {"type": "Digits", "individual_digits": individual}:
            return r"\p{N}" if individual else r"\p{N}+"
        case {"type": "Split", "pattern": {"Regex": str() as regex}, "behavior": str() as behavior}:
            if _isolates(regex, behavior, bool(step.get("invert"))):
                return _printable(regex)
    return str(step)


def _isolates(regex: str, behavior: str, invert: bool) -> bool:
    """Whether the step makes a piece of every match and of every gap between matches, as llama.cpp does.

    "Removed" with `invert` throws the gaps away, which is the same for an expression that leaves none: one of this
    family that ends in both kinds of white space.
    """
    return (behavior == "Isolated" and not invert) or (
        behavior == "Removed" and invert and regex.endswith(r"\s+(?!\S)|\s+")
    )


def _printable(regex: str) -> str:
    """Line ends and tabs as escapes: definitions have them either way."""
    return regex.replace("\r", r"\r").replace("\n", r"\n").replace("\t", r"\t")


def _merges_reach_all_tokens(definition: dict[str, Any], where: str) -> bool:
    """Whether `ignore_merges` makes no difference: every token comes out of the merges of its own letters."""
    from tokenizers.models import BPE

    vocabulary = definition["model"]["vocab"]
    merged = BPE(vocab=vocabulary, merges=merge_pairs(definition, where))
    added = {token.get("content") for token in objects(definition, "added_tokens", where)}
    return all(len(merged.tokenize(token)) == 1 for token in vocabulary if token not in added)
