"""SentencePiece's BPE as llama.cpp's "llama" kind: from tokenizer.model, or from a tokenizer.json made of one. Gemma 4
has a kind of its own."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from gguf import TokenType

from bitwright.converter.tokenizer.byte_level_bpe import (
    Vocabulary,
    added_tokens,
    added_type,
    check_added,
    check_ids,
    check_token,
    check_unique,
    no_tokens,
    prefix_contradiction,
    token_notes,
    usable,
)
from bitwright.converter.tokenizer.files import TokenizerFiles, part, steps
from bitwright.converter.tokenizer.pre_tokenizer import merge_pairs
from bitwright.converter.tokenizer.sentencepiece_model import SentencePieceModel
from bitwright.formats.errors import ConvertError

# Scores of llama.cpp's converter for ids without a token, and for tokens that were added after training.
_NO_TOKEN_SCORE, _ADDED_SCORE = -10000.0, -1000.0

# Tokens of Gemma 4 that llama.cpp writes into its answer, for whoever reads the calls of tools in it.
_GEMMA4_VISIBLE = frozenset(
    (
        *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
        '<|"|>',
    )
)

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")

# Where the tokenizer puts a space: nowhere; in front of a text that starts with none; the same for each text between
# special tokens; in front of every text between special tokens, as llama.cpp does.
Prefix = Literal["never", "first", "always", "every"]


def has_byte_fallback(files: TokenizerFiles) -> bool:
    """Whether characters that the BPE of tokenizer.json does not know become byte tokens. transformers' classes for
    SentencePiece's tokenizers turn it on themselves."""
    where = files.where("tokenizer.json")
    return files.tokenizer_class in ("LlamaTokenizer", "GemmaTokenizer") or bool(
        part(files.definition["model"], "byte_fallback", bool, where)
    )


def repeats(files: TokenizerFiles, model: SentencePieceModel) -> bool:
    """Whether tokenizer.json has the tokens of this tokenizer.model, but for those that were added, and finds them as
    the latter does."""
    vocabulary, added = files.definition["model"]["vocab"], added_tokens(files)
    if _merged(files):
        return False
    of_pieces = {piece: index for index, piece in enumerate(model.pieces) if index not in added}
    return all(vocabulary.get(piece, index) == index for piece, index in of_pieces.items()) and all(
        index < len(model.pieces) or index in added for index in vocabulary.values()
    )


def sentencepiece(files: TokenizerFiles, model: SentencePieceModel, vocab_size: int) -> Vocabulary:
    """SentencePiece's BPE from its own file, with its scores.

    Added tokens of added_tokens.json are overridden by those of the two other JSON files, which are newer.
    """
    where = files.where("tokenizer.model")
    if not files.definition:
        _check_settings(model, where)
    pieces = {piece: index for index, piece in enumerate(model.pieces)}
    check_ids(pieces, vocab_size, where)
    newer = added_tokens(files)
    legacy = {text: index for text, index in legacy_added_tokens(files).items() if index not in newer}
    check_added(files, files.definition["model"]["vocab"] if files.definition else pieces, legacy)
    tokens, types = no_tokens(vocab_size)
    scores = [_NO_TOKEN_SCORE] * vocab_size
    n_pieces = len(model.pieces)
    tokens[:n_pieces], types[:n_pieces], scores[:n_pieces] = model.pieces, model.types, model.scores
    for index, kind in enumerate(model.types):
        if kind == TokenType.USER_DEFINED:
            tokens[index] = _as_in_text(tokens[index])
    added, notes = usable({index: {"content": text} for text, index in legacy.items()}, vocab_size)
    for index, token in added.items():
        tokens[index], types[index], scores[index] = token["content"], TokenType.USER_DEFINED, _ADDED_SCORE
    notes += _sentencepiece_notes(files, model)
    return _finished(files, model.add_dummy_prefix, tokens, types, scores, where, notes)


