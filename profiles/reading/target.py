"""What a profile's artifact is: a GGUF of block formats, or a safetensors directory of compressed-tensors schemes."""

from typing import Literal

from bitwright.formats.errors import ConvertError, nearest
from bitwright.formats.registry import get_format
from bitwright.formats.schemes.registry import SCHEMES, get_scheme
from bitwright.profiles.reading.strict import one_of

Target = Literal["gguf", "safetensors"]

KEPT = {"BF16": 2, "F16": 2, "F32": 4}
"""In a safetensors directory: the dtypes in which a tensor is left as it is, and the bytes of a value."""


def parse_target(value: object, where: str) -> Target:
    """The target of that name; an unknown one is an error with the nearest match."""
    target: Target = one_of(value, Target, "target", where)
    return target


def format_name(name: object, where: str, target: Target) -> str:
    """The name as the target's registry spells it; an unknown one is an error with the nearest match."""
    if not isinstance(name, str):
        raise ConvertError(f"a format is named by a text, not {name!r}", where, 'write for example "Q4_K"')
    if target == "gguf":
        return get_format(name, where).name
    if name.upper() in KEPT:
        return name.upper()
    try:
        return get_scheme(name, where).name
    except ConvertError as error:
        raise ConvertError(error.what, error.where, nearest(name, [*SCHEMES, *KEPT])) from None
