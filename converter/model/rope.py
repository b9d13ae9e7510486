"""Rotary embeddings: the configuration's two spellings made one, and what llama.cpp wants to know of them."""

import math
from typing import Any

import numpy as np
from gguf import MODEL_TENSOR, TENSOR_NAMES, GGUFValueType
from gguf.gguf_writer import GGUFValue

from bitwright.converter.architectures.refusal import NotInLlamaCpp
from bitwright.converter.source.values import count, float32, is_count, is_number, is_positive, table, uint32
from bitwright.formats.errors import ConvertError, nearest

FREQUENCIES = f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight"
LONG_FACTORS = f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FACTORS_LONG]}.weight"
SHORT_FACTORS = f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FACTORS_SHORT]}.weight"


# Keys of a rope table that transformers reads, by its type; in every table it reads rope_theta and, where the
# architecture turns a part of the heads' columns only, partial_rotary_factor.
_READ = {
    "default": (),
    "dynamic": ("factor",),
    "linear": ("factor",),
    "proportional": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor", "long_factor", "short_factor"),
}
_READ_IN_ALL = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
# In tables of every type; where it means nothing, transformers leaves it alone.
_HARMLESS = ("original_max_position_embeddings", "finetuned")
_NEEDED = {
    "dynamic": ("factor",),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("long_factor", "short_factor"),
}
# What llama.cpp computes yarn with in every architecture that is converted: it reads the keys of others only.
_YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}