def byte_fallback(files: TokenizerFiles, vocab_size: int) -> Vocabulary:
    """SentencePiece's BPE in a tokenizer.json, which has merges in the place of scores.

    llama.cpp merges the two neighbours that make the token of the best score. So that this is the pair of the first
    merge, a token's score is minus the rank of the first merge that makes it.
    """
    where = files.where("tokenizer.json")
    merges = merge_pairs(files.definition, where)
    rank: dict[str, int] = {}
    for order, (left, right) in enumerate(merges):
        rank.setdefault(left + right, order)
    vocabulary = files.definition["model"]["vocab"]
    check_ids(vocabulary, vocab_size, where)
    check_added(files, vocabulary)
    tokens, types = no_tokens(vocab_size)
    scores = [_NO_TOKEN_SCORE] * vocab_size
    for text, index in vocabulary.items():
        tokens[index] = text
        is_byte = text.startswith("<0x") and _BYTE_TOKEN.fullmatch(text)
        types[index] = TokenType.BYTE if is_byte else TokenType.NORMAL
        scores[index] = -float(rank.get(text, len(merges)))
    return _finished(files, None, tokens, types, scores, where, [])


def is_gemma4(files: TokenizerFiles) -> bool:
    """Whether the model is one of Gemma 4's, with merges to go by."""
    model_type = part(files.config, "model_type", str, files.where("config.json")) or ""
    return model_type == "gemma4" or model_type.startswith("gemma4_")


def gemma4(files: TokenizerFiles, vocab_size: int) -> Vocabulary:
    """Gemma 4's BPE with byte fallback, which llama.cpp runs by its merges; scores say nothing there."""
    merges = merge_pairs(files.definition, files.where("tokenizer.json"))
    found = byte_fallback(files, vocab_size)
    if found.add_space_prefix is not False:
        raise _foreign(
            "llama.cpp puts no space in front of a text of Gemma 4, this tokenizer does", files.where("tokenizer.json")
        )
    types = [
        TokenType.USER_DEFINED if text in _GEMMA4_VISIBLE else kind
        for text, kind in zip(found.tokens, found.types, strict=True)
    ]
    return replace(
        found,
        model="gemma4",
        pre=None,
        types=types,
        scores=[_ADDED_SCORE] * len(types),
        merges=[f"{left} {right}" for left, right in merges],
    )


def _merged(files: TokenizerFiles) -> dict[int, dict[str, Any]]:
    """Added tokens of tokenizer.json that no text shows, because spaces become ▁ later: only merges make them. Gemma's
    runs of spaces are such, which its tokenizer.model has as symbols."""
    vocabulary = (part(files.definition, "model", dict, files.where("tokenizer.json")) or {}).get("vocab", {})
    return {
        index: token
        for index, token in added_tokens(files).items()
        if "▁" in token["content"]
        and token.get("normalized") is False
        and not token.get("special")
        and token["content"] in vocabulary
    }


def legacy_added_tokens(files: TokenizerFiles) -> dict[str, int]:
    """added_tokens.json: the id of each text."""
    for text, index in files.added_tokens.items():
        check_token(text, index, files.where("added_tokens.json"))
    return files.added_tokens


def _finished(
    files: TokenizerFiles,
    asked: bool | None,
    tokens: list[str],
    types: list[TokenType],
    scores: list[float],
    where: str,
    notes: list[str],
) -> Vocabulary:
    """The vocabulary with its added tokens, checked. asked: whether tokenizer.model wants a space in front."""
    added, added_notes = usable(added_tokens(files), len(tokens))
    merged = _merged(files) if files.definition else {}
    added = {index: token for index, token in added.items() if index not in merged}
    for index, token in added.items():
        text = token["content"]
        types[index], scores[index] = added_type(text, token), _ADDED_SCORE
        tokens[index] = _as_in_text(text) if types[index] == TokenType.USER_DEFINED else text
    check_unique(tokens, where)
    _check_bytes(tokens, where)
    prefix = _prefix(files)
    notes = [*notes, *added_notes, *_prefix_notes(files, prefix, asked), *token_notes(added.values())]
    stated = part(files.settings, "add_prefix_space", bool, files.where("tokenizer_config.json"))
    # Absent, llama.cpp puts one.
    written = None if prefix != "never" and stated is None else prefix != "never"
    return Vocabulary("llama", "default", tokens, types, scores=scores, add_space_prefix=written, notes=tuple(notes))


def _as_in_text(text: str) -> str:
    """llama.cpp looks for USER_DEFINED tokens in the text as it was before spaces became ▁."""
    return text.replace("▁", " ")


