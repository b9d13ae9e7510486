"""The tokenizer of a checkpoint as llama.cpp's metadata: every `tokenizer.*` key of the GGUF file.

Three kinds of tokenizer become two kinds of llama.cpp vocabulary:

    tokenizer.json, BPE over bytes            -> "gpt2"   tokens, merges, the name of the pre-tokenizer
    tokenizer.model, SentencePiece BPE        -> "llama"  tokens, scores
    tokenizer.json, BPE with byte fallback    -> "llama"  tokens, scores from the order of the merges

Only the files are read: neither transformers nor torch is needed. Keys, values and value types are those of llama.cpp's
own converter; docs/add-a-tokenizer.md lists the places where this module says more, and why.
"""

import json
from pathlib import Path

import gguf
from gguf.gguf_writer import GGUFValue

from converter import tokens
from converter.pre_tokenizer import check_name, find_name
from converter.tokens import Vocabulary
from formats.errors import ConvertError


def tokenizer_metadata(directory: Path, vocab_size: int, pre_tokenizer: str | None = None) -> dict[str, GGUFValue]:
    """Every `tokenizer.*` key of the GGUF file, in the order of writing.

    directory: the checkpoint, with tokenizer.json or tokenizer.model, and tokenizer_config.json where there is one.
    vocab_size: the rows of the embedding, `vocab_size` of config.json; ids without a token get `[PADid]`, type UNUSED.
    pre_tokenizer: llama.cpp's name of the pre-tokenizer, instead of the one found by its definition in tokenizer.json.

    Raises ConvertError for missing or damaged files, for a kind of tokenizer or a pre-tokenizer that llama.cpp does not
    have, and for a vocabulary that it would refuse to load.
    """
    if pre_tokenizer is not None:
        check_name(pre_tokenizer)
    definition = _read_json(directory / "tokenizer.json")
    settings = _read_json(directory / "tokenizer_config.json")
    found = _vocabulary(directory, definition, settings, vocab_size, pre_tokenizer)

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
    _special_tokens(directory, found).add_to_gguf(writer, quiet=True)
    return {key: value for key, value in writer.kv_data[0].items() if key.startswith("tokenizer.")}


def _vocabulary(
    directory: Path, definition: dict, settings: dict, vocab_size: int, pre_tokenizer: str | None
) -> Vocabulary:
    """The vocabulary by its kind. A byte-level tokenizer.json is preferred to a tokenizer.model, which then is another
    program's; any other tokenizer.json only repeats the tokenizer.model beside it, and has lost the scores."""
    json_file, model_file = directory / "tokenizer.json", directory / "tokenizer.model"
    if tokens.is_byte_level(definition):
        tokens.check_parts(definition, str(json_file))
        name = pre_tokenizer or find_name(definition, str(json_file))
        return tokens.byte_level(definition, settings, vocab_size, name, str(json_file))
    if model_file.is_file():
        added = _read_json(directory / "added_tokens.json")
        return tokens.sentencepiece(model_file, definition, settings, added, vocab_size)
    if tokens.has_byte_fallback(definition):
        tokens.check_parts(definition, str(json_file))
        return tokens.byte_fallback(definition, settings, vocab_size, str(json_file))
    raise _unknown_kind(directory, definition)


def _special_tokens(directory: Path, found: Vocabulary) -> gguf.SpecialVocab:
    """Ids of the special tokens, whether they are added to a text, and chat templates, as gguf reads them."""
    try:
        special = gguf.SpecialVocab(directory, n_vocab=len(found.tokens))
    except ValueError as error:
        raise ConvertError(
            str(error), str(directory / "config.json"), "correct the token id, or remove the key"
        ) from None
    if found.model == "gpt2":
        # Absent, llama.cpp goes by the name of the pre-tokenizer, and not by what this tokenizer does.
        special.add_special_token.setdefault("bos", False)
    return special


def _read_json(path: Path) -> dict:
    """A parsed JSON object; {} where there is no such file."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConvertError(f"not a JSON file: {error}", str(path), "fetch the file again") from None
    if not isinstance(content, dict):
        raise ConvertError("the file holds no JSON object", str(path), "fetch the file again")
    return content


def _unknown_kind(directory: Path, definition: dict) -> ConvertError:
    if not definition:
        return ConvertError(
            "no tokenizer: neither tokenizer.json nor tokenizer.model is there",
            str(directory),
            "put the tokenizer's files beside the weights; vocab.json and merges.txt become a tokenizer.json by "
            "transformers' AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)",
        )
    kind = (definition.get("model") or {}).get("type")
    return ConvertError(
        f"a tokenizer of the kind {kind!r} cannot be converted: known are byte-level BPE and BPE with byte fallback in "
        "tokenizer.json, and SentencePiece BPE in tokenizer.model",
        str(directory / "tokenizer.json"),
        "add the tokenizer.model that it was made from, if SentencePiece made it",
    )
