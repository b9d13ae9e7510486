"""What is said of a model type without a data file: who else knows it, what is missing, and which ways remain."""

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from gguf import MODEL_ARCH_NAMES

from bitwright.formats.errors import ConvertError

_BY_GGUF = (
    "convert a BF16 GGUF that llama.cpp's own converter makes of it (convert_hf_to_gguf.py MODEL --outtype bf16):"
    " a GGUF of any architecture can be converted"
)
_BY_DIRECTORY = "make a directory for vLLM and transformers, which takes no data file: --profile fp8, or w4a16"
_ADD = "docs/add-an-architecture.md tells how to add one"


class NotInLlamaCpp(ConvertError):
    """A configuration that llama.cpp computes otherwise than transformers does: what makes no GGUF may go on."""


def unsupported(config: Mapping[str, Any], where: str) -> ConvertError:
    """The refusal of a configuration whose `model_type` has no data file. where: the configuration's file."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        return ConvertError(
            "the configuration names no architecture (model_type)", f"{where}: model_type", "fetch config.json again"
        )
    decoder, known = decoder_class(model_type), _is_known_to_transformers(model_type)
    gguf_name, lacks = llama_cpp_name(model_type), _table().get(model_type, {}).get("lacks")
    ways = [way for way, open_ in ((_BY_GGUF, gguf_name), (_BY_DIRECTORY, decoder)) if open_]
    others = [
        f"llama.cpp has it as {gguf_name!r}" if gguf_name else "nor is it known that llama.cpp has it",
        f"transformers has it as {decoder}"
        if decoder
        else "transformers has it, and not as a decoder"
        if known
        else "transformers does not have it",
    ]
    key = "model_type"
    if "auto_map" in config and not known:
        what = f"the model (model_type {model_type!r}) needs code from its repository, and remote code is never run"
        key = "auto_map"
    else:
        what = f"the architecture {model_type!r} has no data file here"
        what += f": it needs {lacks}" if lacks else ""
    return ConvertError("; ".join([what, *others]), f"{where}: {key}", "; or ".join(ways) if ways else _ADD)


def llama_cpp_name(model_type: str) -> str | None:
    """llama.cpp's architecture of a model type without a data file; None where nothing is known of one."""
    if (entry := _table().get(model_type)) is not None:
        return entry["gguf"]
    by_plain_name = {_plain(name): name for name in MODEL_ARCH_NAMES.values()}
    return by_plain_name.get(_plain(model_type.removesuffix("_text")))


def decoder_class(model_type: str) -> str | None:
    """transformers' class of a causal language model of this type; None where it has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    return found if found is None or isinstance(found, str) else str(found[0])


def _is_known_to_transformers(model_type: str) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


@cache
def _table() -> dict[str, dict[str, str]]:
    table = files("bitwright.converter").joinpath("architectures", "tables", "refused.toml")
    return tomllib.loads(table.read_text("utf-8"))


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "").lower()
