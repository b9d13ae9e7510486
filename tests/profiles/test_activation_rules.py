"""The table [activations] of a profile."""

import pytest

from formats.errors import ConvertError
from profiles.activations import ActivationRules, parse_activations


def test_what_a_table_leaves_out_is_inherited():
    inherited = ActivationRules(smooth=True, alpha="auto", prompt_tokens=100)
    table = {"scales": "average", "phase": "decode", "fp8_kv_cache": True}
    found = parse_activations(table, "p.toml", inherited)
    assert found == ActivationRules(True, "auto", "average", True, "decode", 100, True)
    assert parse_activations({"prompt_tokens": 32768, "alpha": 1}, "p.toml", inherited).prompt_tokens == 32768


@pytest.mark.parametrize(
    "table",
    [
        {"smooth": 1},
        {"fp8_kv_cache": "yes"},
        {"alpha": 1.5},
        {"alpha": True},
        {"scales": "max"},
        {"phase": "training"},
        {"prompt_tokens": 0},
        {"prompt_tokens": 1e3},
        {"prompt_tokens": True},
        {"tokens": 1},
    ],
)
def test_what_makes_no_sense_is_an_error_with_its_key(table):
    with pytest.raises(ConvertError, match=next(iter(table))):
        parse_activations(table, "p.toml", ActivationRules())
