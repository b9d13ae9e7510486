"""`quantization_config` of a directory's config.json, in the words that compressed-tensors' schema allows.

Every group of modules that share a scheme is one entry of config_groups. One scheme throughout is said as everybody
does: the target "Linear", the output head where it is quantized, and an `ignore` list of what is kept. Several schemes
have targets that name their modules, by regular expressions over the ends of the names: runtimes put different prefixes
in front of the same module.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from bitwright.formats.schemes.cache_scheme import CACHE_SCHEMES
from bitwright.formats.schemes.expert_names import NUMBERED
from bitwright.formats.schemes.registry import Scheme, get_scheme
from bitwright.formats.schemes.scheme import ActivationScheme
from bitwright.profiles.planning.plan_modules import ModulePlan, PlannedModule
from bitwright.profiles.vocabulary import Role

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")  # of a layer or an expert, in a module's name
# The names that a text model's modules have in every runtime.
_PLAIN = re.compile(r"(model\.layers\..*|lm_head)")
_LAYERS = re.compile(r"\b(?:layers|layer|blocks|h)\.(?=[#\d])")
_EXPERT = re.compile(rf"(?<=\\\.)({'|'.join(NUMBERED)})$")  # in an escaped name
_MIXED = "mixed-precision"
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def quantization_config(plan: ModulePlan) -> dict[str, Any]:
    """The configuration of a plan of modules.

    Raises ValueError for a plan that quantizes nothing.
    """
    rows = plan.tensors
    groups: dict[str, list[str]] = {}
    for row in rows:
        if row.scheme is not None:
            groups.setdefault(row.format, []).extend(_names(row))
    if not groups:
        raise ValueError("a plan without any scheme has no quantization_config")
    kept = [row for row in rows if row.scheme is None and row.tensor.name.endswith(".weight")]
    matrices = [row for row in kept if len(row.tensor.shape) == 2 and row.tensor.role is not Role.EMBEDDING]
    linear = [name for row in matrices for name in _names(row)]
    others = {row.module for row in kept if row.tensor.role is Role.OTHER and row.tensor.layer is None}
    quantized = {name for names in groups.values() for name in names}
    ignore = [*_ignored(linear, others, quantized), *_kept_experts(rows)]
    if plan_is_tied(rows):
        ignore.append("lm_head" if all(map(_is_plain, linear)) else "re:.*lm_head$")
    schemes = [get_scheme(name, "plan") for name in groups]
    formats = {scheme.format for scheme in schemes}
    targets = [_patterns(modules, rows) for modules in groups.values()]
    if len(groups) == 1:
        heads = [name for row in rows if row.scheme and row.tensor.role is Role.OUTPUT for name in _names(row)]
        targets = [["Linear", *_patterns(heads, rows)]]  # vLLM's class of an output head is no Linear
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else _MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": _group(scheme, names) for i, (scheme, names) in enumerate(zip(schemes, targets, strict=True))
        },
        "ignore": ignore,
        "kv_cache_scheme": _activations(CACHE_SCHEMES["FP8"]) if any(row.cache_scales for row in rows) else None,
    }


def stored_dtype(plan: ModulePlan) -> str:
    """The dtype that a runtime computes in, as config.json names it: that of the matrices that are kept, or bfloat16
    where there is FP4, which transformers decodes to no other and multiplies with inputs of the model's."""
    weights = [row.scheme.weights for row in plan.tensors if row.scheme is not None]
    if any(scheme.type == "float" and scheme.num_bits == 4 for scheme in weights):
        return "bfloat16"
    return _DTYPES[next((row.format for row in plan.tensors if row.tensor.role is Role.EMBEDDING), "BF16")]


def plan_is_tied(rows: Iterable[PlannedModule]) -> bool:
    return not any(row.tensor.role is Role.OUTPUT for row in rows)


