"""The three kinds of vocabulary: tokens with their types and scores or merges, as llama.cpp wants them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf import TokenType

from converter import sentencepiece_model
from converter.pre_tokenizer import flatten, merge_pairs
from formats.errors import ConvertError

# Scores of llama.cpp's converter for ids without a token, and for tokens that were added after training.
_NO_TOKEN_SCORE, _ADDED_SCORE = -10000.0, -1000.0

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class Vocabulary:
    """model, pre: `tokenizer.ggml.model` and `.pre`. tokens, types and scores go by token id, merges by rank."""

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    scores: list[float] | None = None
    merges: list[str] | None = None
    add_space_prefix: bool | None = None


def is_byte_level(definition: dict) -> bool:
    """Whether a parsed tokenizer.json is a BPE over bytes (GPT-2's kind)."""
    decoder = definition.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    return _model(definition).get("type") == "BPE" and any(step.get("type") == "ByteLevel" for step in steps)


def has_byte_fallback(definition: dict) -> bool:
    """Whether a parsed tokenizer.json is a BPE over characters, with byte tokens for those it does not know."""
    return _model(definition).get("type") == "BPE" and bool(_model(definition).get("byte_fallback"))


def _model(definition: dict) -> dict:
    return definition.get("model") or {}


def check_parts(definition: dict, where: str) -> None:
    """Raise ConvertError unless the BPE of a parsed tokenizer.json has merges and a vocabulary of ids."""
    for part, kind in (("vocab", dict), ("merges", list)):
        if not isinstance(_model(definition).get(part), kind) or not _model(definition)[part]:
            raise ConvertError(f"the BPE has no {part!r} of the usual form", where, "fetch the file again")
    for text, index in _model(definition)["vocab"].items():
        _check_id(text, index, where)


def _check_id(text: object, index: object, where: str) -> None:
    if not isinstance(text, str) or not isinstance(index, int) or index < 0:
        raise ConvertError(f"{text!r} with the id {index!r} is no token", where, "fetch the file again")


def byte_level(definition: dict, settings: dict, vocab_size: int, pre: str, where: str) -> Vocabulary:
    """A BPE over bytes: letters stand for bytes, but an added token is text as it is."""
    added = _added_tokens(definition, settings, where)
    indices = definition["model"]["vocab"]
    if (largest := max([*indices.values(), *added])) >= vocab_size:
        raise ConvertError(
            f"the tokenizer has the token id {largest}, but the model has embeddings for {vocab_size} tokens only",
            where,
            "put the tokenizer that belongs to this model into the directory",
        )
    tokens, types = _no_tokens(vocab_size)
    for text, index in indices.items():
        tokens[index], types[index] = text, TokenType.NORMAL
    for index, token in added.items():
        text = token["content"] if token.get("normalized") else _decode_bytes(token["content"])
        tokens[index], types[index] = text, _added_type(text, token)
    _check_unique(tokens, where)
    space = chr(256 + ord(" "))  # the letter of that byte, because a plain space parts the two sides of a merge
    merges = [
        f"{left.replace(' ', space)} {right.replace(' ', space)}" for left, right in merge_pairs(definition, where)
    ]
    return Vocabulary("gpt2", pre, tokens, types, merges=merges, add_space_prefix=settings.get("add_prefix_space"))


def sentencepiece(
    model_file: Path, definition: dict, settings: dict, added_texts: Mapping[str, int], vocab_size: int
) -> Vocabulary:
    """SentencePiece's BPE from its own file. Ids from vocab_size on are left out, as llama.cpp's converter does.

    added_texts: the content of added_tokens.json; the two other JSON files are newer and override it.
    """
    model = sentencepiece_model.read(model_file)
    where = str(model_file.parent)
    tokens, types = _no_tokens(vocab_size)
    scores = [_NO_TOKEN_SCORE] * vocab_size
    n_pieces = min(len(model.pieces), vocab_size)
    tokens[:n_pieces] = model.pieces[:n_pieces]
    types[:n_pieces] = model.types[:n_pieces]
    scores[:n_pieces] = model.scores[:n_pieces]
    for text, index in added_texts.items():
        _check_id(text, index, where)
        if index < vocab_size:
            tokens[index], types[index], scores[index] = text, TokenType.USER_DEFINED, _ADDED_SCORE
    _put_added(_added_tokens(definition, settings, where), tokens, types, scores)
    _check_unique(tokens, where)
    prefix = settings.get("add_prefix_space")
    if prefix is None and not model.add_dummy_prefix:
        prefix = False
    return Vocabulary("llama", "default", tokens, types, scores=scores, add_space_prefix=prefix)


def byte_fallback(definition: dict, settings: dict, vocab_size: int, where: str) -> Vocabulary:
    """SentencePiece's BPE in a tokenizer.json, which has merges in the place of scores.

    llama.cpp merges the two neighbours that make the token of the best score. So that this is the pair of the first
    merge, a token's score is minus the rank of the first merge that makes it.
    """
    merges = merge_pairs(definition, where)
    rank: dict[str, int] = {}
    for order, (left, right) in enumerate(merges):
        rank.setdefault(left + right, order)
    tokens, types = _no_tokens(vocab_size)
    scores = [_NO_TOKEN_SCORE] * vocab_size
    for text, index in definition["model"]["vocab"].items():
        if index < vocab_size:
            tokens[index] = text
            types[index] = TokenType.BYTE if _BYTE_TOKEN.fullmatch(text) else TokenType.NORMAL
            scores[index] = -float(rank.get(text, len(merges)))
    _put_added(_added_tokens(definition, settings, where), tokens, types, scores)
    _check_unique(tokens, where)
    prefix = settings.get("add_prefix_space")
    if not _adds_space_prefix(definition, where) and prefix is None:
        prefix = False
    return Vocabulary("llama", "default", tokens, types, scores=scores, add_space_prefix=prefix)


def _adds_space_prefix(definition: dict, where: str) -> bool:
    """Whether the text gets a space in front. Raises ConvertError for steps that llama.cpp does not take."""
    adds_prefix = escapes_spaces = False
    for step in [*flatten(definition.get("normalizer")), *flatten(definition.get("pre_tokenizer"))]:
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                adds_prefix = True
            case {"type": "Metaspace", "replacement": "▁"} if not _splits_words(step, definition):
                escapes_spaces = True
                default = "always" if step.get("add_prefix_space", True) else "never"
                adds_prefix |= step.get("prepend_scheme", default) != "never"
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                escapes_spaces = True
            case {"type": "Split", "pattern": {"String": " "} | {"Regex": " "}} if escapes_spaces:
                pass  # no space is left to split at
            case _:
                raise _foreign(f"llama.cpp cannot do this step of the tokenizer: {step}", where)
    if not escapes_spaces:
        raise _foreign("the tokenizer does not write spaces as ▁, as llama.cpp does", where)
    return adds_prefix


def _foreign(what: str, where: str) -> ConvertError:
    return ConvertError(what, where, "add the tokenizer.model that the tokenizer was made from, if there is one")


def _splits_words(metaspace: dict, definition: dict) -> bool:
    """Whether the step keeps tokens apart that llama.cpp, which never splits, would merge."""
    return metaspace.get("split", True) and any("▁" in text[1:] for text in definition["model"]["vocab"])


def _added_tokens(definition: dict, settings: dict, where: str) -> dict[int, dict]:
    """Added tokens by id: those of tokenizer_config.json, and of tokenizer.json, which is the one that runs."""
    listed = [{**token, "id": int(index)} for index, token in (settings.get("added_tokens_decoder") or {}).items()]
    added = [*listed, *(definition.get("added_tokens") or [])]
    for token in added:
        _check_id(token.get("content"), token.get("id"), where)
    return {token["id"]: token for token in added}


def _put_added(added: dict[int, dict], tokens: list[str], types: list[TokenType], scores: list[float]) -> None:
    for index, token in added.items():
        if index < len(tokens):
            text = token["content"]
            types[index], scores[index] = _added_type(text, token), _ADDED_SCORE
            # llama.cpp looks for these in the text as it was before spaces became ▁.
            tokens[index] = text.replace("▁", " ") if types[index] == TokenType.USER_DEFINED else text


def _added_type(text: str, token: dict) -> TokenType:
    """llama.cpp finds CONTROL tokens in a text only when it is asked to, USER_DEFINED ones always."""
    return TokenType.CONTROL if token.get("special") or _looks_special(text) else TokenType.USER_DEFINED


def _looks_special(text: str) -> bool:
    """Control tokens that some checkpoints (command-r, deepseek-coder, gemma) forgot to mark as special."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _byte_letters() -> dict[str, int]:
    """GPT-2's alphabet: the letter that stands for each byte; printable Latin-1 stands for itself."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_letters()


def _decode_bytes(text: str) -> str:
    """What the byte-level decoder makes of an added token: text, if all its letters stand for bytes of text."""
    try:
        return bytes(_BYTES[letter] for letter in text).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return text


def _no_tokens(vocab_size: int) -> tuple[list[str], list[TokenType]]:
    return [f"[PAD{index}]" for index in range(vocab_size)], [TokenType.UNUSED] * vocab_size


def _check_unique(tokens: list[str], where: str) -> None:
    if len(set(tokens)) == len(tokens):
        return
    first: dict[str, int] = {}
    for index, text in enumerate(tokens):
        if first.setdefault(text, index) != index:
            raise ConvertError(
                f"the tokens {first[text]} and {index} have the same text {text!r}, which llama.cpp refuses to load",
                where,
                "rename or remove one of the two",
            )
