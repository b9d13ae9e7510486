"""The tokenizer of a checkpoint as llama.cpp's metadata: every `tokenizer.*` key of the GGUF file.

Kinds of tokenizer, and the kinds of llama.cpp vocabulary that they become:

    tokenizer.json, BPE over bytes            -> "gpt2"   tokens, merges, the name of the pre-tokenizer
    tokenizer.model, SentencePiece BPE        -> "llama"  tokens, scores
    tokenizer.json, BPE with byte fallback    -> "llama"  tokens, scores from the order of the merges
    the same of Gemma 4                       -> "gemma4" tokens, merges
    tokenizer.json or vocab.txt, WordPiece    -> "bert"   tokens, what becomes of capitals and accents
    tokenizer.json or a model of SentencePiece, Unigram -> "t5"   tokens, scores, what characters are replaced by

Only the files are read: neither transformers nor torch is needed. The truth is what transformers makes of them. Keys
and value types are those of llama.cpp's own converter; docs/add-a-tokenizer.md lists where the values differ, and why.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
from gguf.gguf_writer import GGUFValue

from bitwright.converter.tokenizer import byte_level_bpe as tokens
from bitwright.converter.tokenizer import sentencepiece_bpe, unigram, wordpiece
from bitwright.converter.tokenizer.byte_level_bpe import Vocabulary
from bitwright.converter.tokenizer.chat_templates import DEFAULT, chat_templates
from bitwright.converter.tokenizer.end_of_generation import end_keys, end_tokens
from bitwright.converter.tokenizer.files import TokenizerFiles, part
from bitwright.converter.tokenizer.pre_tokenizer import PreTokenizerName, check_name, find_name
from bitwright.converter.tokenizer.rebuilt import read_files
from bitwright.converter.tokenizer.special_tokens import (
    AddedAround,
    added_around,
    added_around_keys,
    configured_ids,
    named_token,
    token_ids,
)
from bitwright.formats.errors import ConvertError

# Roles of one token each; the ends of a text are another matter.
_ROLES = ("bos", "unk", "sep", "pad", "mask")
# Keys that llama.cpp reads since 2026, and gguf has no names for.
_LOWERCASE, _STRIP_ACCENTS = "tokenizer.ggml.normalizer.lowercase", "tokenizer.ggml.normalizer.strip_accents"
# Files of tokenizers that only other programs read: whose they are, and what makes a tokenizer.json of them.
_OTHERS = {
    "tekken.json": (
        "Mistral's own",
        "; where mistral-common is installed, transformers' AutoTokenizer.from_pretrained(DIRECTORY) and "
        "save_pretrained make one",
    ),
    "*.tiktoken": ("tiktoken's", ""),
    "tiktoken.model": ("tiktoken's", ""),
}
# Model types that add an embedding by segment, and how many segments transformers assumes.
_SEGMENTED, _SEGMENTS = ("bert", "roberta", "xlm-roberta"), 2


@dataclass(frozen=True)
class TokenizerMetadata:
    """values: every `tokenizer.*` key of the GGUF file, in the order of writing.
    notes: what llama.cpp will do otherwise than the tokenizer, a sentence each."""

    values: dict[str, GGUFValue]
    notes: tuple[str, ...] = ()


def tokenizer_metadata(directory: Path, vocab_size: int, pre_tokenizer: str | None = None) -> TokenizerMetadata:
    """What llama.cpp is to know of the tokenizer.

    directory: the checkpoint, with tokenizer.json, vocab.txt or a model of SentencePiece, and with
        tokenizer_config.json where there is one.
    vocab_size: the rows of the embedding, `vocab_size` of config.json; ids without a token get `[PADid]`, type UNUSED.
    pre_tokenizer: llama.cpp's name of the pre-tokenizer, instead of the one found by its definition in tokenizer.json.

    Raises ConvertError for missing or damaged files, for a kind of tokenizer, a pre-tokenizer or settings that
    llama.cpp does not have, and for a vocabulary that it would refuse to load.
    """
    if pre_tokenizer is not None:
        check_name(pre_tokenizer)
    files = read_files(directory)
    found = _vocabulary(files, vocab_size, pre_tokenizer)
    writer = gguf.GGUFWriter(None, arch="")  # it only collects: the keys and value types are gguf's own
    if found.add_space_prefix is not None:
        writer.add_add_space_prefix(found.add_space_prefix)
    writer.add_tokenizer_model(found.model)
    if found.pre is not None:
        writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    if found.scores is not None:
        writer.add_token_scores(found.scores)
    writer.add_token_types(found.types)
    if found.merges is not None:
        writer.add_token_merges(found.merges)
    _write_text_steps(writer, found)
    _write_token_types(writer, files)
    notes = [*found.notes, *_write_special_tokens(writer, files, found), *_write_chat_templates(writer, files)]
    values = {key: value for key, value in writer.kv_data[0].items() if key.startswith("tokenizer.")}
    _check_texts(values, str(directory))
    return TokenizerMetadata(values, tuple(notes))


def _vocabulary(files: TokenizerFiles, vocab_size: int, pre_tokenizer: str | None) -> Vocabulary:
    """The vocabulary by its kind. A byte-level tokenizer.json is preferred to a tokenizer.model, which then is another
    program's; any other BPE in a tokenizer.json repeats the tokenizer.model that it was made from, and has lost the
    scores."""
    if tokens.is_byte_level(files):
        tokens.check_parts(files)
        name = PreTokenizerName(pre_tokenizer) if pre_tokenizer else None
        return tokens.byte_level(files, vocab_size, name or find_name(files.definition, files.where("tokenizer.json")))
    if pre_tokenizer is not None:
        raise ConvertError(
            f"llama.cpp takes no pre-tokenizer for a tokenizer of this kind, and {pre_tokenizer!r} is given",
            "--pre-tokenizer",
            "leave the option out: it is for byte-level BPE alone",
        )
    if not files.definition:
        if files.sentencepiece is None:
            raise no_tokenizer(files.directory)
        return sentencepiece_bpe.sentencepiece(files, files.sentencepiece, vocab_size)
    if wordpiece.is_wordpiece(files):
        return wordpiece.wordpiece(files, vocab_size)
    if unigram.is_unigram(files):
        return unigram.unigram(files, vocab_size)
    return _characters(files, vocab_size)


def _characters(files: TokenizerFiles, vocab_size: int) -> Vocabulary:
    """The vocabulary of a BPE over characters in a tokenizer.json."""
    if not tokens.is_bpe(files) or not sentencepiece_bpe.has_byte_fallback(files):
        raise _unknown_kind(files)
    tokens.check_parts(files)
    if sentencepiece_bpe.is_gemma4(files):
        return sentencepiece_bpe.gemma4(files, vocab_size)
    model = files.sentencepiece
    if model is not None and model.kind == "BPE" and sentencepiece_bpe.repeats(files, model):
        return sentencepiece_bpe.sentencepiece(files, model, vocab_size)
    return sentencepiece_bpe.byte_fallback(files, vocab_size)


def _write_text_steps(writer: gguf.GGUFWriter, found: Vocabulary) -> None:
    """What llama.cpp does to a text before it cuts it, where the kind leaves a choice."""
    if found.remove_extra_whitespaces is not None:
        writer.add_remove_extra_whitespaces(found.remove_extra_whitespaces)
    if found.charsmap:
        writer.add_precompiled_charsmap(found.charsmap)
    if found.lowercase is not None:
        writer.add_bool(_LOWERCASE, found.lowercase)
    if found.strip_accents is not None:
        writer.add_bool(_STRIP_ACCENTS, found.strip_accents)


def _write_token_types(writer: gguf.GGUFWriter, files: TokenizerFiles) -> None:
    """How many kinds of segments BERT's family tells apart."""
    where = files.where("config.json")
    default = _SEGMENTS if part(files.config, "model_type", str, where) in _SEGMENTED else None
    stated = part(files.config, "type_vocab_size", int, where)
    n_types = default if stated is None else stated
    if n_types is not None:
        writer.add_token_type_count(n_types)


