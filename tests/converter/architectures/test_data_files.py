"""The data files and the small language that they are written in."""

from math import inf

import pytest

from bitwright.converter.architectures.architecture import architectures, architectures_named
from bitwright.converter.architectures.data_file import parse
from bitwright.converter.architectures.description import Architecture
from bitwright.converter.architectures.expression import Expression, Unknown
from bitwright.converter.architectures.pattern import Pattern

FILE = """
gguf_name = "llama"
model_types = ["mine"]
layer_prefix = "model.layers.{layer}."
[kinds]
moe = "layer >= 1"
[metadata.uint32]
"block_count" = "layers"
[tensors.before]
"model.embed_tokens.weight" = { role = "embedding", shape = ["vocab", "hidden"] }
[tensors.layer]
"a.weight" = [
    { role = "mlp_gate", shape = ["mlp", "hidden"], stored = ["2 * mlp", "hidden"], rows = "two=2 mlp -> two[0] mlp" },
    { role = "mlp_up", shape = ["mlp", "hidden"], stored = ["2 * mlp", "hidden"], rows = "two=2 mlp -> two[1] mlp" },
]
[tensors.kind.moe]
"b.weight" = { role = "router", shape = ["experts", "hidden"] }
"""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("heads * (nope + rope)", 12),
        ("heads if missing else nope", 2),
        ("'full' if (layer + 1) % 4 == 0 else 'linear'", "full"),
        ("types[layer - 3:layer] == ['a', 'b', 'a']", True),
        ("missing", None),
        ("not missing and heads in [1, 3]", True),
        ("max(nope, rope, len(types)) - -1", 5),
        ("sqrt(nope * rope * 2)", pytest.approx(8**0.5)),
        ("[normal_quantile(0.5), normal_quantile(0.95), normal_quantile(0.0)]", [0, pytest.approx(1.6448536), -inf]),
        ("[position(types, 'b'), position(types, 'c'), count(types, 'a')]", [1, 4, 2]),
    ],
)
def test_expressions(text: str, value: object) -> None:
    names = {"heads": 3, "nope": 2, "rope": 2, "layer": 3, "types": ["a", "b", "a", "b"]}
    assert Expression(text).evaluate(names) == value


def test_what_an_expression_lacks_is_named() -> None:
    with pytest.raises(Unknown, match=r"^kernel$"):
        Expression("heads * kernel").evaluate({"heads": 2})
    with pytest.raises(Unknown, match=r"^types$"):
        Expression("types[layer]").evaluate({"layer": 2})


@pytest.mark.parametrize("text", ["open('x')", "().__class__", "[x for x in y]", "lambda: 1", "a =", "f'{a}'"])
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expression"):
        Expression(text)


@pytest.mark.parametrize(
    ("pattern", "n", "indices"),
    [
        ("heads two=2 half -> heads half two", 8, [0, 2, 1, 3, 4, 6, 5, 7]),
        ("part=3 x -> part[1] x", 6, [2, 3]),
        ("rows -> rows[2:]", 5, [2, 3, 4]),
        ("heads kd=nope+1 -> heads kd[:nope]", 6, [0, 1, 3, 4]),
        ("x two=2 -> two[1] x", 6, [1, 3, 5]),
        ("heads x -> x heads", 6, [0, 3, 1, 4, 2, 5]),
        ("heads x=3 -> heads x[:1], heads x[1:]", 6, [0, 3, 1, 2, 4, 5]),
        ("x -> x, x[0] copies=nope+1", 3, [0, 1, 2, 0, 0, 0]),
        ("x -> x[1:] copies=nope, x[0] copies=nope-2", 3, [1, 1, 2, 2]),
        ("two=2 heads -> two heads | heads x -> x heads", 8, [0, 1, 2, 3, 4, 6, 5, 7]),
    ],
)
def test_patterns(pattern: str, n: int, indices: list[int]) -> None:
    selection = Pattern(pattern).selection(n, {"heads": 2, "nope": 2})
    assert selection.indices().tolist() == indices and len(selection) == len(indices)


@pytest.mark.parametrize(
    "text", ["a b -> a", "a", "a a -> a a", "a -> b", "-> a", "a! -> a!", "a -> a | b", "a b -> a b, b"]
)
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        Pattern(text)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="7 are stored"):
        Pattern("heads half -> half heads").selection(7, {"heads": 2})


def test_a_file_says_what_becomes_of_a_tensor() -> None:
    mine = parse("mine", FILE)
    assert [(rule.pattern, rule.role, rule.kind) for rule in mine.layer] == [
        ("model.layers.{layer}.a.weight", "mlp_gate", ""),
        ("model.layers.{layer}.a.weight", "mlp_up", ""),
        ("model.layers.{layer}.b.weight", "router", "moe"),
    ]
    assert {"mlp", "hidden", "experts", "layers"} <= mine.needed and "two" not in mine.needed


@pytest.mark.parametrize(
    "edit",
    [
        ('gguf_name = "llama"', 'gguf_name = "llama"\nunheard = 1'),
        ("[tensors.kind.moe]", "[tensors.kind.other]"),
        ("[tensors.before]", '[tensors.elsewhere]\n"x" = { role = "norm", shape = [] }\n[tensors.before]'),
        ('role = "router"', 'role = "rooter"'),
        ("[metadata.uint32]", "[metadata.uint33]"),
        ('"block_count" = "layers"', '"block_count" = "layers +"'),
        ("two[1] mlp", "two[1]"),
    ],
)
def test_a_wrong_file_is_no_architecture(edit: tuple[str, str]) -> None:
    assert edit[0] in FILE
    with pytest.raises((ValueError, TypeError)):
        parse("mine", FILE.replace(*edit))


@pytest.mark.parametrize("architecture", architectures(), ids=lambda architecture: architecture.name)
def test_every_file_is_consistent(architecture: Architecture) -> None:
    """Smoothing names tensors that exist, and no two files claim a model type."""
    patterns = {rule.pattern for rule in architecture.layer}
    fed = {name for names in architecture.feeds.values() for name in names}
    assert architecture.feeds.keys() | fed <= patterns
    others = [other for other in architectures() if other is not architecture]
    claims = [other for other in others if set(architecture.model_types) & set(other.model_types)]
    assert all(one.condition is not None for one in [architecture, *claims]) or not claims


def test_a_type_is_found_without_reading_every_file() -> None:
    for architecture in architectures():
        for model_type in architecture.model_types:
            found = architectures_named(model_type)
            assert architecture.name in [of.name for of in found] and len(found) < 10, model_type
