"""Where a generation ends: the end tokens of a checkpoint, and the keys of a GGUF with which llama.cpp ends there.

llama.cpp ends at `eos_token_id`, `eot_token_id` (end of turn), `eom_token_id` (end of message), and at some tokens by
their texts, whatever the file says. Without `eos_token_id` it ends at a fixed id, an ordinary token of most
vocabularies.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import TokenType

from bitwright.converter.tokenizer.files import TokenizerFiles
from bitwright.converter.tokenizer.rebuilt import read_files
from bitwright.converter.tokenizer.special_tokens import configured_ids, named_token, token_ids

# Tokens that llama.cpp ends at by their texts.
NAMES = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
    *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
)
# A text that it does not end at after all, where all of these others are tokens.
EXCEPTIONS = (
    ("<|end|>", ("<|return|>", "<|call|>")),
    ("<|end|>", ("<|return|>", "<|calls|>")),
    ("<|end|>", ("<|flush|>", "<|call|>")),
    ("<|end|>", ("<|flush|>", "<|calls|>")),
    ("</s>", ("<|tool_response>",)),
)
_END_OF_TURN = (
    *("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end_of_turn|>", "<turn|>", "<|end|>", "<|eot|>"),
    *("<|END_OF_TURN_TOKEN|>", "<EOT>", "_<EOT>", "[EOT]", "<|EOT|>", "<end_of_utterance>"),
)
_END_OF_MESSAGE = ("<|eom_id|>",)


@dataclass(frozen=True)
class EndKeys:
    """ids: token id by role, "eos", "eot" and "eom". notes: what llama.cpp will do otherwise, a sentence each."""

    ids: dict[str, int]
    notes: tuple[str, ...] = ()


def source_end_tokens(directory: Path) -> frozenset[int]:
    """The tokens that end a text, as configuration, generation settings and tokenizer of a checkpoint name them.

    Only the files are read. Raises ConvertError for damaged ones.
    """
    files = read_files(directory)
    return frozenset(end_tokens(files, token_ids(files)))


def end_tokens(files: TokenizerFiles, ids: Mapping[str, int]) -> list[int]:
    """The same, each once, the one that transformers' tokenizer has first. ids: token id by text."""
    named = ids.get(named_token(files, "eos") or "")
    return list(
        dict.fromkeys(
            [
                *([] if named is None else [named]),
                *configured_ids(files.config, "eos_token_id", files.where("config.json")),
                *configured_ids(files.generation, "eos_token_id", files.where("generation_config.json")),
            ]
        )
    )


def end_keys(
    ends: Sequence[int],
    appended: int | None,
    tokens: Sequence[str],
    types: Sequence[TokenType],
    others: Sequence[int],
) -> EndKeys:
    """The keys with which llama.cpp ends at all of the tokens.

    ends: what ends a text, the tokenizer's own end first. appended: the token that the tokenizer puts behind every
    text, which llama.cpp takes from the same key. tokens, types: the vocabulary. others: ids that no text has inside,
    the best first, one of which stands in where nothing ends a text.
    """
    present = set(tokens)
    excepted = {text for text, companions in EXCEPTIONS if present.issuperset(companions)}
    own = [index for index, text in enumerate(tokens) if text in NAMES and text not in excepted]
    if not ends and appended is None:
        return _no_end(own, tokens, types, others)
    ids = {"eos": ends[0] if appended is None else appended}
    for role, names in (("eot", _END_OF_TURN), ("eom", _END_OF_MESSAGE)):
        found = next((index for index in ends if tokens[index] in names and index != ids["eos"]), None)
        if found is not None:
            ids[role] = found
    # Every place that is free, or that a token has which needs none. llama.cpp uses the first for nothing else.
    rest = [index for index in ends if index not in (*ids.values(), *own)]
    for role in ("eom", "eot"):
        if rest and ids.get(role) in (None, *own):
            ids[role] = rest.pop(0)
    ending = {index for index in (*ids.values(), *own) if tokens[index] not in excepted}
    notes = []
    if left := [index for index in ends if index not in ending]:
        named = ", ".join(f"{tokens[index]} ({index})" for index in left)
        notes.append(
            f"llama.cpp will not end a text at {named}, as the model does: a GGUF has no further place for it."
        )
    if appended is not None and appended not in ends:
        notes.append(
            f"llama.cpp will also end a text at {tokens[appended]} ({appended}), which the tokenizer puts behind every "
            "text."
        )
    return EndKeys(ids, tuple(notes))


def _no_end(own: Sequence[int], tokens: Sequence[str], types: Sequence[TokenType], others: Sequence[int]) -> EndKeys:
    """A token that stands in for an end, because llama.cpp takes one at any rate: one that it ends at by itself, one
    that no text has, or an ordinary one of its own choice."""
    if own:
        return EndKeys({"eos": own[0]})
    unused = [index for index, kind in enumerate(types) if kind == TokenType.UNUSED]
    for index in (*unused, *others):
        return EndKeys(
            {"eos": index},
            (
                f"No file names a token that ends a text. llama.cpp must have one, and gets {tokens[index]} ({index}), "
                "which no text has inside.",
            ),
        )
    return EndKeys({}, ("No file names a token that ends a text: llama.cpp will end at an ordinary token.",))
