"""What a plan of modules stores of the caches of keys and values: a scale of each, beside what projects them.

They follow the projections' own tensors in the file: the scale of the keys those of k_proj, that of the values those of
v_proj, both those of a fused qkv_proj.
"""

from dataclasses import replace

from formats.cache_scheme import CACHE_SCHEMES
from formats.errors import ConvertError, nearest
from profiles.plan import Plan
from profiles.vocabulary import Role

NO_CACHE_SCHEME = "BF16"
"""Caches stay in the 16 bits of the runtime."""

_SCALES_OF = {
    Role.ATTENTION_KEY: ("k_scale",),
    Role.ATTENTION_VALUE: ("v_scale",),
    Role.ATTENTION_QKV: ("k_scale", "v_scale"),
}


def parse_cache_scheme(value: object, where: str) -> str:
    """The name as CACHE_SCHEMES spells it, or NO_CACHE_SCHEME; an unknown one is an error with the nearest match."""
    known = [*CACHE_SCHEMES, NO_CACHE_SCHEME]
    if isinstance(value, str) and value.upper() in known:
        return value.upper()
    raise ConvertError(f"no scheme of a cache is called {value!r}", where, nearest(str(value), known))


def with_cache_scales(plan: Plan, n_layers: int) -> Plan:
    """The plan with a scale for the keys and one for the values of every layer.

    Raises ConvertError for a layer without attention, or with one that caches something else.
    """
    rows = []
    found: set[tuple[int | None, str]] = set()
    for row in plan.tensors:
        scales = _SCALES_OF.get(row.tensor.role, ())
        attention = row.tensor.name.removesuffix(".weight").rpartition(".")[0]
        rows.append(replace(row, cache_scales=tuple(f"{attention}.{scale}" for scale in scales)))
        found |= {(row.tensor.layer, scale) for scale in scales}
    lacking = [i for i in range(n_layers) if not {(i, "k_scale"), (i, "v_scale")} <= found]
    if lacking:
        raise ConvertError(
            f"{len(lacking)} layers have no attention that caches keys and values, the first is layer {lacking[0]}",
            f"profile {plan.profile}, key kv_cache",
            f'leave caches in 16 bits: kv_cache = "{NO_CACHE_SCHEME}"',
        )
    return replace(plan, tensors=tuple(rows))
