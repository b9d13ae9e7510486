"""The tokens with a role: which they are, and which of them a tokenizer puts around every text."""

from dataclasses import dataclass
from typing import Any

from bitwright.converter.tokenizer.byte_level_bpe import added_tokens, check_ids, check_token
from bitwright.converter.tokenizer.files import TokenizerFiles, objects, part, steps, wrong_kind
from bitwright.converter.tokenizer.sentencepiece_bpe import legacy_added_tokens
from bitwright.converter.tokenizer.unigram import is_unigram, unigram_ids
from bitwright.formats.errors import ConvertError


@dataclass(frozen=True)
class AddedAround:
    """begin, end: ids of the tokens in front of and behind every text, None for none. separates: whether a second text
    has one more token in front of it than the end of the first. notes: what llama.cpp does otherwise."""

    begin: int | None = None
    end: int | None = None
    separates: bool = False
    notes: tuple[str, ...] = ()


def token_ids(files: TokenizerFiles) -> dict[str, int]:
    """The id of every token by its text, as the tokenizer's files have it."""
    ids: dict[str, int] = {}
    where = files.where("tokenizer.json")
    if is_unigram(files):
        ids = unigram_ids(files.definition, where)
    else:
        model = part(files.definition, "model", dict, where) or {}
        for text, index in (part(model, "vocab", dict, where) or {}).items():
            check_token(text, index, where)
            ids[text] = index
    if not files.definition and files.sentencepiece is not None:
        ids |= {piece: index for index, piece in enumerate(files.sentencepiece.pieces)}
    ids |= legacy_added_tokens(files)
    return ids | {token["content"]: index for index, token in added_tokens(files).items()}


def named_token(files: TokenizerFiles, role: str) -> str | None:
    """The text of the token of this role ("bos", "eos", "pad" ...) as transformers' tokenizer has it.

    special_tokens_map.json counts where tokenizer_config.json has no `added_tokens_decoder`, and counts more then. The
    beginning and end of a tokenizer.model count where nothing else names them.
    """
    key = f"{role}_token"
    if "added_tokens_decoder" not in files.settings and key in files.special_tokens:
        return _text(files.special_tokens, key, files.where("special_tokens_map.json"))
    if key not in files.settings and not files.definition and files.sentencepiece is not None:
        return {"bos": files.sentencepiece.begin, "eos": files.sentencepiece.end}.get(role)
    return _text(files.settings, key, files.where("tokenizer_config.json"))


def _text(table: dict[str, Any], key: str, where: str) -> str | None:
    value = table.get(key)
    if isinstance(value, dict):
        return part(value, "content", str, f"{where}: {key}")
    return part(table, key, str, where)


def configured_ids(table: dict[str, Any], key: str, where: str) -> list[int]:
    """The token ids that config.json or generation_config.json has under the key; -1 stands for none.

    The text model's own configuration counts too. Raises ConvertError for what is no id.
    """
    found = []
    for config in (table, part(table, "text_config", dict, where) or {}):
        value = config.get(key)
        for index in value if isinstance(value, list) else [value]:
            if index is None or (index == -1 and not isinstance(index, float)):
                continue
            if not isinstance(index, int) or isinstance(index, bool):
                raise wrong_kind(key, index, int, where)
            if index < 0:
                raise ConvertError(f"{key} has {index}, which is no token id", f"{where}: {key}", "correct the id")
            found.append(index)
    return found


