"""Names that people have for sizes and formats, as profiles: --profile Q4_K_M, Q8_0, fp8-dynamic.

A mix of llama.cpp's is a budget of its size, a single format is that format throughout, and what has a preset of its
own is that preset.
"""

from bitwright.formats.registry import FORMATS
from bitwright.profiles.mixes import MIXES

# Presets by other names that people have for what they make.
_PRESETS = {
    "F16": "fp16-baseline",
    "FP16": "fp16-baseline",
    "Q8_0": "uniform-8bit",
    "TQ2_0": "ternary",
    "FP8-dynamic": "fp8",
    "quantized.w8a8": "smoothquant-w8a8",
    "INT8": "smoothquant-w8a8",
    "quantized.w4a16": "w4a16",
    "INT4": "w4a16",
}
_SCHEMES = {"FP8-static": "FP8_STATIC", "FP8-block": "FP8_BLOCK", "quantized.w8a16": "W8A16"}
# As llama-quantize understands them.
_MIXES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def other_names() -> list[str]:
    """Every name that is understood beside those of presets and schemes, in its usual letters."""
    return list(dict.fromkeys([*_PRESETS, *_SCHEMES, *_MIXES, *MIXES, *FORMATS]))


def own_name(name: str) -> str | None:
    """The preset or scheme that people know by this name, in any letter case; None where there is none."""
    folded = {other.casefold(): own for other, own in (_PRESETS | _SCHEMES).items()}
    return folded.get(name.casefold())


def known_toml(name: str) -> tuple[str, str] | None:
    """The usual letters and the text of the profile that a mix or a format is; None for another name."""
    usual = {other.casefold(): other for other in other_names()}.get(name.casefold())
    mix = _MIXES.get(usual or "", usual)
    if mix in MIXES:
        return mix, (
            f'description = "every tensor\'s format chosen by what it was measured to cost, at the size of {mix}"\n'
            f'good_for = "the best file of the size that llama.cpp\'s {mix} has"\n'
            f'extends = "budget"\n\n[budget]\nmix = "{mix}"\n'
        )
    if usual in FORMATS:
        return usual, (
            f'description = "{usual} for every matrix"\n'
            'good_for = "this format throughout, as it is; docs/encoders.md compares them"\n'
            f'base = "{usual}"\n'
        )
    return None
