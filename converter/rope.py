"""Rotary embeddings: the configuration's two spellings made one, and what llama.cpp wants to know of them."""

import math
from typing import Any

import numpy as np
from gguf import MODEL_TENSOR, TENSOR_NAMES, GGUFValueType
from gguf.gguf_writer import GGUFValue

from formats.errors import ConvertError

FREQUENCIES = f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight"
LONG_FACTORS = f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FACTORS_LONG]}.weight"
SHORT_FACTORS = f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FACTORS_SHORT]}.weight"


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters of the full-attention layers, from a completed configuration.

    transformers 4 spells them `rope_theta` and `rope_scaling`; transformers 5 `rope_parameters`, one table or one for
    each kind of layer. The result always has rope_type and rope_theta, and original_max_position_embeddings where the
    scaling needs it; sliding_theta is the base of the sliding-window layers, None where they have none of their own.
    """
    stated = config.get("rope_scaling") or config.get("rope_parameters") or {}
    sliding = (stated.get("sliding_attention") or {}).get("rope_theta", config.get("rope_local_base_freq"))
    stated = stated.get("full_attention", stated)
    rope = {
        "rope_theta": config.get("rope_theta"),
        "original_max_position_embeddings": config["max_position_embeddings"],
        **stated,
        "rope_type": stated.get("rope_type", stated.get("type", "default")),
        "sliding_theta": sliding,
        "max_position_embeddings": config["max_position_embeddings"],
    }
    if "original_max_position_embeddings" in config:  # outside of the table (phi3), and then it has the last word
        rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    if rope["rope_type"] == "su":  # longrope's first name
        rope["rope_type"] = "longrope"
    return rope


def check_rope(rope: dict[str, Any], supported: tuple[str, ...], rotary: int, where: str) -> None:
    """Raises ConvertError for a scaling that llama.cpp does not implement for the architecture, or an incomplete one.
    rotary: dimensions of a head that are turned."""
    kind = rope["rope_type"]
    if kind not in supported:
        raise ConvertError(
            f"llama.cpp does not implement the rope scaling {kind!r} for this architecture",
            f"{where}: rope_type",
            f"supported: {', '.join(supported)}",
        )
    needed = {"linear": ("factor",), "yarn": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    numbers = ("rope_theta", "original_max_position_embeddings", *needed.get(kind, ()))
    absent = [key for key in numbers if not isinstance(rope.get(key), int | float) or rope[key] <= 0]
    if kind == "longrope":
        absent += [key for key in ("long_factor", "short_factor") if len(rope.get(key) or ()) != rotary // 2]
    if absent:
        raise ConvertError(
            f"the rope parameters of type {kind!r} lack a valid {absent[0]}",
            f"{where}: rope_scaling or rope_parameters",
            "fetch config.json of the same revision again",
        )


def rope_metadata(rope: dict[str, Any]) -> dict[str, GGUFValue]:
    """GGUF keys, without the architecture's prefix."""

    def f32(value: float) -> GGUFValue:
        return GGUFValue(float(value), GGUFValueType.FLOAT32)

    kind, values = rope["rope_type"], {"rope.freq_base": f32(rope["rope_theta"])}
    if rope["sliding_theta"] is not None:
        values["rope.freq_base_swa"] = f32(rope["sliding_theta"])
    if kind in ("linear", "yarn"):
        values["rope.scaling.type"] = GGUFValue(kind, GGUFValueType.STRING)
        values["rope.scaling.factor"] = f32(rope["factor"])
    if kind == "yarn":
        original = rope["original_max_position_embeddings"]
        values["rope.scaling.original_context_length"] = GGUFValue(int(original), GGUFValueType.UINT32)
        for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if rope.get(ours) is not None:
                values[f"rope.scaling.{theirs}"] = f32(rope[ours])
    # llama.cpp applies yarn's usual attention factor by itself; this key multiplies whatever it applies.
    extra = _attention_factor(rope) / (_mscale(rope["factor"]) if kind == "yarn" else 1.0)
    if kind == "longrope" or extra != 1.0:
        values["rope.scaling.attn_factor"] = f32(extra)
    return values


def rope_factors(rope: dict[str, Any], rotary: int) -> dict[str, tuple[float, ...]]:
    """The tensors that hold a divisor for each of the rotary // 2 frequencies, by GGUF name."""
    if rope["rope_type"] == "llama3":
        return {FREQUENCIES: _llama3_factors(rope, rotary)}
    if rope["rope_type"] == "longrope":
        return {LONG_FACTORS: tuple(rope["long_factor"]), SHORT_FACTORS: tuple(rope["short_factor"])}
    return {}


def _mscale(factor: float, strength: float = 1.0) -> float:
    return 0.1 * strength * math.log(factor) + 1.0 if factor > 1 else 1.0


def _attention_factor(rope: dict[str, Any]) -> float:
    """What the cosines and sines are multiplied by (transformers' modeling_rope_utils)."""
    kind = rope["rope_type"]
    if kind not in ("yarn", "longrope"):
        return 1.0
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    if kind == "yarn":
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            return _mscale(rope["factor"], rope["mscale"]) / _mscale(rope["factor"], rope["mscale_all_dim"])
        return _mscale(rope["factor"])
    original = rope["original_max_position_embeddings"]
    factor = rope["max_position_embeddings"] / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _llama3_factors(rope: dict[str, Any], rotary: int) -> tuple[float, ...]:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    # In float32 as transformers computes the frequencies, so that the factors come out the same.
    exponents = np.arange(0, rotary, 2, dtype=np.float32) / np.float32(rotary)
    wavelengths = np.float32(2 * math.pi) * np.float32(rope["rope_theta"]) ** exponents
    with np.errstate(divide="ignore"):  # low == high leaves nothing between
        smooth = (original / wavelengths - low) / np.float32(high - low)
    blended = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelengths < original / high, 1, np.where(wavelengths > original / low, factor, blended))
    return tuple(float(value) for value in factors.astype(np.float32))
