"""SentencePiece's tokenizer.model: pieces, and the two settings that decide whether and how llama.cpp can use them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from formats.errors import ConvertError

# Field numbers of sentencepiece_model.proto.
_TRAINER_SPEC, _NORMALIZER_SPEC = 2, 3
_TRAINER_MODEL_TYPE, _NORMALIZER_ADD_DUMMY_PREFIX = 3, 3
_KINDS = {1: "Unigram", 2: "BPE", 3: "word", 4: "character"}
_BPE = 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class SentencePieceModel:
    """pieces, scores and types by token id; add_dummy_prefix: whether a space is put in front of the text."""

    pieces: list[str]
    scores: list[float]
    types: list[TokenType]
    add_dummy_prefix: bool


def read(path: Path) -> SentencePieceModel:
    """Read a tokenizer.model; ConvertError if it is none, or not a BPE."""
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise ConvertError("not a model of SentencePiece", str(path), "fetch the file again") from None
    sections = _fields(path.read_bytes())
    trainer, normalizer = _fields(sections.get(_TRAINER_SPEC, b"")), _fields(sections.get(_NORMALIZER_SPEC, b""))
    kind = trainer.get(_TRAINER_MODEL_TYPE, 1)
    if kind != _BPE:
        raise ConvertError(
            f"a SentencePiece model of the kind {_KINDS.get(kind, kind)} cannot be converted, only BPE can: llama.cpp "
            "would cut text into other tokens",
            str(path),
            "convert a checkpoint whose tokenizer is a BPE",
        )
    ids = list(range(processor.vocab_size()))
    types = [TokenType.NORMAL] * len(ids)
    for test, token_type in (
        (processor.is_byte, TokenType.BYTE),
        (processor.is_unused, TokenType.UNUSED),
        (processor.is_control, TokenType.CONTROL),
        (processor.is_unknown, TokenType.UNKNOWN),
    ):
        for index, holds in enumerate(test(ids)):
            if holds:
                types[index] = token_type
    return SentencePieceModel(
        processor.id_to_piece(ids),
        processor.get_score(ids),
        types,
        bool(normalizer.get(_NORMALIZER_ADD_DUMMY_PREFIX, True)),
    )


def _fields(message: bytes) -> dict[int, Any]:
    """The last value of every field of a protocol buffers message: numbers as int, everything else as bytes."""
    fields: dict[int, Any] = {}
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT:
            fields[number], position = _varint(message, position)
            continue
        size = {_FIXED64: 8, _FIXED32: 4}.get(wire_type, 0)
        if wire_type == _BYTES:
            size, position = _varint(message, position)
        fields[number] = message[position : position + size]
        position += size
    return fields


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """A number in groups of 7 bits, lowest first; returns it and the position behind it."""
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
