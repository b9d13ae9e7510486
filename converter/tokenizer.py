"""The tokenizer of a checkpoint as llama.cpp's metadata: every `tokenizer.*` key of the GGUF file.

Three kinds of tokenizer become two kinds of llama.cpp vocabulary:

    tokenizer.json, BPE over bytes            -> "gpt2"   tokens, merges, the name of the pre-tokenizer
    tokenizer.model, SentencePiece BPE        -> "llama"  tokens, scores
    tokenizer.json, BPE with byte fallback    -> "llama"  tokens, scores from the order of the merges

Only the files are read: neither transformers nor the tokenizer itself is needed. Keys, values and value types are those of
llama.cpp's own converter; docs/add-a-tokenizer.md lists where this module says more than it does.
"""

import json
from pathlib import Path

import gguf
from gguf import TokenType
from gguf.gguf_writer import GGUFValue

from converter.pre_tokenizer import check_name, find_name
from formats.errors import ConvertError


def tokenizer_metadata(directory: Path, vocab_size: int, pre_tokenizer: str | None = None) -> dict[str, GGUFValue]:
    """Every `tokenizer.*` key of the GGUF file, in the order of writing.

    directory: the checkpoint, with tokenizer.json or tokenizer.model, and tokenizer_config.json where there is one.
    vocab_size: the rows of the embedding, `vocab_size` of config.json; ids without a token get `[PADid]`, type UNUSED.
    pre_tokenizer: llama.cpp's name of the pre-tokenizer, instead of the one found by its definition in tokenizer.json.

    Raises ConvertError for missing or damaged files, a kind of tokenizer or a pre-tokenizer that llama.cpp has not, and a
    vocabulary that llama.cpp would refuse to load.
    """
    if pre_tokenizer is not None:
        check_name(pre_tokenizer)
    definition = _read_json(directory / "tokenizer.json")
    settings = _read_json(directory / "tokenizer_config.json")
    writer = gguf.GGUFWriter(None, arch="")  # it only collects: the keys and value types are gguf's own
    if is_byte_level(definition):
        _add_byte_level(writer, directory, definition, settings, vocab_size, pre_tokenizer)
    else:
        raise _unknown_kind(directory, definition)
    return {key: value for key, value in writer.kv_data[0].items() if key.startswith("tokenizer.")}


def is_byte_level(definition: dict) -> bool:
    """Whether a parsed tokenizer.json is a BPE over bytes (GPT-2's kind)."""
    model = definition.get("model") or {}
    decoder = definition.get("decoder") or {}
    decoders = decoder.get("decoders", [decoder])
    return model.get("type") == "BPE" and any(step.get("type") == "ByteLevel" for step in decoders)


def _add_byte_level(
    writer: gguf.GGUFWriter,
    directory: Path,
    definition: dict,
    settings: dict,
    vocab_size: int,
    pre_tokenizer: str | None,
) -> None:
    where = str(directory / "tokenizer.json")
    name = pre_tokenizer or find_name(definition, where)
    vocabulary = dict(definition["model"]["vocab"])
    added = _added_tokens(definition, settings)
    vocabulary.update((token["content"], token["id"]) for token in added.values())
    tokens, types = _empty_slots(vocab_size), [TokenType.UNUSED] * vocab_size
    if (largest := max(vocabulary.values())) >= vocab_size:
        raise ConvertError(
            f"the tokenizer has the token id {largest}, but the model has an embedding for {vocab_size} tokens only",
            where,
            "put the tokenizer that belongs to this model into the directory",
        )
    for text, index in vocabulary.items():
        tokens[index], types[index] = text, TokenType.NORMAL
    for index, token in added.items():
        text = token["content"] if token.get("normalized") else _decode_bytes(token["content"])
        tokens[index], types[index] = _added_token(text, token)
    _check_unique(tokens, where)

    if (add_prefix_space := settings.get("add_prefix_space")) is not None:
        writer.add_add_space_prefix(add_prefix_space)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(_merges(definition))
    special = gguf.SpecialVocab(directory)
    # Absent, llama.cpp's default depends on the name of the pre-tokenizer, and not on what this tokenizer does.
    special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)


def _merges(definition: dict) -> list[str]:
    """Merges as "left right"; a space inside a part is written as the byte-level letter for it."""
    space = chr(ord(" ") + 256)
    return [
        merge if isinstance(merge, str) else f"{merge[0].replace(' ', space)} {merge[1].replace(' ', space)}"
        for merge in definition["model"]["merges"]
    ]


def _added_tokens(definition: dict, settings: dict) -> dict[int, dict]:
    """Added tokens by id: those of tokenizer.json, then those that tokenizer_config.json alone knows."""
    added = {int(index): token for index, token in settings.get("added_tokens_decoder", {}).items()}
    return added | {token["id"]: token for token in definition.get("added_tokens", [])}


def _added_token(text: str, token: dict) -> tuple[str, TokenType]:
    """Text and type of an added token: CONTROL is parsed only where llama.cpp is asked to, USER_DEFINED always."""
    if token.get("special") or _looks_special(text):
        return text, TokenType.CONTROL
    return text.replace("▁", " "), TokenType.USER_DEFINED


def _looks_special(text: str) -> bool:
    """Control tokens that some checkpoints (command-r, deepseek-coder, gemma) forgot to mark as special."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _byte_letters() -> dict[str, int]:
    """GPT-2's alphabet: the letter that stands for each byte; printable Latin-1 stands for itself."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_letters()


def _decode_bytes(text: str) -> str:
    """What the byte-level decoder makes of a token: its bytes, when all of it are byte letters, else the text itself."""
    if all(letter in _BYTES for letter in text):
        return bytes(_BYTES[letter] for letter in text).decode("utf-8", errors="replace")
    return text


def _empty_slots(n: int) -> list[str]:
    return [f"[PAD{index}]" for index in range(n)]


def _check_unique(tokens: list[str], where: str) -> None:
    if len(set(tokens)) == len(tokens):
        return
    first: dict[str, int] = {}
    for index, text in enumerate(tokens):
        if first.setdefault(text, index) != index:
            raise ConvertError(
                f"the tokens {first[text]} and {index} have the same text {text!r}, which llama.cpp refuses to load",
                where,
                "rename or remove one of the two added tokens",
            )


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
            "put the tokenizer's files beside the weights; a vocab.json with merges.txt becomes a tokenizer.json by "
            "transformers' AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        )
    kind = (definition.get("model") or {}).get("type")
    return ConvertError(
        f"a tokenizer of the kind {kind!r} cannot be converted: known are byte-level BPE and BPE with byte fallback in "
        "tokenizer.json, and SentencePiece BPE in tokenizer.model",
        str(directory / "tokenizer.json"),
        "add the tokenizer.model it was made from, if it was made by SentencePiece",
    )
