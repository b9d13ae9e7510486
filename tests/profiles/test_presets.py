"""What presets may never do to a model, for every role and every architecture."""

from dataclasses import replace
from pathlib import Path

import pytest

from converter.architecture import architectures
from converter.model_map import describe
from converter.source import open_checkpoint
from formats.errors import ConvertError
from formats.registry import get_format
from profiles.assign import assign
from profiles.evidence import Evidence
from profiles.plan import Plan
from profiles.schema import PRESETS, QuantizationProfile, load_profile, preset_names
from profiles.vocabulary import UNQUANTIZED_ROLES, ModelMap, Role, TensorSpec
from tests.profiles.models import KINDS, evidence, matrices, model_map
from tests.tiny_models import TINY_MODELS

# Bits a weight, at least, of each preset in attention and shared experts; in the output head 4.
FLOORS = {
    "attention-high-precision": 8,
    "balanced-4bit": 4,
    "budget": 2,
    "component-mixed": 8,
    "dynamic-1.5bit": 4,
    "fp16-baseline": 16,
    "importance-tiers": 4,
    "layerwise-gradient": 4,
    "mlp-low-precision": 4,
    "nvfp4": 4,
    "ternary": 2,
    "two-bit": 3,
    "ultra-low-1.5bit": 2.5,
    "ultra-low-1.75bit": 2.5,
    "uniform-8bit": 8,
}
SAFETENSORS = {"fp8", "fp8-kv", "hybrid-long-context", "nvfp4-vllm", "smoothquant-w8a8", "w4a16"}
IN_SHARED_EXPERTS = {"attention-high-precision": 4}


def planned(profile: QuantizationProfile, of: ModelMap, measured: Evidence) -> Plan:
    if profile.budget is not None:
        coarse = all(t.n_columns % 256 == 0 for t in matrices(of))  # other rows fit formats from 4 bits on
        profile = profile.aiming_at(None, 2.2 if coarse else 5.5, None, "test")
    return assign(profile, of, evidence=measured, with_importance={t.name for t in of.tensors})


def check_floors(preset: str, plan: Plan) -> None:
    tied = all(row.tensor.role is not Role.OUTPUT for row in plan.tensors)
    for row in plan.tensors:
        role, bits = row.tensor.role, get_format(row.format).bits_per_weight
        if role in (Role.ROUTER, Role.NORM, Role.BIAS):
            assert bits == 32, row
        if role.startswith("attention_"):
            assert bits >= FLOORS[preset], row
        if role.startswith("shared_expert_"):
            assert bits >= IN_SHARED_EXPERTS.get(preset, FLOORS[preset]), row
        if preset != "budget" and (role is Role.OUTPUT or (role is Role.EMBEDDING and tied)):
            assert bits >= 4, row


def test_every_preset_is_in_the_table():
    assert set(FLOORS) | SAFETENSORS == set(preset_names())
    assert {path.stem for path in PRESETS.iterdir()} == set(preset_names())


@pytest.mark.parametrize("preset", FLOORS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [256, 288])
def test_floors_for_every_structure(preset, kind, width):
    of = model_map(kind, width)
    check_floors(preset, planned(load_profile(preset), of, evidence(of)))


@pytest.mark.parametrize("preset", FLOORS)
def test_a_role_that_no_preset_knows_stays_above_2_bits(preset):
    """Every matrix of every role, in a model of its own: an architecture that is added later has some of them."""
    for role in set(Role) - UNQUANTIZED_ROLES:
        of = ModelMap("any", 1, (TensorSpec("blk.0.any.weight", (256, 256), role, 0),))
        (row,) = (r for r in planned(load_profile(preset), of, evidence(of)).tensors if r.format != "F32")
        coarse_on_purpose = role.startswith(("mlp_", "expert_"))
        assert coarse_on_purpose or get_format(row.format).bits_per_weight > 2, row


@pytest.mark.parametrize("preset", FLOORS)
def test_floors_for_every_architecture(tiny, preset):
    of_architecture = {architecture.name: None for architecture in architectures()}
    for name in TINY_MODELS:
        if name in of_architecture:
            of = in_wide_rows(describe(open_checkpoint(str(tiny(name)), metadata_only=True)))
            check_floors(preset, planned(load_profile(preset), of, evidence(of)))
            del of_architecture[name]
    assert not of_architecture, "an architecture without a tiny model"


def in_wide_rows(of: ModelMap) -> ModelMap:
    """The same tensors with rows that every format fits, or none of less than 4 bits could be tried."""

    def widened(tensor: TensorSpec) -> TensorSpec:
        return replace(tensor, shape=(*tensor.shape[:-1], 256)) if tensor.quantizable else tensor

    return replace(of, tensors=tuple(map(widened, of.tensors)))


def test_dynamic_1_5_bit_is_what_it_says():
    plan = assign(load_profile("dynamic-1.5bit"), model_map("experts after dense layers"))
    formats = {row.tensor.name: row.format for row in plan.tensors}
    assert formats["blk.0.ffn_down.weight"] == formats["blk.1.ffn_up.weight"] == "Q6_K"
    assert formats["blk.7.ffn_up_exps.weight"] == formats["blk.7.ffn_gate_exps.weight"] == "IQ1_S"
    assert formats["blk.7.ffn_down_exps.weight"] == "IQ1_M"
    assert formats["blk.7.ffn_down_shexp.weight"] == "Q6_K"
    assert formats["blk.7.attn_k.weight"] == "Q4_K"


def test_layerwise_gradient_goes_in_thirds():
    plan = assign(load_profile("layerwise-gradient"), model_map())
    downs = [row.format for row in plan.tensors if row.tensor.role is Role.MLP_DOWN]
    assert [r.format for r in plan.tensors if r.tensor.role is Role.ATTENTION_KEY][-1] == "Q4_K"
    assert downs == ["Q6_K"] * 3 + ["Q4_K"] * 3 + ["Q3_K"] * 2


def test_component_mixed_is_a_sixth_of_float32():
    of = model_map("experts", 4096)
    plan = assign(load_profile("component-mixed"), of)
    assert 5.5 < 32 / plan.bits_per_weight < 8


@pytest.mark.parametrize("preset", sorted(SAFETENSORS))
def test_presets_of_a_directory_are_no_plan_of_a_gguf(preset):
    profile = load_profile(preset)
    assert profile.target == "safetensors"
    with pytest.raises(ConvertError, match="schemes of a safetensors directory, and no formats of a GGUF"):
        assign(profile, model_map())


def test_the_budget_preset_alone_asks_for_a_target():
    with pytest.raises(ConvertError, match=r"add --target-size SIZE"):
        assign(load_profile("budget"), model_map())


def test_every_matrix_has_a_format_that_fits():
    for kind in KINDS:
        of = model_map(kind, 288, tied=True)
        plan = planned(load_profile("budget"), of, evidence(of))
        assert {row.tensor.name for row in plan.tensors if row.format != "F32"} == {t.name for t in matrices(of)}
        assert all(get_format(row.format).fits(row.tensor.n_columns) for row in plan.tensors)


def test_no_preset_file_is_left_out_of_the_package():
    assert all(path.suffix == ".toml" for path in Path(PRESETS).iterdir())