def rope_parameters(
    values: dict[str, Any], supported: tuple[str, ...], local: bool, where: str, keys: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The rotary parameters of the full-attention layers, from a completed configuration.

    transformers 4 spells them `rope_theta` and `rope_scaling`; transformers 5 `rope_parameters`, one table or, where
    local says so, one for each kind of layer. Of both spellings the older has the word, as in transformers. The result
    always has rope_type, rope_theta, partial_rotary_factor, max_position_embeddings and
    original_max_position_embeddings; sliding_theta is the base of the sliding-window layers, None where they have none
    of their own. keys: of tables, that the architecture reads beside the usual ones. Entries without a value are left
    out, but for truncate, where transformers takes null for false.
    Raises ConvertError for what is no table, for a key in one that has no effect to know of, and for a scaling that
    llama.cpp does not implement for the architecture, which are all but those supported.
    """
    older, newer = table(values, "rope_scaling", where), table(values, "rope_parameters", where)
    sliding: dict[str, Any] = {}
    if local:
        _check_keys(newer, ("full_attention", "sliding_attention"), "rope_parameters", where)
        sliding = table(newer, "sliding_attention", where)
        stated = {**table(newer, "full_attention", where), **older}
    else:
        stated = older or newer
    kind = stated.get("rope_type", stated.get("type", "default"))
    if kind == "su":  # longrope's first name
        kind = "longrope"
    if kind == "mrope" and "mrope_section" in keys:  # the usual one, of positions in text and image
        kind = "default"
    if kind not in supported:
        raise _not_implemented(kind, supported, where)
    _check_keys(stated, (*_READ[kind], *_READ_IN_ALL, *_HARMLESS, *keys), f"the rope table of type {kind!r}", where)
    if "truncate" in stated:
        stated = {**stated, "truncate": bool(stated["truncate"])}
    longest = count(values, "max_position_embeddings", where)
    rope = {
        "rope_theta": values.get("rope_theta"),
        "partial_rotary_factor": values.get("partial_rotary_factor", 1.0),
        "original_max_position_embeddings": longest,
        **{key: value for key, value in stated.items() if value is not None},
        "rope_type": kind,
        "sliding_theta": _sliding_theta(sliding, values, where) if local else None,
        "max_position_embeddings": longest,
    }
    if "original_max_position_embeddings" in values:  # outside of the table (phi3), and then it has the last word
        rope["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    original = rope["original_max_position_embeddings"]
    # transformers demands the key of yarn, and takes null for this quotient.
    if "factor" not in rope and (kind == "longrope" or (kind == "yarn" and "factor" in stated)) and is_count(original):
        rope["factor"] = longest / original
    return rope


def _sliding_theta(sliding: dict[str, Any], values: dict[str, Any], where: str) -> Any:
    _check_keys(sliding, ("rope_theta", "rope_type", "type"), "the rope table of sliding_attention", where)
    kind = sliding.get("rope_type", sliding.get("type", "default"))
    if kind != "default":
        raise _not_implemented(kind, ("default",), where)
    return sliding.get("rope_theta", values.get("rope_local_base_freq"))


def _check_keys(stated: dict[str, Any], known: tuple[str, ...], what: str, where: str) -> None:
    for key in stated:
        if key not in known:
            raise ConvertError(
                f"{what} has the key {key!r}, which has no counterpart in a GGUF",
                f"{where}: {key}",
                f"{nearest(key, list(known))}; take the key out where the model does not depend on it",
            )


def _not_implemented(kind: object, supported: tuple[str, ...], where: str) -> ConvertError:
    return ConvertError(
        f"llama.cpp does not implement the rope scaling {kind!r} for this architecture",
        f"{where}: rope_type",
        f"supported: {', '.join(supported)}",
    )


def check_rope(rope: dict[str, Any], rotary: int, where: str, keys: tuple[str, ...], made_of: str) -> None:
    """Raises ConvertError for parameters that are absent or senseless, and for numbers that llama.cpp would not follow.
    rotary: columns of a head that are turned, made_of: of what keys. keys: of which the architecture's data file says
    itself what follows."""
    kind = rope["rope_type"]
    if rotary < 2 or rotary % 2:
        raise ConvertError(
            f"the rotary embedding turns {rotary} columns of a head, which is no even number: they are {made_of}",
            f"{where}: head_dim",
            "fetch config.json of the same revision again",
        )
    original = rope["original_max_position_embeddings"]
    if not is_count(original) or original < 2:
        raise _invalid("original_max_position_embeddings", kind, where)
    stated = (key for key in (*_READ[kind], "sliding_theta") if rope.get(key) is not None)
    for key in dict.fromkeys(("rope_theta", *_NEEDED.get(kind, ()), *stated)):
        _check_value(key, rope.get(key), kind, rotary, where)
    if kind == "llama3" and rope["high_freq_factor"] < rope["low_freq_factor"]:
        raise _invalid("high_freq_factor, which has to be as large as low_freq_factor", kind, where)
    if kind == "yarn":
        _check_yarn(rope, rotary, where, keys)


def _check_value(key: str, value: Any, kind: str, rotary: int, where: str) -> None:
    if key == "truncate":
        valid = isinstance(value, bool)
    elif key in ("long_factor", "short_factor"):
        valid = isinstance(value, list) and len(value) == rotary // 2 and all(map(is_positive, value))
    elif key in ("rope_theta", "sliding_theta"):
        valid = is_number(value) and value > 1
    elif key in ("mscale", "mscale_all_dim", *_YARN_BETAS):  # zero is none to transformers
        valid = is_number(value) and value >= 0
    else:
        valid = is_positive(value)
    if not valid:
        raise _invalid(key, kind, where)


def _invalid(key: str, kind: str, where: str) -> ConvertError:
    return ConvertError(
        f"the rope parameters of type {kind!r} lack a valid {key}",
        f"{where}: rope_scaling or rope_parameters",
        "fetch config.json of the same revision again",
    )


def _check_yarn(rope: dict[str, Any], rotary: int, where: str, keys: tuple[str, ...]) -> None:
    """Refuse what would give other frequencies than llama.cpp's; a value that changes none is none to name."""

    def bounds(key: str) -> tuple[float, float]:
        """The dimensions between which yarn blends, with the value of this key and llama.cpp's of the others."""
        betas = {name: (rope.get(name) or usual) if name == key else usual for name, usual in _YARN_BETAS.items()}
        original, theta = rope["original_max_position_embeddings"], rope["rope_theta"]
        low, high = (
            rotary * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(theta)) for beta in betas.values()
        )
        if key != "truncate" or rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        return max(low, 0), min(high, rotary - 1)

    for key, usual in (*_YARN_BETAS.items(), ("truncate", True)):
        if key not in keys and bounds(key) != bounds(""):
            raise NotInLlamaCpp(
                f"llama.cpp computes yarn with {key} = {usual!r} only, this model has {rope[key]!r}",
                f"{where}: {key}",
                "no GGUF of this model would run correctly in llama.cpp",
            )


