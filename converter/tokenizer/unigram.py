"""SentencePiece's Unigram as llama.cpp's "t5" kind: from tokenizer.json, or from what transformers makes in its place.

Of all ways to cut a text the one with the greatest sum of scores is taken. Before that characters are replaced by a
table ("charsmap"), and white space becomes one "▁" in front of each word.
"""

import base64
import binascii
import math
from typing import Any

from gguf import TokenType

from bitwright.converter.tokenizer.byte_level_bpe import (
    Vocabulary,
    added_tokens,
    added_type,
    check_added,
    check_ids,
    check_unique,
    no_tokens,
    token_notes,
    usable,
)
from bitwright.converter.tokenizer.files import TokenizerFiles, part, steps
from bitwright.converter.tokenizer.rebuilt import CLASS_TOKENS
from bitwright.formats.errors import ConvertError

_NO_TOKEN_SCORE = -10000.0
_REMEDY = "no GGUF of this tokenizer would cut text into the right tokens"


def is_unigram(files: TokenizerFiles) -> bool:
    where = files.where("tokenizer.json")
    return part(part(files.definition, "model", dict, where) or {}, "type", str, where) == "Unigram"


def unigram_ids(definition: dict[str, Any], where: str) -> dict[str, int]:
    """The id of each token of a Unigram: its place in the list. Raises ConvertError for what is no such list."""
    pieces = part(definition["model"], "vocab", list, where) or []
    for piece in pieces:
        match piece:
            case [str(), (int() | float()) as score] if not isinstance(score, bool) and math.isfinite(score):
                continue
        raise ConvertError(f"{str(piece)[:60]!r} is no token with a score", where, "fetch the file again")
    return {text: index for index, (text, _) in enumerate(pieces)}


def unigram(files: TokenizerFiles, vocab_size: int) -> Vocabulary:
    """Raises ConvertError for steps that llama.cpp does not take, and for damaged files."""
    where = files.where("tokenizer.json")
    model = files.definition["model"]
    ids = unigram_ids(files.definition, where)
    pieces = model.get("vocab") or []
    if not pieces:
        raise ConvertError("the Unigram has no 'vocab' of the usual form", where, "fetch the file again")
    check_ids(ids, vocab_size, where)
    check_added(files, ids)
    unknown = part(model, "unk_id", int, where)
    if unknown is None or not 0 <= unknown < len(pieces):
        raise ConvertError(
            "the tokenizer has no unknown token, which llama.cpp writes where it knows no character",
            f"{where}: model.unk_id",
            "convert a checkpoint whose tokenizer has one",
        )
    steps_taken = _Steps.of(files)
    tokens, types = no_tokens(vocab_size)
    scores = [_NO_TOKEN_SCORE] * vocab_size
    for index, (text, score) in enumerate(pieces):
        tokens[index], types[index], scores[index] = text, TokenType.NORMAL, float(score)
    added, added_notes = usable(added_tokens(files), vocab_size)
    for index, token in added.items():
        tokens[index], types[index] = token["content"], added_type(token["content"], token)
        if index >= len(pieces):
            scores[index] = 0.0
    types[unknown] = TokenType.UNKNOWN
    check_unique(tokens, where)
    notes = [*steps_taken.notes, *added_notes, *token_notes(added.values())]
    if steps_taken.charsmap:
        notes.append(
            "Behind a character that it replaces (², ½, full width) transformers drops joiners and marks; llama.cpp "
            "keeps them, as SentencePiece does."
        )
    if part(model, "byte_fallback", bool, where):
        notes.append("llama.cpp writes one unknown token where this tokenizer writes a character in bytes.")
    return Vocabulary(
        "t5",
        "default",
        tokens,
        types,
        scores=scores,
        add_space_prefix=steps_taken.prefix,
        remove_extra_whitespaces=steps_taken.merges_spaces,
        charsmap=steps_taken.charsmap,
        unknown=unknown,
        notes=tuple(notes),
    )


class _Steps:
    """What is done to a text before it is cut.

    prefix: whether a space is put in front. merges_spaces: whether spaces in a row are one, and those at both ends
    none. charsmap: the table of replacements, empty for none. notes: what llama.cpp does otherwise, a sentence each.
    """

    def __init__(self) -> None:
        self.prefix, self.merges_spaces, self.charsmap = False, False, b""
        self.notes: list[str] = []

    @classmethod
    def of(cls, files: TokenizerFiles) -> "_Steps":
        where, found = files.where("tokenizer.json"), cls()
        splits_words = strips = scheme = None
        normalizers = steps(files.definition, "normalizer", where)
        pre_tokenizers = steps(files.definition, "pre_tokenizer", where)
        if files.tokenizer_class in CLASS_TOKENS:  # which keep the table, and make all else themselves
            normalizers = [step for step in normalizers if step.get("type") == "Precompiled"]
            stated = part(files.settings, "add_prefix_space", bool, files.where("tokenizer_config.json"))
            never = stated is False and files.tokenizer_class == "XLMRobertaTokenizer"
            pre_tokenizers = [
                {"type": "WhitespaceSplit"},
                {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never" if never else "always"},
            ]
        for step in (*normalizers, *pre_tokenizers):
            match step:
                case {"type": "Precompiled", "precompiled_charsmap": str() as text} if not found.charsmap:
                    found.charsmap = _decoded(text, where)
                case {"type": "Precompiled", "precompiled_charsmap": None}:
                    pass
                case {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " " | "▁"}:
                    found.merges_spaces = True
                case {"type": "Strip", "strip_right": True}:
                    strips = True
                case {"type": "WhitespaceSplit"}:
                    splits_words = found.merges_spaces = True
                case {"type": "Metaspace", "replacement": "▁"}:
                    default = "always" if step.get("add_prefix_space", True) else "never"
                    scheme = step.get("prepend_scheme", default)
                case _:
                    raise ConvertError(
                        f"llama.cpp cannot do this step of the tokenizer: {str(step)[:200]}", where, _REMEDY
                    )
        if scheme is None:
            raise ConvertError("the tokenizer does not write spaces as ▁, as llama.cpp does", where, _REMEDY)
        found.prefix = scheme != "never"
        if found.merges_spaces and not found.prefix:
            raise ConvertError(
                "llama.cpp, where it takes spaces in a row for one, puts one in front of a text, and this tokenizer "
                "puts none",
                where,
                _REMEDY,
            )
        if found.merges_spaces and not (splits_words or strips):
            found.notes.append("llama.cpp drops spaces at the end of a text, for which this tokenizer has a token.")
        if scheme == "first":
            found.notes.append(
                "llama.cpp puts a space in front of every text, the tokenizer none behind special and added tokens."
            )
        if splits_words and not found.charsmap:
            found.notes.append(
                "The tokenizer takes all white space for a space; llama.cpp does so for spaces alone, and gets other "
                "tokens where a line ends."
            )
        return found


def _decoded(text: str, where: str) -> bytes:
    """The table of replacements: uint32 the bytes of its tree, the tree, and texts that end with 0 each. llama.cpp
    reads it without looking."""
    try:
        table = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        table = b"?"
    if table and (len(table) < 4 or int.from_bytes(table[:4], "little") + 4 >= len(table)):
        raise ConvertError(
            "the table of replaced characters is damaged", f"{where}: precompiled_charsmap", "fetch the file again"
        )
    return table
