"""SentencePiece's tokenizer.model: its pieces, and the settings that decide whether and how llama.cpp can use them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from bitwright.formats.errors import ConvertError
from bitwright.formats.files.regular_file import LARGEST_METADATA_BYTES, read_whole

_KINDS = {1: "Unigram", 2: "BPE", 3: "word", 4: "character"}


@dataclass(frozen=True)
class SentencePieceModel:
    """kind: "Unigram" or "BPE". pieces, scores and types by token id. begin, end: the pieces that start and end a text,
    None for none.
    add_dummy_prefix: whether a space is put in front of the text.
    remove_extra_whitespaces: whether spaces in a row become one, and those at both ends none.
    charsmap: what characters are replaced by, in SentencePiece's own form; empty for nothing.
    foreign: settings that change the text, and that llama.cpp does not know for a BPE, as "name = value"."""

    kind: str
    pieces: list[str]
    scores: list[float]
    types: list[TokenType]
    begin: str | None
    end: str | None
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    charsmap: bytes
    foreign: tuple[str, ...]


def read(path: Path) -> SentencePieceModel:
    """Read a model of SentencePiece; ConvertError if it is none, or neither a BPE nor a Unigram."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2
    model = messages.ModelProto()
    data = read_whole(path, LARGEST_METADATA_BYTES, "make it readable")
    try:
        model.ParseFromString(data)
    except DecodeError:
        model.Clear()
    if not model.pieces:
        raise ConvertError("not a model of SentencePiece", str(path), "fetch the file again")
    trainer = model.trainer_spec
    kind = _KINDS.get(trainer.model_type, str(trainer.model_type))
    if kind not in ("BPE", "Unigram"):
        raise ConvertError(
            f"a SentencePiece model of the kind {kind} cannot be converted, only BPE and Unigram can: llama.cpp would "
            "cut text into other tokens",
            str(path),
            "convert a checkpoint whose tokenizer is one of these",
        )
    return SentencePieceModel(
        kind=kind,
        pieces=[piece.piece for piece in model.pieces],
        scores=[piece.score for piece in model.pieces],
        types=[TokenType(piece.type) for piece in model.pieces],  # both have the same numbers
        begin=trainer.bos_piece if trainer.bos_id >= 0 else None,
        end=trainer.eos_piece if trainer.eos_id >= 0 else None,
        add_dummy_prefix=model.normalizer_spec.add_dummy_prefix,
        remove_extra_whitespaces=model.normalizer_spec.remove_extra_whitespaces,
        charsmap=model.normalizer_spec.precompiled_charsmap,
        foreign=tuple(_foreign(trainer, model.normalizer_spec)),
    )


def _foreign(trainer: Any, normalizer: Any) -> list[str]:
    found = []
    if normalizer.precompiled_charsmap:
        found.append(f"normalization_rule_name = {normalizer.name or 'custom'}")
    if not normalizer.escape_whitespaces:
        found.append("escape_whitespaces = false")
    if trainer.treat_whitespace_as_suffix:
        found.append("treat_whitespace_as_suffix = true")
    return found
