"""The precision of a matrix's inputs follows from their statistics: planted ones, around each limit."""

from dataclasses import dataclass

import pytest

from bitwright.formats.errors import ConvertError
from bitwright.formats.schemes.registry import SCHEMES
from bitwright.profiles.planning.precision import LIMITS, UNQUANTIZED, Context, choose_precision, choose_precisions
from bitwright.profiles.vocabulary import Role


@dataclass(frozen=True)
class Figures:
    outlier_ratio: float = 2.0
    token_range: float = 3.0
    dynamic_range: float = 4.0
    rows: int = 100


def choose(wanted: str, figures: Figures, role: Role = Role.MLP_DOWN, **context):
    return choose_precision("blk.3.ffn_down.weight", wanted, role, figures, Context(**context))


def test_every_scheme_that_rounds_inputs_has_a_limit():
    assert set(LIMITS) == {name for name, scheme in SCHEMES.items() if scheme.activations is not None}


@pytest.mark.parametrize("wanted", LIMITS)
def test_calm_inputs_get_what_is_wanted(wanted):
    choice = choose(wanted, Figures())
    assert (choice.scheme, choice.alternative, choice.fell_back) == (wanted, "", False)


@pytest.mark.parametrize(
    ("wanted", "figures", "scheme"),
    [
        ("W8A8", Figures(token_range=5.9, dynamic_range=12, outlier_ratio=300), "W8A8"),
        ("W8A8", Figures(token_range=6.1), UNQUANTIZED),
        ("W8A8_STATIC", Figures(dynamic_range=6.9), "W8A8_STATIC"),
        ("W8A8_STATIC", Figures(dynamic_range=7.1), "W8A8"),
        ("W8A8_STATIC", Figures(dynamic_range=9, token_range=7.1), UNQUANTIZED),
        ("W8A8_STATIC_ASYM", Figures(dynamic_range=9), "W8A8"),
        ("FP8", Figures(token_range=13, dynamic_range=20), "FP8"),
        ("FP8_STATIC", Figures(dynamic_range=15), "FP8"),
        ("FP8_STATIC", Figures(dynamic_range=18, token_range=15), UNQUANTIZED),
        ("NVFP4", Figures(outlier_ratio=11.9), "NVFP4"),
        ("NVFP4", Figures(outlier_ratio=12.1), "FP8"),
        ("NVFP4", Figures(outlier_ratio=1e6, token_range=19), UNQUANTIZED),
        ("MXFP4", Figures(outlier_ratio=7), "FP8"),
        ("W4A16", Figures(1e9, 60, 60), "W4A16"),
    ],
)
def test_beyond_a_limit_the_next_that_serves_is_taken(wanted, figures, scheme):
    choice = choose(wanted, figures)
    assert choice.scheme == scheme
    if scheme != wanted:
        assert choice.alternative == f"--set 'blk.3.ffn_down.weight={wanted}'"
        assert wanted in choice.reason


def test_where_weights_are_what_takes_the_time_they_stay_small():
    figures = Figures(token_range=9)
    assert choose("W8A8", figures, phase="decode").scheme == "W8A16"
    assert choose("W8A8", figures, phase="prefill").scheme == UNQUANTIZED


def test_long_prompts_want_room_in_static_scales_only():
    figures = Figures(dynamic_range=6.7, token_range=5.7)
    assert choose("W8A8_STATIC", figures, sequence_length=4096).scheme == "W8A8_STATIC"
    assert choose("W8A8_STATIC", figures, sequence_length=32768).scheme == "W8A8"


def test_a_rounded_cache_wants_room_in_front_of_it():
    figures = Figures(token_range=5.5)
    for role in (Role.ATTENTION_QUERY, Role.ATTENTION_KEY, Role.ATTENTION_VALUE, Role.ATTENTION_QKV):
        assert choose("W8A8", figures, role, fp8_kv_cache=True).scheme == UNQUANTIZED
    assert choose("W8A8", figures, Role.MLP_UP, fp8_kv_cache=True).scheme == "W8A8"
    assert choose("NVFP4", Figures(outlier_ratio=7), Role.ATTENTION_KEY, fp8_kv_cache=True).scheme == "FP8"


def test_no_statistics_are_an_error_where_inputs_are_rounded():
    for figures in (None, Figures(rows=0)):
        with pytest.raises(ConvertError, match=r"has seen none[\s\S]*blk\.0\.attn_q"):
            choose_precision("blk.0.attn_q.weight", "W8A8", Role.ATTENTION_QUERY, figures, Context())
    assert choose_precision("t", "W8A16", Role.MLP_UP, None, Context()).scheme == "W8A16"


def test_what_the_user_names_is_kept():
    wanted = {"a": "W8A8", "b": "W8A8"}
    figures = dict.fromkeys(wanted, Figures(token_range=9))
    roles = dict.fromkeys(wanted, Role.MLP_UP)
    choices = choose_precisions(wanted, roles, figures, Context(), overridden=["b"])
    assert [choice.scheme for choice in choices] == [UNQUANTIZED, "W8A8"]


def test_an_outlier_that_the_weights_hold_is_seen_by_its_error():
    wanted = {"a": "W8A8", "b": "W8A8_STATIC", "c": "W8A8", "d": "FP8"}
    figures, roles = dict.fromkeys(wanted, Figures()), dict.fromkeys(wanted, Role.MLP_UP)
    errors = {"a": 0.02, "b": 0.02, "c": 0.009, "d": 0.5}
    choices = choose_precisions(wanted, roles, figures, Context(), errors=errors)
    assert [choice.scheme for choice in choices] == [UNQUANTIZED, UNQUANTIZED, "W8A8", "FP8"]
    assert "2.0%" in choices[0].reason