def added_around(files: TokenizerFiles, named: dict[str, int], vocab_size: int) -> AddedAround:
    """What transformers puts around every text: what the post-processor of tokenizer.json does, or else what
    `add_bos_token` and `add_eos_token` of tokenizer_config.json say.

    named: the ids of the roles. Raises ConvertError for what llama.cpp cannot do.
    """
    if not files.definition:
        return AddedAround(
            named.get("bos") if _stated(files, "bos") else None, named.get("eos") if _stated(files, "eos") else None
        )
    where = files.where("tokenizer.json")
    before: list[int] = []
    behind: list[int] = []
    between: list[int] = []
    for step in steps(files.definition, "post_processor", where):
        first, last, middle = _around(step, where)
        before, behind, between = first + before, behind + last, between or middle
    check_ids({f"token {index}": index for index in (*before, *behind)}, vocab_size, f"{where}: post_processor")
    notes = []
    if len(before) > 1:
        # A chat template has them itself.
        notes.append(
            f"The tokenizer puts the tokens {before} in front of every text. llama.cpp puts one at most, and gets none:"
            " put them in front of what has no chat template."
        )
        before = []
    if len(behind) > 1:
        raise ConvertError(
            f"the tokenizer puts the tokens {behind} behind every text: llama.cpp puts one at most",
            f"{where}: post_processor",
            "no GGUF of this tokenizer would cut text into the right tokens",
        )
    return AddedAround(next(iter(before), None), next(iter(behind), None), len(between) > len(behind) > 0, tuple(notes))


def _around(step: dict[str, Any], where: str) -> tuple[list[int], list[int], list[int]]:
    """Ids that one step of a post-processor puts in front of a text, behind it, and between two."""
    where = f"{where}: post_processor"
    match step:
        case {"type": "ByteLevel"}:
            return [], [], []
        case {
            "type": "RobertaProcessing" | "BertProcessing" as kind,
            "cls": [first, first_id],
            "sep": [last, last_id],
        }:
            check_token(first, first_id, where)
            check_token(last, last_id, where)
            return [first_id], [last_id], [last_id] * (2 if kind == "RobertaProcessing" else 1)
        case {"type": "TemplateProcessing"}:
            template = objects(step, "single", where)
            ids = {
                name: part(token, "ids", list, where)
                for name, token in (part(step, "special_tokens", dict, where) or {}).items()
                if isinstance(token, dict)
            }
            texts = [i for i, item in enumerate(template) if "Sequence" in item]
            if len(texts) == 1:
                begin = _template_ids(template[: texts[0]], ids, where)
                end = _template_ids(template[texts[0] + 1 :], ids, where)
                pair = objects(step, "pair", where)
                places = [i for i, item in enumerate(pair) if "Sequence" in item]
                middle = pair[places[0] + 1 : places[1]] if len(places) == 2 else []
                return begin, end, _template_ids(middle, ids, where)
    raise ConvertError(
        f"llama.cpp cannot do this step of the tokenizer: {str(step)[:200]}", where, "add support for it to llama.cpp"
    )


def _template_ids(items: list[dict[str, Any]], ids: dict[str, list[Any] | None], where: str) -> list[int]:
    found: list[int] = []
    for item in items:
        name = part(part(item, "SpecialToken", dict, where) or {}, "id", str, where)
        for index in ids.get(name or "") or [None]:
            check_token(name, index, where)
            found.append(index)
    return found


def _stated(files: TokenizerFiles, role: str) -> bool | None:
    return part(files.settings, f"add_{role}_token", bool, files.where("tokenizer_config.json"))


def added_around_keys(files: TokenizerFiles, around: AddedAround) -> tuple[dict[str, bool], list[str]]:
    """Whether llama.cpp is to put a beginning ("bos") and an end ("eos") around a text, and what there is to say. An
    end is left out where nothing names it: llama.cpp puts none then."""
    adds = {"bos": around.begin is not None, "eos": around.end is not None}
    notes = []
    for role, does in adds.items():
        stated = _stated(files, role)
        if files.definition and stated is not None and stated != does:
            notes.append(
                f"tokenizer_config.json has add_{role}_token = {str(stated).lower()}, but the post-processor of "
                f"tokenizer.json {'adds one' if does else 'adds none'}; transformers does the latter, and so does the "
                "GGUF."
            )
    if not adds["eos"] and _stated(files, "eos") is None:
        del adds["eos"]
    return adds, notes
