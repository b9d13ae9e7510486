"""What each way of protection does to a plan, and how a profile asks for it."""

import pytest

from bitwright.formats.errors import ConvertError
from bitwright.formats.pins import Pin
from bitwright.profiles.planning.assign import assign
from bitwright.profiles.planning.protect import (
    give_format,
    looks_for_super_weights,
    pin,
    rescale,
    rescaled_specs,
    with_specs,
)
from bitwright.profiles.reading.protection import Protection
from bitwright.profiles.reading.schema import parse_profile
from bitwright.profiles.vocabulary import ModelMap, Rescaled, Role, TensorSpec

DOWN = "blk.0.ffn_down.weight"


def model_map(fused: bool = False, experts: int = 0, bias: bool = False) -> ModelMap:
    def spec(name: str, role: Role, *shape: int) -> TensorSpec:
        stacked = (experts, *shape) if experts and len(shape) > 1 else shape
        return TensorSpec(f"blk.0.{name}", stacked, role, 0, scale_applied=True)

    tensors = [TensorSpec("blk.0.attn_q.weight", (256, 256), Role.ATTENTION_QUERY, 0)]
    if fused:
        tensors.append(spec("ffn_up.weight", Role.MLP_GATE_UP, 1024, 256))
    else:
        kinds = (Role.EXPERT_GATE, Role.EXPERT_UP) if experts else (Role.MLP_GATE, Role.MLP_UP)
        tensors += [spec("ffn_gate.weight", kinds[0], 512, 256), spec("ffn_up.weight", kinds[1], 512, 256)]
    if bias:
        tensors += [spec("ffn_up.bias", Role.BIAS, 512), spec("ffn_down.bias", Role.BIAS, 256)]
    tensors.append(spec("ffn_down.weight", Role.EXPERT_DOWN if experts else Role.MLP_DOWN, 256, 512))
    return ModelMap("llama", 1, tuple(tensors))


def profile(text: str = "", base: str = "Q2_K"):
    return parse_profile(f'description = "d"\ngood_for = "g"\nbase = "{base}"\n{text}', "mine", "mine.toml")


def planned(plan, name: str = DOWN):
    return next(p for p in plan.tensors if p.tensor.name == name)


def test_pins_count_rows_over_all_matrices_and_are_named():
    plan = assign(profile(), model_map(experts=4))
    pinned = pin(plan, DOWN, [(2, 7, 30), (0, 1, 5)], 0.02, "super weights pinned")
    assert planned(pinned).pins == (Pin(1, 5, 0.02), Pin(2 * 256 + 7, 30, 0.02))
    assert planned(pinned).reason.endswith("; super weights pinned")
    assert pinned.n_bytes == plan.n_bytes and pinned.digest() != plan.digest()


def test_another_format_changes_bytes_and_digest():
    plan = assign(profile(), model_map())
    raised = give_format(plan, DOWN, "Q6_K", "raised")
    assert planned(raised).format == "Q6_K" and raised.n_bytes > plan.n_bytes
    assert planned(raised, "blk.0.ffn_up.weight").format == "Q2_K"
    kept = give_format(plan, DOWN, "BF16", "kept out", kept_out=True)
    assert planned(kept).kept_out and kept.digest() != give_format(plan, DOWN, "BF16", "raised").digest()
    assert kept.rows()[-1]["kept_out"]


def test_another_format_takes_the_second_level_scale_along():
    plan = assign(profile(base="NVFP4"), model_map())
    assert any(p.tensor.name == "blk.0.ffn_down.scale" for p in plan.tensors)
    names = [p.tensor.name for p in give_format(plan, DOWN, "Q6_K", "raised").tensors]
    assert "blk.0.ffn_down.scale" not in names and "blk.0.ffn_up.scale" in names


@pytest.mark.parametrize(
    ("options", "up", "row"),
    [
        ({}, "blk.0.ffn_up.weight", 9),
        ({"fused": True}, "blk.0.ffn_up.weight", 512 + 9),
        ({"experts": 4}, "blk.0.ffn_up.weight", 9),
    ],
)
def test_a_neuron_is_rescaled_on_both_sides(options, up, row):
    model, matrix = model_map(**options), 2 if options.get("experts") else 0
    specs = rescaled_specs(model, DOWN, {(matrix, 9): 4.0})
    assert specs[DOWN].rescaled == (Rescaled("column", matrix, 9, 0.25),)
    assert specs[up].rescaled == (Rescaled("row", matrix, row, 4.0),)
    assert len(specs) == 2
    plan = assign(profile(), model)
    changed = rescale(plan, specs, "neuron rescaled")
    assert changed.n_bytes == plan.n_bytes and changed.digest() != plan.digest()
    assert {p.tensor.name for p in changed.tensors if "neuron rescaled" in p.reason} == {DOWN, up}
    assert with_specs(model, specs).tensor(DOWN).rescaled == specs[DOWN].rescaled


def test_the_bias_of_the_up_projection_is_rescaled_too_and_no_other():
    specs = rescaled_specs(model_map(bias=True), DOWN, {(0, 9): 4.0})
    assert specs["blk.0.ffn_up.bias"].rescaled == (Rescaled("column", 0, 9, 4.0),)
    assert "blk.0.ffn_down.bias" not in specs


def test_without_an_up_projection_nothing_is_rescaled():
    model = model_map()
    bare = ModelMap("llama", 1, tuple(t for t in model.tensors if t.role is not Role.MLP_UP))
    assert rescaled_specs(bare, DOWN, {(0, 9): 4.0}) is None


def test_a_profile_says_how_and_inherits_it():
    assert profile().protection == Protection()
    text = '[protection]\nsuper_weights = "pin"\ntolerance = 0.01\nraise_to = "q8_0"'
    assert profile(text).protection == Protection("pin", 0.01, "Q8_0")
    text = 'extends = "two-bit"\n[protection]\ntolerance = 0.2'
    child = parse_profile(f'description = "d"\ngood_for = "g"\n{text}', "child", "child.toml")
    assert child.protection == Protection("auto", 0.2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("protection = 3", "`protection` is a table"),
        ("[protection]\nsuper_weight = 'pin'", "unknown key 'super_weight'"),
        ("[protection]\nsuper_weights = 'pinned'", "unknown protection 'pinned'"),
        ("[protection]\nsuper_weights = 3", "unknown protection 3"),
        ("[protection]\ntolerance = 0", "a positive number is expected"),
        ("[protection]\nraise_to = 'Q9'", "unknown format 'Q9'"),
    ],
)
def test_a_wrong_table_is_named(text, message):
    with pytest.raises(ConvertError, match=message) as caught:
        profile(text)
    assert "mine.toml, key protection" in caught.value.where


def test_auto_looks_where_down_projections_are_coarse():
    coarse, fine = assign(profile(), model_map()), assign(profile(base="Q4_K"), model_map())
    assert looks_for_super_weights(Protection(), coarse) and not looks_for_super_weights(Protection(), fine)
    assert looks_for_super_weights(Protection("pin"), fine) and not looks_for_super_weights(Protection("off"), coarse)
    only_attention = assign(profile('[[rule]]\nroles = "attention_*"\nformat = "Q2_K"', base="Q4_K"), model_map())
    assert not looks_for_super_weights(Protection(), only_attention)