def _group(scheme: Scheme, targets: Sequence[str]) -> dict[str, Any]:
    weights, activations = scheme.weights, scheme.activations
    said: dict[str, Any] = {
        "num_bits": weights.num_bits,
        "type": weights.type,
        "strategy": weights.strategy,
        "symmetric": weights.symmetric,
        "dynamic": False,
    }
    optional = {
        "group_size": weights.group_size,
        "block_structure": list(weights.block_structure) if weights.block_structure else None,
        "scale_dtype": weights.scale_dtype,
    }
    return {
        "format": scheme.format,
        "targets": list(targets),
        "weights": said | {key: value for key, value in optional.items() if value is not None},
        "input_activations": None if activations is None else _activations(activations),
    }


def _activations(scheme: ActivationScheme) -> dict[str, Any]:
    said: dict[str, Any] = {
        "num_bits": scheme.num_bits,
        "type": scheme.type,
        "strategy": scheme.strategy,
        "symmetric": scheme.symmetric,
        "dynamic": scheme.dynamic,
    }
    optional = {"group_size": scheme.group_size, "scale_dtype": scheme.scale_dtype}
    return said | {key: value for key, value in optional.items() if value is not None}


def _ignored(modules: Sequence[str], others: set[str], quantized: set[str]) -> list[str]:
    """Names, exact for the text model; what lies outside of it by its first parts, which no quantized module has."""
    inner = {part for name in quantized for part in name.split(".")}
    towers = {name for name in others if _first_parts(name) not in inner}
    first = sorted({_first_parts(name) for name in towers})
    inside = [name if _is_plain(name) else _pattern(name) for name in modules if name not in towers]
    return [*inside, *(f"re:.*{re.escape(part)}.*" for part in first)]


def _names(row: PlannedModule) -> list[str]:
    """What the module is called: as it is stored, and by transformers where that is another name."""
    return [row.module, *([row.tensor.module] if row.tensor.module else [])]


def _kept_experts(rows: Iterable[PlannedModule]) -> list[str]:
    """The experts of every layer that are kept, and stored as one: runtimes multiply them in a module of their own."""
    stacked = (row for row in rows if row.scheme is None and len(row.tensor.shape) > 2 and row.tensor.layer is not None)
    parents = (row.module.rpartition(".")[0] for row in stacked)
    return [_pattern(name) for name in dict.fromkeys(parents) if name.endswith(".experts")]


def _is_plain(name: str) -> bool:
    """Whether every runtime calls the module so."""
    return _PLAIN.fullmatch(name) is not None and name.rpartition(".")[2] not in NUMBERED


def _first_parts(name: str) -> str:
    """The part that tells the image encoder from the text model: "vision_tower" of "model.vision_tower.x.y"."""
    parts = name.split(".")
    return parts[1] if parts[0] == "model" and len(parts) > 1 else parts[0]


def _patterns(modules: Sequence[str], rows: Sequence[PlannedModule]) -> list[str]:
    """Regular expressions that match these modules and no other matrix of the plan."""
    chosen = set(modules)
    templates: dict[str, list[str]] = {}
    for row in rows:
        if row.tensor.name.endswith(".weight") and len(row.tensor.shape) == 2:
            for name in _names(row):
                templates.setdefault(_INDEX.sub("#", name), []).append(name)
    patterns = []
    for template in dict.fromkeys(_INDEX.sub("#", name) for name in modules):
        named = [name for name in templates[template] if name in chosen]
        if len(named) == len(templates[template]):
            patterns.append(_pattern(template, r"\d+"))
        else:
            layers = dict.fromkeys(match[0] for name in named if (match := _INDEX.search(name)))
            patterns.append(_pattern(template, f"(?:{'|'.join(layers)})"))
    return patterns


def _pattern(name: str, layer: str = "") -> str:
    """re: over a module's name from "layers" on, or what the model calls them, or over its last part where it is in no
    layer; an expert's by either of its names. layer: stands for the first # of a template; all other # are free."""
    layers = _LAYERS.search(name)
    end = name[layers.start() if layers else name.rfind(".") + 1 :]
    escaped = re.escape(end).replace(r"\#", layer, 1).replace(r"\#", r"\d+")
    return "re:.*" + _EXPERT.sub(lambda match: f"(?:{match[0]}|{NUMBERED[match[0]]})", escaped) + "$"
