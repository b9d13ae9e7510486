"""The tokenizer of a checkpoint as llama.cpp's metadata: every `tokenizer.*` key of the GGUF file.

Three kinds of tokenizer become two kinds of llama.cpp vocabulary:

    tokenizer.json, BPE over bytes            -> "gpt2"   tokens, merges, the name of the pre-tokenizer
    tokenizer.model, SentencePiece BPE        -> "llama"  tokens, scores
    tokenizer.json, BPE with byte fallback    -> "llama"  tokens, scores from the order of the merges

Only the files are read: neither transformers nor torch is needed. The truth is what transformers makes of them. Keys
and value types are those of llama.cpp's own converter; docs/add-a-tokenizer.md lists where the values differ, and why.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
from gguf.gguf_writer import GGUFValue

from converter import sentencepiece_bpe, tokens
from converter.chat_templates import DEFAULT, chat_templates
from converter.end_of_generation import end_keys, end_tokens
from converter.pre_tokenizer import PreTokenizerName, check_name, find_name
from converter.special_tokens import added_around, added_around_keys, configured_ids, named_token, token_ids
from converter.tokenizer_files import TokenizerFiles, part
from converter.tokens import Vocabulary
from formats.errors import ConvertError

# Roles of one token each; the ends of a text are another matter.
_ROLES = ("bos", "unk", "sep", "pad", "mask")


@dataclass(frozen=True)
class TokenizerMetadata:
    """values: every `tokenizer.*` key of the GGUF file, in the order of writing.
    notes: what llama.cpp will do otherwise than the tokenizer, a sentence each."""

    values: dict[str, GGUFValue]
    notes: tuple[str, ...] = ()


def tokenizer_metadata(directory: Path, vocab_size: int, pre_tokenizer: str | None = None) -> TokenizerMetadata:
    """What llama.cpp is to know of the tokenizer.

    directory: the checkpoint, with tokenizer.json or tokenizer.model, and tokenizer_config.json where there is one.
    vocab_size: the rows of the embedding, `vocab_size` of config.json; ids without a token get `[PADid]`, type UNUSED.
    pre_tokenizer: llama.cpp's name of the pre-tokenizer, instead of the one found by its definition in tokenizer.json.

    Raises ConvertError for missing or damaged files, for a kind of tokenizer, a pre-tokenizer or settings that
    llama.cpp does not have, and for a vocabulary that it would refuse to load.
    """
    if pre_tokenizer is not None:
        check_name(pre_tokenizer)
    files = TokenizerFiles.read(directory)
    found = _vocabulary(files, vocab_size, pre_tokenizer)
    writer = gguf.GGUFWriter(None, arch="")  # it only collects: the keys and value types are gguf's own
    if found.add_space_prefix is not None:
        writer.add_add_space_prefix(found.add_space_prefix)
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    if found.scores is not None:
        writer.add_token_scores(found.scores)
    writer.add_token_types(found.types)
    if found.merges is not None:
        writer.add_token_merges(found.merges)
    notes = [*found.notes, *_write_special_tokens(writer, files, found), *_write_chat_templates(writer, files)]
    values = {key: value for key, value in writer.kv_data[0].items() if key.startswith("tokenizer.")}
    _check_texts(values, str(directory))
    return TokenizerMetadata(values, tuple(notes))


def _vocabulary(files: TokenizerFiles, vocab_size: int, pre_tokenizer: str | None) -> Vocabulary:
    """The vocabulary by its kind. A byte-level tokenizer.json is preferred to a tokenizer.model, which then is another
    program's; any other tokenizer.json repeats the tokenizer.model that it was made from, and has lost the scores."""
    if not files.definition:
        if files.sentencepiece is None:
            raise _no_tokenizer(files.directory)
        return sentencepiece_bpe.sentencepiece(files, files.sentencepiece, vocab_size)
    if not tokens.is_bpe(files):
        raise _unknown_kind(files)
    tokens.check_parts(files)
    if tokens.is_byte_level(files):
        name = PreTokenizerName(pre_tokenizer) if pre_tokenizer else None
        return tokens.byte_level(files, vocab_size, name or find_name(files.definition, files.where("tokenizer.json")))
    if not sentencepiece_bpe.has_byte_fallback(files):
        raise _unknown_kind(files)
    if files.sentencepiece is not None and sentencepiece_bpe.repeats(files, files.sentencepiece):
        return sentencepiece_bpe.sentencepiece(files, files.sentencepiece, vocab_size)
    return sentencepiece_bpe.byte_fallback(files, vocab_size)


