"""SentencePiece's tokenizer.model: its pieces, and the settings that decide whether and how llama.cpp can use them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from formats.errors import ConvertError
from formats.regular_file import LARGEST_METADATA_BYTES, read_whole

_KINDS = {1: "Unigram", 2: "BPE", 3: "word", 4: "character"}
_BPE = 2


@dataclass(frozen=True)
class SentencePieceModel:
    """pieces, scores and types by token id. begin, end: the pieces that start and end a text, None for none.
    add_dummy_prefix: whether a space is put in front of the text.
    remove_extra_whitespaces: whether spaces in a row become one, and those at both ends none.
    foreign: settings that change the text, and that llama.cpp does not know, as "name = value"."""

    pieces: list[str]
    scores: list[float]
    types: list[TokenType]
    begin: str | None
    end: str | None
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    foreign: tuple[str, ...]


def read(path: Path) -> SentencePieceModel:
    """Read a tokenizer.model; ConvertError if it is none, or not a BPE."""
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
    if trainer.model_type != _BPE:
        raise ConvertError(
            f"a SentencePiece model of the kind {_KINDS.get(trainer.model_type, trainer.model_type)} cannot be "
            "converted, only BPE can: llama.cpp would cut text into other tokens",
            str(path),
            "convert a checkpoint whose tokenizer is a BPE",
        )
    return SentencePieceModel(
        pieces=[piece.piece for piece in model.pieces],
        scores=[piece.score for piece in model.pieces],
        types=[TokenType(piece.type) for piece in model.pieces],  # both have the same numbers
        begin=trainer.bos_piece if trainer.bos_id >= 0 else None,
        end=trainer.eos_piece if trainer.eos_id >= 0 else None,
        add_dummy_prefix=model.normalizer_spec.add_dummy_prefix,
        remove_extra_whitespaces=model.normalizer_spec.remove_extra_whitespaces,
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
