"""From the `pre_tokenizer` of a tokenizer.json to the name that llama.cpp has for it (`tokenizer.ggml.pre`).

llama.cpp holds the regular expressions itself and finds them by name. A definition is brought to a normal form, one
line a step, and looked up in pre_tokenizers.toml; nothing is guessed from token ids.
"""

import difflib
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from formats.errors import ConvertError, nearest

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


@cache
def _table() -> tuple[dict[PreTokenizer, str], list[str]]:
    """The known definitions with llama.cpp's name for each, and every name that llama.cpp loads."""
    content = tomllib.loads(files("converter").joinpath("pre_tokenizers.toml").read_text(encoding="utf-8"))
    known = {
        PreTokenizer(tuple(entry["expressions"]), entry["ignore_merges"]): entry["name"]
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


def find_name(definition: dict, where: str) -> str:
    """llama.cpp's name for the pre-tokenizer of a parsed tokenizer.json; an unknown one is an error that shows it."""
    found = normal_form(definition)
    known, names = _table()
    if found in known:
        return known[found]
    otherwise = PreTokenizer(found.steps, not found.ignore_merges)
    if otherwise in known and _merges_reach_all_tokens(definition, where):
        return known[otherwise]
    closest = max(known, key=lambda candidate: difflib.SequenceMatcher(None, str(found), str(candidate)).ratio())
    raise ConvertError(
        f"llama.cpp has no name for this pre-tokenizer:\n    {found}\n"
        f"  the nearest known one is {known[closest]!r}:\n    {closest}",
        where,
        f"if you know which one it is, say so with --pre-tokenizer NAME, one of {', '.join(names)}",
    )


def normal_form(definition: dict) -> PreTokenizer:
    """The pre-tokenizer of a parsed tokenizer.json: the same for all ways to spell the same thing."""
    # llama.cpp normalises nothing for this kind. NFC leaves composed text as it is; its own converter ignores it too.
    steps = [f"normalizer {one}" for one in flatten(definition.get("normalizer")) if one != {"type": "NFC"}]
    *splits, last = flatten(definition.get("pre_tokenizer")) or [{}]
    steps += [_split(step) for step in splits]
    match last:
        # Bytes become letters in the last step, behind all splits, as in llama.cpp.
        case {"type": "ByteLevel", "add_prefix_space": False}:
            steps += [_GPT2_EXPRESSION] if last.get("use_regex", True) else []
        case _:
            steps.append(str(last))
    return PreTokenizer(tuple(steps), bool(definition["model"].get("ignore_merges")))


def flatten(component: dict | None) -> list[dict]:
    """The steps of a normalizer or pre-tokenizer: of a Sequence, of Sequences in it, of a single step, or of none."""
    if component is None:
        return []
    if component.get("type") != "Sequence":
        return [component]
    parts = component.get("pretokenizers", component.get("normalizers", []))
    return [step for part in parts for step in flatten(part)]


def merge_pairs(definition: dict, where: str) -> list[tuple[str, str]]:
    """The merges of a parsed tokenizer.json by rank: "left right" in older files, ["left", "right"] in newer ones."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in definition["model"]["merges"])
    try:
        return [(left, right) for left, right in pairs]
    except (TypeError, ValueError):
        raise ConvertError("a merge has not two parts", where, "fetch the file again") from None


def _split(step: dict) -> str:
    """The expression that a step splits by, or the step itself when it does something else."""
    match step:
        case {"type": "Digits", "individual_digits": individual}:
            return r"\p{N}" if individual else r"\p{N}+"
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior}:
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
    added = {token["content"] for token in definition.get("added_tokens", [])}
    return all(len(merged.tokenize(token)) == 1 for token in vocabulary if token not in added)
