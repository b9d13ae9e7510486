"""What a profile's artifact is: a GGUF of block formats, or a safetensors directory of compressed-tensors schemes."""

from typing import Literal, get_args

from formats.errors import ConvertError, nearest
from formats.registry import get_format

Target = Literal["gguf", "safetensors"]

# Names of compressed-tensors' schemes; BF16 leaves a module as it is.
SCHEMES = ("BF16", "W8A8", "W8A16", "W4A16", "FP8", "NVFP4", "MXFP4")


def parse_target(value: object, where: str) -> Target:
    for target in get_args(Target):
        if value == target:
            return target
    raise ConvertError(f"unknown target {value!r}", where, nearest(str(value), list(get_args(Target))))


def format_name(name: object, where: str, target: Target) -> str:
    """The name as the target's registry spells it; an unknown one is an error with the nearest match."""
    if not isinstance(name, str):
        raise ConvertError(f"a format is named by a text, not {name!r}", where, 'write for example "Q4_K"')
    if target == "gguf":
        return get_format(name, where).name
    if name.upper() not in SCHEMES:
        raise ConvertError(f"unknown scheme {name!r}", where, nearest(name, list(SCHEMES)))
    return name.upper()


def require_writer(target: Target, profile: str) -> None:
    """Raises ConvertError for a target that cannot be written yet."""
    if target == "safetensors":
        raise ConvertError(
            f"the profile {profile!r} is for a safetensors directory, which this release cannot write yet",
            f"--profile {profile}",
            "`convert profiles list` names the profiles whose target is a GGUF; nvfp4 has its formats in both",
        )
