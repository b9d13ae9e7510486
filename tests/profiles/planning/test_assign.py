"""From profile and model map to plan: rules, ranges, overrides, fallbacks, exact bytes."""

import pytest

from bitwright.formats.errors import ConvertError
from bitwright.formats.registry import FORMATS, get_format
from bitwright.profiles.evidence import Evidence
from bitwright.profiles.planning.assign import assign
from bitwright.profiles.planning.fallbacks import fitting_format
from bitwright.profiles.reading.rules import parse_override
from bitwright.profiles.reading.schema import load_profile, parse_profile
from bitwright.profiles.vocabulary import ModelMap, Role, TensorSpec

N_LAYERS = 8


def model_map(width: int = 512, tied: bool = False) -> ModelMap:
    tensors = [TensorSpec("token_embd.weight", (1000, width), Role.EMBEDDING)]
    for layer in range(N_LAYERS):
        for name, role, shape in (
            ("attn_norm", Role.NORM, (width,)),
            ("attn_q", Role.ATTENTION_QUERY, (width, width)),
            ("attn_v", Role.ATTENTION_VALUE, (width // 4, width)),
            ("ffn_gate_inp", Role.ROUTER, (4, width)),
            ("ffn_up_exps", Role.EXPERT_UP, (4, width, width)),
            ("ffn_down", Role.MLP_DOWN, (width, 2048)),
        ):
            tensors.append(TensorSpec(f"blk.{layer}.{name}.weight", shape, role, layer))
    if not tied:
        tensors.append(TensorSpec("output.weight", (1000, width), Role.OUTPUT))
    return ModelMap("llama", N_LAYERS, tuple(tensors))


def profile(rules: str = "", base: str = "Q4_K"):
    return parse_profile(f'description = "d"\ngood_for = "g"\nbase = "{base}"\n{rules}', "mine", "mine.toml")


def formats(plan) -> dict[str, str]:
    return {planned.tensor.name: planned.format for planned in plan.tensors}


def test_the_last_matching_rule_decides():
    rules = (
        '[[rule]]\nroles = "mlp_*"\nformat = "Q3_K"\n[[rule]]\nroles = "mlp_down"\nlayers = "first:1"\nformat = "Q6_K"'
    )
    chosen = formats(assign(profile(rules), model_map()))
    assert chosen["blk.0.ffn_down.weight"] == "Q6_K"
    assert chosen["blk.1.ffn_down.weight"] == "Q3_K"
    assert chosen["blk.1.attn_q.weight"] == "Q4_K"


def test_norms_and_routers_stay_in_f32_whatever_the_rules_say():
    chosen = formats(assign(profile('[[rule]]\ntensors = "*"\nformat = "Q2_K"'), model_map()))
    assert chosen["blk.0.attn_norm.weight"] == "F32"
    assert chosen["blk.0.ffn_gate_inp.weight"] == "F32"


def test_overrides_come_last_and_are_the_reason():
    plan = assign(profile(), model_map(), [parse_override("blk.3.*=Q8_0"), parse_override("mlp_down=Q5_K")])
    chosen = formats(plan)
    assert chosen["blk.3.attn_q.weight"] == "Q8_0"
    assert chosen["blk.3.ffn_down.weight"] == "Q5_K"
    reasons = {planned.tensor.name: planned.reason for planned in plan.tensors}
    assert reasons["blk.3.attn_q.weight"] == "--set 'blk.3.*=Q8_0'"


@pytest.mark.parametrize("text", ["mlp_up=Q4_K", "blk.99.*=Q4_K", "norm=Q4_K", "blk.0.attn_norm.weight=Q8_0"])
def test_an_override_that_matches_nothing_is_an_error(text):
    with pytest.raises(ConvertError, match="matches no tensor"):
        assign(profile(), model_map(), [parse_override(text)])


def test_tied_embeddings_take_the_finer_of_the_embedding_and_output_rules():
    rules = '[[rule]]\nroles = "embedding"\nformat = "Q3_K"\n[[rule]]\nroles = "output"\nformat = "Q6_K"'
    assert formats(assign(profile(rules), model_map(tied=False)))["token_embd.weight"] == "Q3_K"
    assert formats(assign(profile(rules), model_map(tied=True)))["token_embd.weight"] == "Q6_K"


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_fallback_fits_and_is_no_coarser_than_what_was_asked_for(name):
    wanted = get_format(name)
    for n_columns in (576, 32, 33, 96):
        fitting = fitting_format(wanted, n_columns)
        assert fitting.fits(n_columns)
        assert fitting.bits_per_weight >= wanted.bits_per_weight
    assert fitting_format(wanted, 512) is wanted


def test_a_fallback_states_its_cost():
    plan = assign(profile(), model_map(width=576))
    planned = next(p for p in plan.tensors if p.tensor.name == "blk.0.attn_q.weight")
    assert planned.wanted == "Q4_K" and get_format(planned.format).block_size == 32
    assert "rows of 576 are no multiple of Q4_K's 256" in planned.reason
    assert planned.extra_bytes == planned.n_bytes - 576 * 576 * 144 // 256


def test_bytes_are_those_of_the_blocks():
    plan = assign(profile(), model_map())
    by_name = {p.tensor.name: p for p in plan.tensors}
    assert by_name["blk.0.ffn_up_exps.weight"].n_bytes == 4 * 512 * 512 // 256 * 144
    assert by_name["blk.0.attn_norm.weight"].n_bytes == 512 * 4
    assert plan.n_bytes == sum(row["bytes"] for row in plan.rows())


def test_the_digest_follows_formats_and_effort_only():
    one, two = assign(profile(), model_map()), assign(profile(base="Q5_K"), model_map())
    renamed = assign(parse_profile(profile().text, "other", "other.toml"), model_map())
    assert one.digest() == renamed.digest()
    assert one.digest() != two.digest()
    assert one.digest() != assign(profile(), model_map(), effort="fast").digest()


def test_only_coarse_formats_ask_for_importance():
    assert not assign(load_profile("uniform-8bit"), model_map()).uses_importance
    assert assign(load_profile("balanced-4bit").by_rules(), model_map()).uses_importance


def test_tiers_decide_what_rules_and_overrides_leave():
    of = model_map()
    rules = '[[tier]]\nshare = 0.5\nformat = "Q8_0"\n[[rule]]\nroles = "mlp_*"\nformat = "Q6_K"'
    scores = {layer: -layer for layer in range(N_LAYERS)}
    plan = assign(profile(rules), of, [parse_override("blk.0.attn_q.weight=Q5_K")], evidence=Evidence({}, scores, "e"))
    chosen = formats(plan)
    assert chosen["blk.0.attn_v.weight"] == chosen["blk.3.attn_q.weight"] == "Q8_0"
    assert chosen["blk.4.attn_q.weight"] == chosen["token_embd.weight"] == "Q4_K"
    assert chosen["blk.0.ffn_down.weight"] == "Q6_K" and chosen["blk.0.attn_q.weight"] == "Q5_K"
    reasons = {planned.tensor.name: planned.reason for planned in plan.tensors}
    assert reasons["blk.3.attn_q.weight"] == "mine.toml, tier 1"


def test_a_layer_without_a_score_is_an_error():
    rules = '[[tier]]\nshare = 0.5\nformat = "Q8_0"'
    with pytest.raises(ConvertError, match="the layer 5 has no score"):
        assign(profile(rules), model_map(), evidence=Evidence({}, dict.fromkeys(range(5), 1.0), "table"))


def test_measured_losses_are_shown_for_any_profile():
    of = model_map()
    losses = {t.name: {"Q4_K": 0.25, "Q8_0": 0.0} for t in of.tensors if "norm" not in t.name and "inp" not in t.name}
    measured = Evidence(losses, {}, "table")
    plan = assign(profile(), of, evidence=measured)
    assert plan.predicted_kld == 0.25 * len(losses)
    assert {row["predicted_loss"] for row in plan.rows()} == {None, 0.25}
    unmeasured = assign(profile('[[rule]]\nroles = "mlp_down"\nformat = "Q5_K"'), of, evidence=measured)
    assert unmeasured.predicted_kld is None


def test_decisions_by_evidence_need_some():
    with pytest.raises(ConvertError, match="measured sensitivity"):
        assign(load_profile("importance-tiers"), model_map())