def _write_special_tokens(writer: gguf.GGUFWriter, files: TokenizerFiles, found: Vocabulary) -> list[str]:
    """The ids of the special tokens, and whether they are put around a text. Returns notes."""
    ids = {text: index for text, index in token_ids(files).items() if index < len(found.tokens)}
    named, notes = _named_ids(files, ids)
    for role in _ROLES:
        configured = configured_ids(files.config, f"{role}_token_id", files.where("config.json"))
        if configured:
            named.setdefault(role, configured[0])
    ends = end_tokens(files, ids)
    if ends:
        named.setdefault("eos", ends[0])
    around = added_around(files, named, len(found.tokens))
    if around.begin is not None and around.begin != named.get("bos", around.begin):
        notes.append(
            f"The tokenizer puts {found.tokens[around.begin]} in front of every text, not its bos_token; so does the "
            "GGUF."
        )
    if around.begin is not None:
        named["bos"] = around.begin
    _check_configured(files, len(found.tokens))
    others = [named[role] for role in ("pad", "bos", "unk") if role in named]
    end = end_keys(ends, around.end, found.tokens, found.types, others)
    for role, index in ({role: named[role] for role in _ROLES if role in named} | end.ids).items():
        getattr(writer, f"add_{role}_token_id")(index)
    adds, contradictions = added_around_keys(files, around)
    writer.add_add_bos_token(adds["bos"])
    if "eos" in adds:
        writer.add_add_eos_token(adds["eos"])
    return [*notes, *end.notes, *contradictions]


def _named_ids(files: TokenizerFiles, ids: Mapping[str, int]) -> tuple[dict[str, int], list[str]]:
    """The ids of the roles that the tokenizer names, and what there is to say of those that it does not have."""
    named, notes = {}, []
    for role in (*_ROLES, "eos"):
        text = named_token(files, role)
        if text is not None and text in ids:
            named[role] = ids[text]
        elif text:
            notes.append(f"The tokenizer's {role}_token {text} is none of its tokens, and is left out.")
    return named, notes


def _check_configured(files: TokenizerFiles, vocab_size: int) -> None:
    """Raises ConvertError for an id of config.json or generation_config.json that the model has no embedding for."""
    for name, table in (("config.json", files.config), ("generation_config.json", files.generation)):
        for role in (*_ROLES, "eos"):
            key = f"{role}_token_id"
            for index in configured_ids(table, key, files.where(name)):
                if index >= vocab_size:
                    raise ConvertError(
                        f"{key} has {index}, but the model has embeddings for {vocab_size} tokens only",
                        f"{files.where(name)}: {key}",
                        "correct the id, or remove the key",
                    )


def _write_chat_templates(writer: gguf.GGUFWriter, files: TokenizerFiles) -> list[str]:
    """Returns notes."""
    templates, notes = chat_templates(files)
    others = [name for name in templates if name != DEFAULT]
    for name in others:
        writer.add_string(gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), templates[name])
    if others:
        writer.add_array(gguf.Keys.Tokenizer.CHAT_TEMPLATES, others)
    if DEFAULT in templates:
        writer.add_chat_template(templates[DEFAULT])
    return notes


def _check_texts(values: Mapping[str, GGUFValue], where: str) -> None:
    """JSON can spell what is no text, half of a surrogate pair; a GGUF cannot."""
    for key, value in values.items():
        for text in value.value if isinstance(value.value, list) else [value.value]:
            if isinstance(text, str) and not _is_text(text):
                raise ConvertError(f"{text!r} is no text", f"{where}: {key}", "fetch the tokenizer's files again")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_tokenizer(directory: Path) -> ConvertError:
    return ConvertError(
        "no tokenizer: neither tokenizer.json nor tokenizer.model is there",
        str(directory),
        "put the tokenizer's files beside the weights; vocab.json and merges.txt become a tokenizer.json by "
        "transformers' AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)",
    )


def _unknown_kind(files: TokenizerFiles) -> ConvertError:
    where = files.where("tokenizer.json")
    kind = part(part(files.definition, "model", dict, where) or {}, "type", str, where)
    return ConvertError(
        f"a tokenizer of the kind {kind!r} cannot be converted: known are byte-level BPE and BPE with byte fallback",
        where,
        "convert a checkpoint whose tokenizer is one of these",
    )
