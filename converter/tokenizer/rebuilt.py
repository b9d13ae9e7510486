"""The tokenizer's files of a checkpoint, and what transformers makes of those without a tokenizer.json.

    vocab.txt                                 WordPiece (BERT)
    SentencePiece's file of the kind Unigram  T5's and XLM-R's tokens, by the class that transformers takes

Either becomes the content of a tokenizer.json, so that one way leads on from there.
"""

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

from gguf import TokenType

from bitwright.converter.tokenizer.files import TokenizerFiles, part
from bitwright.converter.tokenizer.sentencepiece_model import SentencePieceModel
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.regular_file import LARGEST_METADATA_BYTES, read_whole

# The special tokens of a class of transformers where tokenizer_config.json names none.
_BERT_TOKENS = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
_XLMR_TOKENS = {
    **{"bos": "<s>", "eos": "</s>", "sep": "</s>", "cls": "<s>"},
    **{"unk": "<unk>", "pad": "<pad>", "mask": "<mask>"},
}
_T5_TOKENS = {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
CLASS_TOKENS = {"BertTokenizer": _BERT_TOKENS, "XLMRobertaTokenizer": _XLMR_TOKENS, "T5Tokenizer": _T5_TOKENS}

_N_EXTRA_IDS = 100  # T5's sentinels, where tokenizer_config.json has no `extra_ids`


def read_files(directory: Path) -> TokenizerFiles:
    """The files, with the class's special tokens in the settings, and with a definition where there is one to be made.

    Raises ConvertError for files that cannot be read, and for a Unigram that transformers reads by no known class.
    """
    files = TokenizerFiles.read(directory)
    tokens = CLASS_TOKENS.get(files.tokenizer_class, {})
    files = replace(files, settings={f"{role}_token": text for role, text in tokens.items()} | files.settings)
    if files.definition:
        return files
    if files.sentencepiece is not None and files.sentencepiece_name is not None:
        if files.sentencepiece.kind == "BPE":
            return files
        return files.rebuilt(_unigram(files, files.sentencepiece), files.sentencepiece_name)
    if files.tokenizer_class == "BertTokenizer" and (directory / "vocab.txt").is_file():
        return files.rebuilt(_word_pieces(files), "vocab.txt")
    return files


def _word_pieces(files: TokenizerFiles) -> dict[str, Any]:
    """What transformers' BertTokenizer makes of vocab.txt, which has one token a line."""
    where = files.where("vocab.txt")
    data = read_whole(files.directory / "vocab.txt", LARGEST_METADATA_BYTES, "make it readable")
    try:
        lines = data.decode().replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ConvertError(f"the file is no text: {error}", where, "fetch the file again") from None
    return {
        "model": {
            **{"type": "WordPiece", "unk_token": _text(files, "unk"), "continuing_subword_prefix": "##"},
            **{"max_input_chars_per_word": 100, "vocab": {text: index for index, text in enumerate(lines)}},
        },
        "normalizer": {"type": "BertNormalizer", "clean_text": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "added_tokens": _special(files, {text: index for index, text in enumerate(lines)}),
        "post_processor": _around(files, lines, "cls", ["sep"]),
    }


def _unigram(files: TokenizerFiles, model: SentencePieceModel) -> dict[str, Any]:
    """What transformers' classes for T5 and XLM-R make of a model of SentencePiece."""
    where = files.where(files.sentencepiece_name or "")
    own = [(piece, score) for piece, score in zip(model.pieces, model.scores, strict=True)]
    begin: str | None
    match files.tokenizer_class:
        case "XLMRobertaTokenizer":
            first = [(_text(files, role), 0.0) for role in ("bos", "pad", "eos", "unk")]
            vocabulary, unknown = [*first, *own[3:], (_text(files, "mask"), 0.0)], 3
            begin, between = "bos", ["eos", "eos"]
        case "T5Tokenizer":
            n_extra = part(files.settings, "extra_ids", int, files.where("tokenizer_config.json"))
            n_extra = _N_EXTRA_IDS if n_extra is None else n_extra
            vocabulary = [*own, *((f"<extra_id_{i}>", 0.0) for i in reversed(range(n_extra)))]
            unknown, begin, between = 2, None, ["eos"]
        case other:
            raise ConvertError(
                f"how transformers' {other} numbers the tokens of a Unigram model of SentencePiece is unknown",
                where,
                "make a tokenizer.json of it: transformers' AutoTokenizer.from_pretrained(DIRECTORY)"
                ".save_pretrained(DIRECTORY)",
            )
    ids = {text: index for index, (text, _) in enumerate(vocabulary)}
    special = _special(files, ids)
    known = {token["content"] for token in special}
    named = [text for text, kind in zip(model.pieces, model.types, strict=True) if kind == TokenType.CONTROL]
    named += [text for text in ids if text.startswith("<extra_id_")]
    special += [_token(text, ids[text], True) for text in named if text in ids and text not in known]
    own_symbols = [text for text, kind in zip(model.pieces, model.types, strict=True) if kind == TokenType.USER_DEFINED]
    special += [_token(text, ids[text], False) for text in own_symbols if text in ids]
    charsmap = base64.b64encode(model.charsmap).decode()
    return {
        "model": {
            "type": "Unigram",
            "unk_id": unknown,
            "byte_fallback": False,
            "vocab": [list(one) for one in vocabulary],
        },
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap} if charsmap else None,
        "pre_tokenizer": None,  # the class makes it
        "added_tokens": special,
        "post_processor": _around(files, list(ids), begin, between),
    }


def _text(files: TokenizerFiles, role: str) -> str:
    """The text of a token that the class has."""
    value = files.settings[f"{role}_token"]
    where = files.where("tokenizer_config.json")
    return part(value if isinstance(value, dict) else {"content": value}, "content", str, where) or ""


def _special(files: TokenizerFiles, ids: dict[str, int]) -> list[dict[str, Any]]:
    """The class's special tokens as added tokens. Raises ConvertError for one without an id: transformers would give it
    one behind all others."""
    texts = list(dict.fromkeys(_text(files, role) for role in CLASS_TOKENS[files.tokenizer_class]))
    for text in texts:
        if text not in ids:
            raise ConvertError(
                f"the special token {text!r} is none of the tokens",
                files.where("tokenizer_config.json"),
                "name the tokens that the file has, or put the file that belongs to this model into the directory",
            )
    return [_token(text, ids[text], True) for text in texts]


def _token(text: str, index: int, special: bool) -> dict[str, Any]:
    return {"id": index, "content": text, "special": special, "normalized": False}


def _around(files: TokenizerFiles, texts: list[str], begin: str | None, between: list[str]) -> dict[str, Any]:
    """The post-processor that puts a beginning and an end around a text, and these roles between two."""
    roles = [*([begin] if begin else []), *between]
    items = {role: {"SpecialToken": {"id": _text(files, role)}} for role in roles}
    first = [items[begin]] if begin else []
    text, other = {"Sequence": {"id": "A"}}, {"Sequence": {"id": "B"}}
    end = items[between[0]]
    return {
        "type": "TemplateProcessing",
        "single": [*first, text, end],
        "pair": [*first, text, *(items[role] for role in between), other, end],
        "special_tokens": {
            _text(files, role): {"id": _text(files, role), "ids": [texts.index(_text(files, role))]} for role in roles
        },
    }