def rope_metadata(rope: dict[str, Any], where: str, yarn_attention: float | None = None) -> dict[str, GGUFValue]:
    """GGUF keys, without the architecture's prefix, of parameters that `check_rope` has passed. yarn_attention: what
    llama.cpp multiplies cosines and sines with under yarn by itself; None for the usual."""
    kind, values = rope["rope_type"], {"rope.freq_base": float32(rope["rope_theta"], "rope_theta", where)}
    if rope["sliding_theta"] is not None:
        values["rope.freq_base_swa"] = float32(rope["sliding_theta"], "rope_theta of sliding_attention", where)
    if kind in ("linear", "yarn"):
        values["rope.scaling.type"] = GGUFValue(kind, GGUFValueType.STRING)
        values["rope.scaling.factor"] = float32(rope["factor"], "factor", where)
    if kind == "yarn":
        original = "original_max_position_embeddings"
        values["rope.scaling.original_context_length"] = uint32(rope[original], original, where)
        for key in _YARN_BETAS:
            if rope.get(key):
                values[f"rope.scaling.yarn_{key}"] = float32(rope[key], key, where)
    # llama.cpp applies an attention factor of yarn by itself; this key multiplies whatever it applies.
    usual = 1.0
    if kind == "yarn":
        usual = _mscale(rope["factor"]) if yarn_attention is None else yarn_attention
    extra = attention_factor(rope) / usual
    if kind == "longrope" or extra != 1.0:
        values["rope.scaling.attn_factor"] = float32(extra, "attention_factor", where)
    return values


def rope_factors(rope: dict[str, Any], rotary: int) -> dict[str, tuple[float, ...]]:
    """The tensors that hold a divisor for each of the rotary // 2 frequencies, by GGUF name."""
    if rope["rope_type"] == "llama3":
        return {FREQUENCIES: llama3_factors(rope, rotary)}
    if rope["rope_type"] == "proportional":
        return {FREQUENCIES: _proportional_factors(rope, rotary)}
    if rope["rope_type"] == "longrope":
        return {LONG_FACTORS: tuple(rope["long_factor"]), SHORT_FACTORS: tuple(rope["short_factor"])}
    return {}


def _mscale(factor: float, strength: float = 1.0) -> float:
    return 0.1 * strength * math.log(factor) + 1.0 if factor > 1 else 1.0


def attention_factor(rope: dict[str, Any]) -> float:
    """What the cosines and sines are multiplied by (transformers' modeling_rope_utils)."""
    kind = rope["rope_type"]
    if kind not in ("yarn", "longrope"):
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if kind == "yarn":
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            return _mscale(rope["factor"], rope["mscale"]) / _mscale(rope["factor"], rope["mscale_all_dim"])
        return _mscale(rope["factor"])
    factor, original = rope["factor"], rope["original_max_position_embeddings"]
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _proportional_factors(rope: dict[str, Any], rotary: int) -> tuple[float, ...]:
    """A first part of the frequencies is kept, and the others turn nothing: as good as nothing, after this divisor."""
    n_turned = int(rope["partial_rotary_factor"] * rotary // 2)
    return (float(rope.get("factor", 1.0)),) * n_turned + (1e30,) * (rotary // 2 - n_turned)


def llama3_factors(rope: dict[str, Any], rotary: int) -> tuple[float, ...]:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    # In float32 as transformers computes the frequencies, so that the factors come out the same.
    exponents = np.arange(0, rotary, 2, dtype=np.float32) / np.float32(rotary)
    wavelengths = np.float32(2 * math.pi) * np.float32(rope["rope_theta"]) ** exponents
    with np.errstate(all="ignore"):  # outside of what lies between, the blend is not taken
        smooth = (original / wavelengths - low) / np.float32(high - low)
        blended = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelengths < original / high, 1, np.where(wavelengths > original / low, factor, blended))
    return tuple(float(value) for value in factors.astype(np.float32))
