"""BERT's WordPiece as llama.cpp's "bert" kind.

llama.cpp marks the beginning of a word where BERT marks what goes on: "▁" in front of the one, no "##" in front of the
other. It splits text at white space, punctuation and Chinese characters itself, and puts the first token in front of a
text and the last behind it whatever the file says.
"""

from typing import Any

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
    token_notes,
    usable,
)
from bitwright.converter.tokenizer.files import TokenizerFiles, part, steps
from bitwright.formats.errors import ConvertError

# llama.cpp reads a pre-tokenizer's name for byte-level BPE alone; this is the one that its converter writes.
_PRE = "jina-v2-en"
_CONTINUING = "##"
_WORD_START = "▁"


def is_wordpiece(files: TokenizerFiles) -> bool:
    where = files.where("tokenizer.json")
    return part(part(files.definition, "model", dict, where) or {}, "type", str, where) == "WordPiece"


def wordpiece(files: TokenizerFiles, vocab_size: int) -> Vocabulary:
    """Raises ConvertError for steps that llama.cpp does not take, and for damaged files."""
    where = files.where("tokenizer.json")
    model = files.definition["model"]
    vocabulary = part(model, "vocab", dict, where)
    if not vocabulary:
        raise ConvertError("the WordPiece has no 'vocab' of the usual form", where, "fetch the file again")
    for text, index in vocabulary.items():
        check_token(text, index, where)
    prefix = part(model, "continuing_subword_prefix", str, where)
    if prefix not in (None, _CONTINUING):
        raise _foreign(f"llama.cpp takes {_CONTINUING!r} in front of what goes on in a word, not {prefix!r}", where)
    unknown = part(model, "unk_token", str, where)
    if unknown not in vocabulary:
        raise ConvertError(f"the unknown token {unknown!r} is none of the tokens", where, "fetch the file again")
    check_ids(vocabulary, vocab_size, where)
    check_added(files, vocabulary)
    lowercase, strip_accents, notes = _normalizer(files)
    added, added_notes = usable(added_tokens(files), vocab_size)
    tokens, types = no_tokens(vocab_size)
    for text, index in vocabulary.items():
        tokens[index], types[index] = text, TokenType.NORMAL
    tokens = [text.removeprefix(_CONTINUING) if text.startswith(_CONTINUING) else _WORD_START + text for text in tokens]
    for index, token in added.items():
        tokens[index], types[index] = token["content"], added_type(token["content"], token)
    check_unique(tokens, where)
    longest = part(model, "max_input_chars_per_word", int, where)
    notes.append(
        f"A word of more than {100 if longest is None else longest} characters is one unknown token to the tokenizer; "
        "llama.cpp cuts it into tokens."
    )
    notes += [*added_notes, *token_notes(added.values())]
    return Vocabulary(
        "bert",
        _PRE,
        tokens,
        types,
        lowercase=lowercase,
        strip_accents=strip_accents,
        unknown=vocabulary[unknown],
        notes=tuple(notes),
    )


def _normalizer(files: TokenizerFiles) -> tuple[bool, bool | None, list[str]]:
    """Whether capitals become small letters, whether accents go (None: as capitals do), and what there is to say.

    transformers' BertTokenizer goes by tokenizer_config.json, any other class by tokenizer.json.
    """
    where = files.where("tokenizer.json")
    normalizers, splits = steps(files.definition, "normalizer", where), steps(files.definition, "pre_tokenizer", where)
    stated = normalizers[0] if len(normalizers) == 1 and normalizers[0].get("type") == "BertNormalizer" else None
    if files.tokenizer_class == "BertTokenizer":
        settings, names = files.settings, ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
        place = files.where("tokenizer_config.json")
    elif stated is not None and [step.get("type") for step in splits] == ["BertPreTokenizer"]:
        settings, names = stated, ("lowercase", "strip_accents", "handle_chinese_chars")
        place = where
        if part(stated, "clean_text", bool, where) is False:
            raise _foreign("llama.cpp removes control characters, which this tokenizer keeps", where)
    else:
        shown = str([*normalizers, *splits])[:300]
        raise _foreign(f"llama.cpp cannot do these steps of a WordPiece tokenizer: {shown}", where)
    lowercase, strip_accents, chinese = (part(settings, name, bool, place) for name in names)
    if chinese is False:
        raise _foreign("llama.cpp splits between Chinese characters, this tokenizer does not", f"{place}: {names[2]}")
    lowercase = lowercase is not False
    return (
        lowercase,
        strip_accents,
        _normalizer_notes(lowercase, strip_accents, stated if settings is not stated else None),
    )


def _normalizer_notes(lowercase: bool, strip_accents: bool | None, overruled: dict[str, Any] | None) -> list[str]:
    notes = []
    if overruled and overruled.get("lowercase", lowercase) != lowercase:
        notes.append(
            f"tokenizer.json {'keeps capitals' if lowercase else 'makes capitals small letters'}, "
            "tokenizer_config.json says otherwise; transformers does the latter, and so does the GGUF."
        )
    if not lowercase or strip_accents not in (None, lowercase):
        notes.append(
            "The tokenizer keeps capitals or accents as they are. llama.cpp reads this from the file since 2026; older "
            "ones make capitals small letters and drop accents."
        )
    strips = lowercase if strip_accents is None else strip_accents
    if lowercase and not strips:
        notes.append("llama.cpp makes a small letter of İ that is none of the tokenizer's.")
    if strips:
        notes.append(
            "llama.cpp drops more than accents where this tokenizer drops those: most of a Korean syllable, and vowel "
            "signs of Indian scripts."
        )
    return notes


def _foreign(what: str, where: str) -> ConvertError:
    return ConvertError(what, where, "no GGUF of this tokenizer would cut text into the right tokens")
