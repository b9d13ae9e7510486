"""The chat templates of a checkpoint, as transformers' tokenizer has them."""

import os
from string import ascii_letters, digits

from bitwright.converter.tokenizer.files import TokenizerFiles, objects, part, read_json, wrong_kind
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.regular_file import LARGEST_METADATA_BYTES, read_whole

DEFAULT = "default"


def chat_templates(files: TokenizerFiles) -> tuple[dict[str, str], list[str]]:
    """The templates by name, "default" first, in the alphabet that a GGUF's key takes; and what there is to say.

    Files of templates take the place of all that tokenizer_config.json has; chat_template.json, which the processor of
    a multimodal model reads, counts where neither is there. Raises ConvertError.
    """
    settings = _of_settings(files)
    separate = _of_files(files)
    templates = separate or settings or _of_processor(files)
    notes = []
    if separate and settings and separate != settings:
        notes.append(
            "tokenizer_config.json has another chat template than chat_template.jinja and additional_chat_templates/; "
            "transformers uses the files, and so does the GGUF."
        )
    if templates and DEFAULT not in templates:
        notes.append(
            f"None of the chat templates is the default one: {', '.join(templates)}. llama.cpp will use one of its own "
            "where none is asked for by name."
        )
    return _in_gguf_alphabet(templates, str(files.directory)), notes


def _of_files(files: TokenizerFiles) -> dict[str, str]:
    paths = {DEFAULT: files.directory / "chat_template.jinja"}
    paths |= {path.stem: path for path in sorted(files.directory.glob("additional_chat_templates/*.jinja"))}
    templates = {}
    for name, path in paths.items():
        if not os.path.lexists(path):
            continue
        try:
            text = read_whole(path, LARGEST_METADATA_BYTES, "fetch it again").decode()
            templates[name] = text.replace("\r\n", "\n").replace("\r", "\n")  # as transformers opens it
        except UnicodeDecodeError as error:
            raise ConvertError(f"the chat template cannot be read: {error}", str(path), "fetch it again") from None
    return templates


def _of_settings(files: TokenizerFiles) -> dict[str, str]:
    where = files.where("tokenizer_config.json")
    match files.settings.get("chat_template"):
        case None:
            return {}
        case str() as template:
            return {DEFAULT: template}
        case dict() as named:
            return {name: part(named, name, str, f"{where}: chat_template") or "" for name in named}
        case list():
            templates = {}
            for entry in objects(files.settings, "chat_template", where):
                name = part(entry, "name", str, f"{where}: chat_template")
                if name is None:
                    raise ConvertError("a chat template has no name", f"{where}: chat_template", "name it")
                templates[name] = part(entry, "template", str, f"{where}: chat_template") or ""
            return templates
        case other:
            raise wrong_kind("chat_template", other, str, where)


def _of_processor(files: TokenizerFiles) -> dict[str, str]:
    path = files.directory / "chat_template.json"
    template = part(read_json(path), "chat_template", str, str(path))
    return {} if template is None else {DEFAULT: template}


def _in_gguf_alphabet(templates: dict[str, str], where: str) -> dict[str, str]:
    renamed: dict[str, str] = {}
    for name in sorted(templates, key=lambda name: (name != DEFAULT, name)):
        key = "".join(character if character in ascii_letters + digits else "_" for character in name)
        if not key or key in renamed:
            raise ConvertError(
                f"the chat template {name!r} has no name of its own in a GGUF, which knows letters, digits and _ only",
                where,
                "rename it",
            )
        renamed[key] = templates[name]
    return renamed