def _write_special_tokens(writer: gguf.GGUFWriter, files: TokenizerFiles, found: Vocabulary) -> list[str]:
    """The ids of the special tokens, and whether they are put around a text. Returns notes."""
    ids = {text: index for text, index in token_ids(files).items() if index < len(found.tokens)}
    named, notes = _named_ids(files, ids)
    for role in _ROLES:
        configured = configured_ids(files.config, f"{role}_token_id", files.where("config.json"))
        if configured:
            named.setdefault(role, configured[0])
    if found.unknown is not None:
        named["unk"] = found.unknown
    ends = end_tokens(files, ids)
    if ends:
        named.setdefault("eos", ends[0])
    around = added_around(files, named, len(found.tokens))
    notes += around.notes
    _name_separator(files, found, around, named)
    if around.begin not in (None, named.get("bos", around.begin)) and not found.of_encoder:
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
    if found.of_encoder or around.separates:
        writer.add_add_sep_token(around.separates)
    return [*notes, *([] if found.of_encoder else end.notes), *contradictions]


def _name_separator(files: TokenizerFiles, found: Vocabulary, around: AddedAround, named: dict[str, int]) -> None:
    """Name the separator: llama.cpp must have one where it parts texts, and puts it behind every text of a WordPiece,
    as it puts a beginning in front. Raises ConvertError for a WordPiece that has not both."""
    if around.separates and around.end is not None:
        named.setdefault("sep", around.end)
    if found.model == "bert" and around.begin is not None and around.end is not None:
        named["sep"] = around.end
    elif found.model == "bert":
        raise ConvertError(
            "llama.cpp puts a beginning in front of every text of a WordPiece tokenizer and an end behind it, this "
            "tokenizer does not",
            f"{files.where('tokenizer.json')}: post_processor",
            "no GGUF of this tokenizer would cut text into the right tokens",
        )


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
        texts = value.value if isinstance(value.value, list) else [value.value]
        if not texts or not isinstance(texts[0], str) or _is_text("".join(texts)):
            continue
        for text in texts:
            if not _is_text(text):
                raise ConvertError(f"{text!r} is no text", f"{where}: {key}", "fetch the tokenizer's files again")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def no_tokenizer(directory: Path) -> ConvertError:
    """The refusal of a directory without a tokenizer that can be read, by what is there instead."""
    for pattern, (whose, makes) in _OTHERS.items():
        names = sorted(path.name for path in directory.glob(pattern) if path.is_file())
        if not names:
            continue
        return ConvertError(
            f"no tokenizer.json: {names[0]} is {whose} format, which is not read",
            str(directory),
            "take the tokenizer.json of the same model from a repository in transformers' format, and put it beside"
            f" the weights{makes}",
        )
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
        f"a tokenizer of the kind {kind!r} cannot be converted: known are byte-level BPE, BPE with byte fallback, "
        "WordPiece and Unigram",
        where,
        "convert a checkpoint whose tokenizer is one of these",
    )
