"""llama.cpp's own mixes: which type `llama-quantize` gives every tensor of a dense model under a file type's name.

The rules of llama_tensor_get_type in src/llama-quant.cpp, for an importance matrix that is there, rows that every block
divides, and a model that is neither MoE nor of 70B shape: the ones that the benchmarks stand beside.
"""

from collections.abc import Callable, Mapping

from bitwright.profiles.vocabulary import UNQUANTIZED_ROLES, ModelMap, Role, TensorSpec

Layer = Callable[[int, int], bool]
"""(layer, layers) -> whether the rule is for it."""


def _first(divisor: int) -> Layer:
    return lambda layer, n_layers: layer < n_layers // divisor


def _more(layer: int, n_layers: int) -> bool:
    """use_more_bits: the first and the last eighth, and every third layer between."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def _all(layer: int, n_layers: int) -> bool:
    return True


VALUE, OUTPUT, DOWN = Role.ATTENTION_VALUE, Role.ATTENTION_OUTPUT, Role.MLP_DOWN
QUERY, KEY = Role.ATTENTION_QUERY, Role.ATTENTION_KEY

_SMALL = [(VALUE, _all, ("Q2_K", "Q4_K")), (DOWN, _first(8), "Q2_K")]
_SMALLEST = [*_SMALL, (OUTPUT, _all, "IQ2_XXS")]

# File type -> (base, type of the embedding, of the output head, rules); of the rules for a role the first one that
# holds for the layer decides. A value that four query heads or more share has the second type of its pair.
_RULES: Mapping[str, tuple[str, str, str, list[tuple[Role, Layer, str | tuple[str, str]]]]] = {
    "IQ1_S": ("IQ1_S", "Q2_K", "Q5_K", _SMALLEST),
    "IQ1_M": ("IQ1_M", "Q2_K", "Q5_K", _SMALLEST),
    "IQ2_XXS": ("IQ2_XXS", "Q2_K", "Q5_K", _SMALL),
    "IQ2_XS": ("IQ2_XS", "Q2_K", "Q5_K", _SMALL),
    "IQ2_M": (
        "IQ2_S",
        "IQ3_S",
        "Q5_K",
        [(VALUE, _all, ("IQ3_S", "Q4_K")), (OUTPUT, _all, "IQ3_S"), (DOWN, _first(8), "IQ3_S")],
    ),
    "Q2_K_S": ("Q2_K", "Q2_K", "Q6_K", [(VALUE, _all, ("Q2_K", "Q4_K")), (DOWN, _first(8), "Q4_K")]),
    "Q2_K": ("Q2_K", "Q2_K", "Q6_K", [(VALUE, _all, ("Q3_K", "Q4_K")), (OUTPUT, _all, "Q3_K"), (DOWN, _all, "Q3_K")]),
    "IQ3_XXS": (
        "IQ3_XXS",
        "IQ3_S",
        "Q5_K",
        [(VALUE, _all, ("IQ3_XXS", "Q4_K")), (OUTPUT, _all, "IQ3_S"), (QUERY, _all, "IQ2_S"), (KEY, _all, "IQ2_S")],
    ),
    "Q3_K_M": (
        "Q3_K",
        "Q3_K",
        "Q6_K",
        [
            (VALUE, lambda layer, _: layer < 2, "Q5_K"),
            (VALUE, _all, "Q4_K"),
            (OUTPUT, _all, "Q4_K"),
            (DOWN, _first(16), "Q5_K"),
            (DOWN, _all, "Q4_K"),
        ],
    ),
    "Q4_K_S": ("Q4_K", "Q4_K", "Q6_K", [(VALUE, lambda layer, _: layer < 4, "Q5_K"), (DOWN, _first(8), "Q5_K")]),
    "Q4_K_M": ("Q4_K", "Q4_K", "Q6_K", [(VALUE, _more, "Q6_K"), (DOWN, _more, "Q6_K")]),
    "Q5_K_M": ("Q5_K", "Q5_K", "Q6_K", [(VALUE, _more, "Q6_K"), (DOWN, _more, "Q6_K")]),
}

FILE_TYPES = tuple(_RULES)


def recipe(file_type: str, model_map: ModelMap, heads_per_value: int) -> dict[str, str]:
    """GGUF tensor -> type, for every matrix. heads_per_value: query heads that share a value head."""
    base, embedding, head, rules = _RULES[file_type]
    tied = not any(tensor.role is Role.OUTPUT for tensor in model_map.tensors)

    def chosen(tensor: TensorSpec) -> str:
        if tensor.role is Role.OUTPUT or (tied and tensor.role is Role.EMBEDDING):
            return head
        if tensor.role is Role.EMBEDDING:
            return embedding
        for role, holds, name in rules:
            if tensor.role is role and tensor.layer is not None and holds(tensor.layer, model_map.n_layers):
                return name if isinstance(name, str) else name[heads_per_value >= 4]
        return base

    matrices = [t for t in model_map.tensors if len(t.shape) > 1 and t.role not in UNQUANTIZED_ROLES]
    return {tensor.name: chosen(tensor) for tensor in matrices}
