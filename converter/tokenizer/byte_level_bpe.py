"""A vocabulary as llama.cpp wants it: what both kinds share, and byte-level BPE."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import TokenType

from bitwright.converter.tokenizer.files import TokenizerFiles, objects, part, steps
from bitwright.converter.tokenizer.pre_tokenizer import PreTokenizerName, merge_pairs
from bitwright.formats.errors import ConvertError

# Classes of transformers that take `add_prefix_space` from tokenizer_config.json, whatever tokenizer.json says.
_PREFIXING_CLASSES = (
    *("CohereTokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer", "Qwen3_5Tokenizer", "RobertaTokenizer"),
)
# What tokenizer.json may say of an added token, and what comes of it.
_TOKEN_SETTINGS = {
    "lstrip": "white space before them gets tokens of its own",
    "rstrip": "white space behind them gets tokens of its own",
    "single_word": "they are found inside of words, too",
}
_NAMED_IN_A_NOTE = 5
_LONGEST_ID = 20  # digits


@dataclass(frozen=True)
class Vocabulary:
    """model, pre: `tokenizer.ggml.model` and `.pre`. tokens, types and scores go by token id, merges by rank.
    remove_extra_whitespaces, charsmap: of a Unigram, what is done to a text before. lowercase, strip_accents: the same
    of a WordPiece. unknown: the token of both for what they do not know.
    notes: what llama.cpp will do otherwise than the tokenizer, a sentence each."""

    model: str
    pre: str | None
    tokens: list[str]
    types: list[TokenType]
    scores: list[float] | None = None
    merges: list[str] | None = None
    add_space_prefix: bool | None = None
    remove_extra_whitespaces: bool | None = None
    charsmap: bytes = b""
    lowercase: bool | None = None
    strip_accents: bool | None = None
    unknown: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def of_encoder(self) -> bool:
        """Whether the kind is one of models that read a text and write none."""
        return self.model in ("bert", "t5")


def is_byte_level(files: TokenizerFiles) -> bool:
    """Whether tokenizer.json is a BPE over bytes (GPT-2's kind)."""
    where = files.where("tokenizer.json")
    return is_bpe(files) and any(step.get("type") == "ByteLevel" for step in steps(files.definition, "decoder", where))


def is_bpe(files: TokenizerFiles) -> bool:
    where = files.where("tokenizer.json")
    return part(part(files.definition, "model", dict, where) or {}, "type", str, where) == "BPE"


def check_parts(files: TokenizerFiles) -> None:
    """Raise ConvertError unless the BPE of tokenizer.json has merges, a vocabulary of ids, and no parts that llama.cpp
    does not have."""
    where = files.where("tokenizer.json")
    model = files.definition["model"]
    for key, kind in (("vocab", dict), ("merges", list)):
        if not isinstance(model.get(key), kind) or not model[key]:
            raise ConvertError(f"the BPE has no {key!r} of the usual form", where, "fetch the file again")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise ConvertError(
                f"llama.cpp has no {key}, and this BPE has {model[key]!r}",
                f"{where}: model",
                "no GGUF of this tokenizer would cut text into the right tokens",
            )
    for text, index in model["vocab"].items():
        check_token(text, index, where)


def check_token(text: object, index: object, where: str) -> None:
    """Raise ConvertError unless this is a text and an id."""
    if type(text) is not str or type(index) is not int or index < 0:
        raise ConvertError(f"{text!r} with the id {index!r} is no token", where, "fetch the file again")


def check_ids(texts: Mapping[str, int], vocab_size: int, where: str) -> None:
    """Raise ConvertError for ids that the model has no embedding for."""
    beyond = {text: index for text, index in texts.items() if index >= vocab_size}
    if not beyond:
        return
    text, index = max(beyond.items(), key=lambda item: item[1])
    raise ConvertError(
        f"the tokenizer has the token id {index} ({text!r}), but the model has embeddings for {vocab_size} tokens only "
        f"(tokens beyond: {len(beyond)})",
        where,
        "put the tokenizer that belongs to this model into the directory",
    )


def usable(added: Mapping[int, dict[str, Any]], vocab_size: int) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """The added tokens that the model has embeddings for, and what there is to say of the others: a tokenizer may be
    that of a family of models, of which some have fewer tokens."""
    beyond = {index: token["content"] for index, token in added.items() if index >= vocab_size}
    note = (
        f"The model has embeddings for {vocab_size} tokens only, and cannot use added tokens that are left out: "
        f"{_few([f'{text} ({index})' for index, text in beyond.items()])}."
    )
    return {index: token for index, token in added.items() if index < vocab_size}, [note] if beyond else []


def _few(names: Sequence[str]) -> str:
    """The first of the names, and how many more there are."""
    more = len(names) - _NAMED_IN_A_NOTE
    return ", ".join(names[:_NAMED_IN_A_NOTE]) + (f" and {more} more" if more > 0 else "")


def byte_level(files: TokenizerFiles, vocab_size: int, pre: PreTokenizerName) -> Vocabulary:
    """A BPE over bytes: letters stand for bytes, but an added token is text as it is."""
    where = files.where("tokenizer.json")
    definition = files.definition
    indices = definition["model"]["vocab"]
    check_ids(indices, vocab_size, where)
    check_added(files, indices)
    added, added_notes = usable(added_tokens(files), vocab_size)
    tokens, types = no_tokens(vocab_size)
    for text, index in indices.items():
        tokens[index], types[index] = text, TokenType.NORMAL
    for index, token in added.items():
        text = token["content"] if token.get("normalized") else _decode_bytes(token["content"])
        tokens[index], types[index] = text, added_type(text, token)
    check_unique(tokens, where)
    space = chr(256 + ord(" "))  # the letter of that byte, because a plain space parts the two sides of a merge
    merges = [
        f"{left.replace(' ', space)} {right.replace(' ', space)}" for left, right in merge_pairs(definition, where)
    ]
    prefix, prefix_notes = _letters_prefix(files)
    notes = (*pre.notes, *prefix_notes, *added_notes, *token_notes(added.values()))
    return Vocabulary("gpt2", pre.name, tokens, types, merges=merges, add_space_prefix=prefix, notes=notes)


def _letters_prefix(files: TokenizerFiles) -> tuple[bool | None, list[str]]:
    """`add_space_prefix` of a byte-level BPE, whose tokenizer.json asks for no space, and what there is to say."""
    where = files.where("tokenizer_config.json")
    stated = part(files.settings, "add_prefix_space", bool, where)
    if not stated:
        return stated, []
    if files.tokenizer_class in _PREFIXING_CLASSES:
        raise ConvertError(
            "llama.cpp cannot put a space in front of the text of a byte-level BPE, as this tokenizer does",
            f"{where}: add_prefix_space",
            "no GGUF of this tokenizer would cut text into the right tokens",
        )
    return False, [prefix_contradiction(True, "tokenizer.json")]


def prefix_contradiction(stated: bool, other: str) -> str:
    does, does_not = f"{other} puts one", f"{other} puts none"
    return (
        f"tokenizer_config.json has add_prefix_space = {str(stated).lower()}, but {does_not if stated else does} in "
        "front of a text; transformers does the latter, and so does the GGUF."
    )


def added_tokens(files: TokenizerFiles) -> dict[int, dict[str, Any]]:
    """Added tokens by id: those of tokenizer_config.json, and of tokenizer.json, which is the one that runs."""
    return dict((*_of_settings(files), *_of_definition(files)))


def _of_settings(files: TokenizerFiles) -> Iterator[tuple[int, dict[str, Any]]]:
    where = files.where("tokenizer_config.json")
    for key, token in (part(files.settings, "added_tokens_decoder", dict, where) or {}).items():
        if not isinstance(token, dict) or not (key.isdecimal() and len(key) < _LONGEST_ID):
            raise ConvertError(f"{token!r} with the id {key!r} is no token", where, "fetch the file again")
        check_token(token.get("content"), int(key), where)
        yield int(key), token


def _of_definition(files: TokenizerFiles) -> Iterator[tuple[int, dict[str, Any]]]:
    where = files.where("tokenizer.json")
    for token in objects(files.definition, "added_tokens", where):
        check_token(token.get("content"), token.get("id"), where)
        yield token["id"], token


def check_added(files: TokenizerFiles, vocabulary: Mapping[str, int], legacy: Mapping[str, int] | None = None) -> None:
    """Raise ConvertError for an added token with another id than it gets: transformers does not go by the ids that are
    stated. A token of the vocabulary keeps its id; others follow on the vocabulary, one after another.

    vocabulary: ids of the model's own tokens. legacy: what added_tokens.json has.
    """
    stated = [("tokenizer.json", index, token["content"]) for index, token in _of_definition(files)]
    settings = sorted(_of_settings(files), key=lambda entry: entry[0])
    stated += [("tokenizer_config.json", index, token["content"]) for index, token in settings]
    old = sorted((legacy or {}).items(), key=lambda entry: entry[1])
    stated += [("added_tokens.json", index, text) for text, index in old]
    given: dict[str, int] = {}
    following = len(vocabulary)
    for name, index, text in stated:
        if text not in given:
            given[text] = vocabulary.get(text, following)
            following = max(following, given[text] + 1)
        if given[text] != index:
            own = next((own for own, taken in (*vocabulary.items(), *given.items()) if taken == index), None)
            taken = "" if own in (None, text) else f", which is that of the token {own!r}"
            raise ConvertError(
                f"the added token {text!r} is stated with the id {index}{taken}; transformers gives it the id"
                f" {given[text]}",
                files.where(name),
                "fetch the tokenizer's files again, or save them again where the model was trained",
            )


def added_type(text: str, token: Mapping[str, Any]) -> TokenType:
    """llama.cpp finds CONTROL tokens in a text only when it is asked to, USER_DEFINED ones always."""
    return TokenType.CONTROL if token.get("special") or _looks_special(text) else TokenType.USER_DEFINED


def token_notes(added: Collection[Mapping[str, Any]]) -> list[str]:
    """What a GGUF cannot say of added tokens: one sentence a setting, which names the tokens."""
    notes = []
    for setting, consequence in _TOKEN_SETTINGS.items():
        names = [token["content"] for token in added if token.get(setting)]
        if names:
            notes.append(
                f"A GGUF has no place for the `{setting}` of added tokens, so that {consequence}: {_few(names)}."
            )
    return notes


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


def no_tokens(vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """The tokens of ids that no file names, and their types."""
    return [f"[PAD{index}]" for index in range(vocab_size)], [TokenType.UNUSED] * vocab_size


def check_unique(tokens: list[str], where: str) -> None:
    """Raise ConvertError for two ids with one text."""
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
