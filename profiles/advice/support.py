"""What a device runs of a plan: number formats by runtime."""

from collections.abc import Iterable
from dataclasses import dataclass

from bitwright.profiles.advice.hardware import Device, Runtime, Support

_WORDS = {"W8A8": "INT8 products", "FP8": "FP8", "NVFP4": "NVFP4", "MXFP4": "MXFP4", "W4A16": "INT4 weights"}


@dataclass(frozen=True)
class Verdict:
    """support: how the runtime computes with the formats, the worst of them. why: in words, where it is not native;
    empty otherwise."""

    support: Support
    why: str


def scheme_family(scheme: str) -> str:
    """The number format of a scheme: "FP8_BLOCK" is FP8, "W4A16_G32" is W4A16, "BF16" itself."""
    for family in ("NVFP4", "MXFP4", "W4A16", "W8A16", "W8A8", "FP8"):
        if scheme.startswith(family):
            return "W4A16" if family == "W8A16" else family
    return scheme


def supported(device: Device, runtime: Runtime, formats: Iterable[str]) -> Verdict:
    """Whether the runtime runs these formats of matrices on the device."""
    if runtime == "llama.cpp":
        decoded = [
            name for name in dict.fromkeys(formats) if name in ("NVFP4", "MXFP4") and name not in _native(device)
        ]
        return Verdict("weights" if decoded else "native", f"{decoded[0]} is decoded on the way" if decoded else "")
    if not device.architecture.vllm:
        return Verdict("none", f"vLLM has no kernels for {device.architecture.name} here")
    worst = Verdict("native", "")
    for name in dict.fromkeys(map(scheme_family, formats)):
        if name not in _WORDS:
            continue
        support = device.architecture.vllm.get(name, "none")
        if support == "none":
            return Verdict("none", _missing(device, name))
        if support == "weights" and name != "W4A16":  # whose weights are all that is quantized
            worst = Verdict("weights", f"{_WORDS[name]} as weights only there, products in 16 bits")
    return worst


def _native(device: Device) -> set[str]:
    return {name for name, support in device.architecture.llama_cpp.items() if support == "native"}


def _missing(device: Device, name: str) -> str:
    if name == "W8A8" and device.rates.get("int8", 0) > 0:
        return f"its rate in INT8 is {device.rates['int8'] / 1e12:.0f} TOP/s, less than in 16 bits"
    return f"vLLM has no kernel for {_WORDS[name]} on {device.architecture.name}"