def _check_settings(model: SentencePieceModel, where: str) -> None:
    if model.foreign:
        raise _foreign(f"llama.cpp cannot do what this model of SentencePiece does: {', '.join(model.foreign)}", where)


def _check_bytes(tokens: list[str], where: str) -> None:
    """llama.cpp writes a character without a token in bytes, and ends its process where such a token is missing."""
    known = set(tokens)
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in known and (byte > 127 or chr(byte) not in known)]
    if missing:
        raise ConvertError(
            f"the tokenizer has no byte tokens ({len(missing)} of 256 are missing, the first is <0x{missing[0]:02X}>): "
            "llama.cpp would end at the first character that it does not know",
            where,
            "convert a checkpoint whose tokenizer was made with byte_fallback",
        )


def _sentencepiece_notes(files: TokenizerFiles, model: SentencePieceModel) -> list[str]:
    if files.definition or not model.remove_extra_whitespaces:
        return []
    return [
        "tokenizer.model has remove_extra_whitespaces = true; neither transformers nor llama.cpp removes any, so that "
        "several in a row get other tokens than SentencePiece makes."
    ]


def _prefix(files: TokenizerFiles) -> Prefix:
    """Where transformers puts a space. Raises ConvertError for steps of tokenizer.json that llama.cpp does not take."""
    of_definition = _prefix_of_steps(files) if files.definition else "never"
    if files.tokenizer_class == "LlamaTokenizer":
        where = files.where("tokenizer_config.json")
        if part(files.settings, "add_prefix_space", bool, where) is False:
            return "never"
        return "always" if part(files.settings, "legacy", bool, where) else "first"
    return "never" if files.tokenizer_class == "GemmaTokenizer" else of_definition


def _prefix_of_steps(files: TokenizerFiles) -> Prefix:
    where, definition = files.where("tokenizer.json"), files.definition
    prefix: Prefix = "never"
    escapes_spaces = False
    for step in [*steps(definition, "normalizer", where), *steps(definition, "pre_tokenizer", where)]:
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = "every"
            case {"type": "Metaspace", "replacement": "▁"} if not _splits_words(step, definition):
                escapes_spaces = True
                default = "always" if step.get("add_prefix_space", True) else "never"
                scheme = step.get("prepend_scheme", default)
                if prefix == "never" and scheme in ("first", "always"):
                    prefix = scheme
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                escapes_spaces = True
            case {"type": "Split", "pattern": {"String": " "} | {"Regex": " "}} if escapes_spaces:
                pass  # no space is left to split at
            case _:
                raise _foreign(f"llama.cpp cannot do this step of the tokenizer: {step}", where)
    if not escapes_spaces:
        raise _foreign("the tokenizer does not write spaces as ▁, as llama.cpp does", where)
    return prefix


def _foreign(what: str, where: str) -> ConvertError:
    return ConvertError(what, where, "no GGUF of this tokenizer would cut text into the right tokens")


def _splits_words(metaspace: dict[str, Any], definition: dict[str, Any]) -> bool:
    """Whether the step keeps tokens apart that llama.cpp, which never splits, would merge."""
    return metaspace.get("split", True) and any("▁" in text[1:] for text in definition["model"]["vocab"])


def _prefix_notes(files: TokenizerFiles, prefix: Prefix, asked: bool | None) -> Iterator[str]:
    stated = part(files.settings, "add_prefix_space", bool, files.where("tokenizer_config.json"))
    if stated is not None and stated != (prefix != "never"):
        other = "tokenizer.json" if files.definition else f"transformers' {files.tokenizer_class}"
        yield prefix_contradiction(stated, other)
    elif not files.definition and asked is not None and asked != (prefix != "never"):
        yield (
            f"tokenizer.model has add_dummy_prefix = {str(asked).lower()}, but transformers, which finds no "
            f"tokenizer.json, puts {'no space' if asked else 'a space'} in front of a text; so does the GGUF."
        )
    if prefix in ("first", "always"):
        yield (
            "llama.cpp puts a space in front of every text, the tokenizer in front of one that starts with none only"
            + (", and none behind special and added tokens." if prefix == "first" else ".")
        )
