"""From passages of text, or conversations, to samples of equal length that a model meets as it would in use.

An instruct model sees the tokens of its chat template, in their places, in every conversation that it has: calibrated
on bare text it is measured without them. So conversations are rendered by the tokenizer's own template, and of passages
of plain text every other one is turned into a conversation: its opening is what the user says, the rest is the answer.

Documents follow each other without gaps. Every sample begins where a sentence or a line does: one that a sample's end
cuts off is begun again in the next, unless it is longer than half a sample.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitwright.calibration.text.chat_template import ChatTemplate, TemplateFailed
from bitwright.formats.errors import ConvertError

Conversation = list[dict[str, str]]
"""Messages {"role", "content"}, in turn."""

# The next sentence or line begins where this ends.
_BREAK = re.compile(r"[.!?]['\")\]]*\s+|[。！？]\s*|\n\s*")
# What the user says of a passage that is turned into a conversation: at least this many characters of it.
_OPENING_CHARACTERS = 40


@dataclass(frozen=True)
class Document:
    """text: as it was tokenized; tokens; starts: indices of the tokens with which sentences begin, the first one 0."""

    text: str
    tokens: list[int]
    starts: list[int]


def documents(passages: Iterable[str | Conversation], tokenizer: Any, chat: bool) -> Iterator[Document]:
    """The passages as documents; chat: by the tokenizer's template, of plain text every other one.

    Raises ConvertError for a template that cannot be rendered.
    """
    begin = begin_token(tokenizer)
    with ChatTemplate(tokenizer) as template:
        for i, passage in enumerate(passages):
            if isinstance(passage, str):
                conversation = _as_conversation(passage) if chat and i % 2 else None
                text = _rendered(conversation, template) if conversation else passage
            elif chat:
                text = _rendered(passage, template)
            else:
                text = "".join(f"{message['content']}\n\n" for message in passage)
            # A template may write the token that begins a text itself; a sample has one of its own.
            yield _document(text.removeprefix(tokenizer.bos_token) if begin is not None else text, tokenizer)


def pack(whole_texts: list[Document], sequence_length: int, begin: int | None) -> np.ndarray:
    """All whole samples of these documents: int32 [n_samples, sequence_length], each after `begin`, if any."""
    tokens = np.array([token for document in whole_texts for token in document.tokens], np.int32)
    lengths = np.cumsum([0, *(len(document.tokens) for document in whole_texts)])
    starts = np.array([first + i for first, d in zip(lengths, whole_texts, strict=False) for i in d.starts], np.int64)
    room = sequence_length - (begin is not None)
    samples, position = [], 0
    while position + room <= len(tokens):
        samples.append(tokens[position : position + room])
        last = starts[np.searchsorted(starts, position + room, side="right") - 1]
        position = int(last) if last > position + room // 2 else position + room
    packed = np.array(samples, np.int32).reshape(-1, room)
    return packed if begin is None else np.insert(packed, 0, begin, axis=1)


def begin_token(tokenizer: Any) -> int | None:
    """The token that this tokenizer puts before a text, if it does."""
    begin = tokenizer.bos_token_id
    return begin if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else None


def _as_conversation(passage: str) -> Conversation | None:
    """The passage's first sentences and the rest of it; None where one of the two would be empty."""
    opening = next((b.end() for b in _BREAK.finditer(passage) if b.end() >= _OPENING_CHARACTERS), len(passage))
    question, answer = passage[:opening].strip(), passage[opening:].strip()
    if not question or not answer:
        return None
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _rendered(conversation: Conversation, template: ChatTemplate) -> str:
    try:
        return template.render(conversation)
    except TemplateFailed as error:
        raise ConvertError(
            f"the chat template cannot be rendered: {error}",
            "chat template of the tokenizer",
            "mend it, or calibrate on plain text with --no-chat",
        ) from None


def _document(text: str, tokenizer: Any) -> Document:
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=tokenizer.is_fast)
    tokens = encoded["input_ids"]
    if not tokens or not tokenizer.is_fast:  # without offsets, a document is one sentence
        return Document(text, tokens, [0] if tokens else [])
    ends = np.array([end for _, end in encoded["offset_mapping"]])
    breaks = [0, *(match.end() for match in _BREAK.finditer(text))]
    # The token that holds a sentence's first character, which may be that of the blank before it.
    starts = np.unique(np.searchsorted(np.maximum.accumulate(ends), breaks, side="right"))
    return Document(text, tokens, [int(start) for start in starts if start < len(tokens)])
