"""Reading the data files: from a TOML table to an Architecture."""

import tomllib
from importlib.resources import files
from typing import Any

from bitwright.converter.architectures.description import Architecture, Equal, TensorRule
from bitwright.converter.architectures.expression import Expression
from bitwright.converter.architectures.pattern import Pattern
from bitwright.profiles.vocabulary import Role

METADATA_TYPES = (
    *("uint32", "float32", "bool", "string", "uint32_or_array"),
    *("int32_array", "float32_array", "bool_array"),
)
"""Of a value, or of every value of a list; uint32_or_array is one value where all layers have the same."""


# Fields of Architecture that a file gives as they are.
_AS_THEY_ARE = (
    *("base", "prefixes", "spellings", "left_out", "without", "extra_layers", "mtp", "aliases", "defaults", "requires"),
    *("rope_types", "rope_keys", "local_rope", "window_keys", "window_period"),
)


def read_all(mentions: str = "") -> tuple[Architecture, ...]:
    """All architectures, by the names of their files; of those alone whose text mentions this."""
    folder = files("bitwright.converter").joinpath("architectures")
    found = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".toml")), key=str)
    texts = {entry.name.removesuffix(".toml"): entry.read_text("utf-8") for entry in found}
    return tuple(parse(name, text) for name, text in texts.items() if mentions in text)


def parse(name: str, text: str) -> Architecture:
    """The architecture that a data file of this text describes. Raises ValueError, KeyError or TypeError where it is
    none: a test reads every file."""
    table = tomllib.loads(text)
    tensors, prefix = table.pop("tensors"), table.pop("layer_prefix")
    in_layers = _rules(tensors.pop("layer", {}), prefix)
    for kind, rules in tensors.pop("kind", {}).items():
        in_layers += _rules(rules, prefix, kind)
    metadata = {
        key: (kind, Expression(value))
        for kind, values in table.pop("metadata").items()
        for key, value in values.items()
    }
    if unknown := {kind for kind, _ in metadata.values()} - set(METADATA_TYPES):
        raise ValueError(f"{name}: no type of metadata is {unknown}")
    rest: dict[str, Any] = {
        key: tuple(table.pop(key)) if isinstance(table[key], list) else table.pop(key)
        for key in [key for key in table if key in _AS_THEY_ARE]
    }
    architecture = Architecture(
        name=name,
        gguf_name=table.pop("gguf_name"),
        model_types=tuple(table.pop("model_types")),
        before=_rules(tensors.pop("before")),
        layer=in_layers,
        after=_rules(tensors.pop("after", {})),
        equal={key: _equal(value) for key, value in table.pop("equal", {}).items()},
        rope=_expressions(table.pop("rope", {})),
        condition=Expression(table.pop("condition")) if "condition" in table else None,
        derived=_expressions(table.pop("derived", {})),
        per_layer=_expressions(table.pop("per_layer", {})),
        refused=_expressions(table.pop("refused", {})),
        dimensions=_expressions(table.pop("dimensions", {})),
        kinds=_expressions(table.pop("kinds", {})),
        notes=_expressions(table.pop("notes", {})),
        yarn_attention=Expression(table.pop("yarn_attention")) if "yarn_attention" in table else None,
        feeds={prefix + name: tuple(prefix + fed for fed in feeds) for name, feeds in table.pop("feeds", {}).items()},
        scales_applied=tuple(map(Role, table.pop("scales_applied", ()))),
        scales_applied_without_bias=tuple(map(Role, table.pop("scales_applied_without_bias", ()))),
        metadata=metadata,
        **rest,
    )
    kinds = {rule.kind for rule in architecture.layer if rule.kind}
    if table or tensors or not kinds <= architecture.kinds.keys():
        raise ValueError(f"{name}: unknown keys, places or kinds: {sorted(table)} {sorted(tensors)} {sorted(kinds)}")
    return architecture


def _expressions(table: dict[str, Any]) -> dict[str, Expression]:
    return {key: Expression(str(value)) for key, value in table.items()}


def _equal(table: dict[str, Any]) -> Equal:
    return Equal(table["dimension"], {int(n_layers): name for n_layers, name in table.get("of_layers", {}).items()})


def _rules(table: dict[str, Any], prefix: str = "", kind: str = "") -> tuple[TensorRule, ...]:
    """The rules of a table: under the name of a checkpoint's tensor what it becomes, or a list of these."""
    return tuple(
        _rule(prefix + name, dict(rule), kind)
        for name, made in table.items()
        for rule in (made if isinstance(made, list) else [made])
    )


def _rule(pattern: str, rule: dict[str, Any], kind: str) -> TensorRule:
    return TensorRule(
        pattern,
        Role(rule.pop("role")),
        tuple(Expression(str(size)) for size in rule.pop("shape")),
        tuple(Expression(str(size)) for size in rule.pop("stored", ())),
        rows=Pattern(rule.pop("rows")) if "rows" in rule else None,
        columns=Pattern(rule.pop("columns")) if "columns" in rule else None,
        factors=tuple((Expression(str(n)), Expression(str(by))) for n, by in rule.pop("factors", ())),
        when=Expression(rule.pop("when")) if "when" in rule else None,
        count=Expression(rule.pop("count")) if "count" in rule else None,
        observed=Expression(str(rule.pop("observed", True))),
        kind=kind,
        **rule,
    )
