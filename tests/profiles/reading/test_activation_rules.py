"""The table [activations] of a profile."""

import pytest

from bitwright.formats.errors import ConvertError
from bitwright.profiles.reading.activations import ActivationRules, parse_activations
from bitwright.profiles.reading.schema import parse_profile


def test_what_a_table_leaves_out_is_inherited():
    inherited = ActivationRules(smooth=True, alpha="auto", prompt_tokens=100)
    table = {"scales": "average", "phase": "decode", "kv_cache": "fp8"}
    found = parse_activations(table, "p.toml", inherited)
    assert found == ActivationRules(True, "auto", "average", True, "decode", 100, "FP8")
    assert parse_activations({"prompt_tokens": 32768, "alpha": 1}, "p.toml", inherited).prompt_tokens == 32768


@pytest.mark.parametrize(
    "table",
    [
        {"smooth": 1},
        {"kv_cache": "FP4"},
        {"kv_cache": True},
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


def test_an_unknown_cache_names_the_nearest():
    with pytest.raises(ConvertError, match=r"FP9[\s\S]*FP8"):
        parse_activations({"kv_cache": "FP9"}, "p.toml", ActivationRules())
    inherited = ActivationRules(kv_cache="FP8")
    assert parse_activations({}, "p.toml", inherited).kv_cache == "FP8"
    assert parse_activations({"kv_cache": "BF16"}, "p.toml", inherited) == ActivationRules()


def test_a_gguf_has_no_cache_and_the_error_says_why():
    text = 'description = "d"\ngood_for = "g"\nbase = "Q4_K"\n[activations]\nkv_cache = "FP8"\n'
    with pytest.raises(ConvertError, match=r"llama\.cpp[\s\S]*kv_cache[\s\S]*--cache-type-k"):
        parse_profile(text, "p", "p.toml")
