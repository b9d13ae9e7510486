"""From the `pre_tokenizer` of a tokenizer.json to the name that llama.cpp has for it (`tokenizer.ggml.pre`).

llama.cpp holds the regular expressions itself and finds them by name. A definition is brought to a normal form, one
line a step, and looked up in pre_tokenizers.toml; nothing is guessed from token ids.
"""

import difflib
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from converter.tokenizer_files import objects, steps
from formats.errors import ConvertError, nearest

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
    """name: llama.cpp's. notes: what it will do otherwise than tokenizer.json says, a sentence each."""

    name: str
    notes: tuple[str, ...] = ()


@cache
def _table() -> tuple[dict[PreTokenizer, PreTokenizerName], list[str]]:
    """The known definitions with llama.cpp's name for each, and every name that llama.cpp loads."""
    content = tomllib.loads(files("converter").joinpath("pre_tokenizers.toml").read_text(encoding="utf-8"))
    known = {
        PreTokenizer(tuple(entry["expressions"]), entry["ignore_merges"]): PreTokenizerName(
            entry["name"],
            (f"llama.cpp cuts rare text otherwise than this tokenizer: {entry['differs']}.",)
            if "differs" in entry
            else (),
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


def find_name(definition: dict, where: str) -> PreTokenizerName:
    """llama.cpp's name for the pre-tokenizer of a parsed tokenizer.json; an unknown one is an error that shows it."""
    found = normal_form(definition, where)
    known, names = _table()
    composes = (_COMPOSES,) if _NFC in steps(definition, "normalizer", where) else ()
    if found in known:
        return PreTokenizerName(known[found].name, known[found].notes + composes)
    otherwise = PreTokenizer(found.steps, not found.ignore_merges)
    if otherwise in known and _merges_reach_all_tokens(definition, where):
        return PreTokenizerName(known[otherwise].name, known[otherwise].notes + composes)
    closest = max(known, key=lambda candidate: difflib.SequenceMatcher(None, str(found), str(candidate)).ratio())
    raise ConvertError(
        f"llama.cpp has no name for this pre-tokenizer:\n    {found}\n"
        f"  the nearest known one is {known[closest].name!r}:\n    {closest}",
        where,
        f"if you know which one it is, say so with --pre-tokenizer NAME, one of {', '.join(names)}",
    )


def normal_form(definition: dict, where: str) -> PreTokenizer:
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


def merge_pairs(definition: dict, where: str) -> list[tuple[str, str]]:
    """The merges of a parsed tokenizer.json by rank: "left right" in older files, ["left", "right"] in newer ones."""
    vocabulary = definition["model"]["vocab"]
    pairs = []
    for merge in definition["model"]["merges"]:
        match merge.split(" ", 1) if isinstance(merge, str) else merge:
            case [str() as left, str() as right]:
                pairs.append((left, right))
            case _:
                raise ConvertError(f"a merge has not two parts: {merge!r}", where, "fetch the file again")
        unknown = next((text for text in (left, right, left + right) if text not in vocabulary), None)
        if unknown is not None:
            raise ConvertError(f"a merge has {unknown!r}, which is no token", where, "fetch the file again")
    return pairs


def _split(step: dict) -> str:
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


def _merges_reach_all_tokens(definition: dict, where: str) -> bool:
    """Whether `ignore_merges` makes no difference: every token comes out of the merges of its own letters."""
    from tokenizers.models import BPE

    vocabulary = definition["model"]["vocab"]
    merged = BPE(vocab=vocabulary, merges=merge_pairs(definition, where))
    added = {token.get("content") for token in objects(definition, "added_tokens", where)}
    return all(len(merged.tokenize(token)) == 1 for token in vocabulary if token not in added)
