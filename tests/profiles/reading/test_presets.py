"""What presets may never do to a model, for every role and every architecture."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from bitwright.converter.architectures.architecture import architectures, known_architecture
from bitwright.converter.model.model_map import describe
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.registry import get_format
from bitwright.profiles.evidence import Evidence
from bitwright.profiles.planning.assign import assign
from bitwright.profiles.planning.plan import Plan
from bitwright.profiles.reading.schema import PRESETS, QuantizationProfile, load_profile, preset_names
from bitwright.profiles.vocabulary import UNQUANTIZED_ROLES, ModelMap, Role, TensorSpec
from tests.converter.exceptions import CONVERTED
from tests.profiles.models import KINDS, evidence, matrices, model_map
from tests.tiny_architectures import ALL_TINY_MODELS
from tests.tiny_models import checkpoint

# Bits a weight, at least, of each preset in attention and shared experts; in the output head 4 but for a few.
FLOORS = {
    "attention-high-precision": 8,
    "balanced-4bit": 4,
    "budget": 2,
    "component-mixed": 8,
    "dynamic-1.5bit": 4,
    "fp16-baseline": 16,
    "importance-tiers": 4,
    "layerwise-gradient": 4,
    "mlp-low-precision": 6,
    "nvfp4-gguf": 4,
    "ternary": 2,
    "two-bit": 3,
    "ultra-low-1.5bit": 2,
    "ultra-low-1.75bit": 2,
    "uniform-8bit": 8,
}
SAFETENSORS = {"fp8", "fp8-kv", "hybrid-long-context", "nvfp4-vllm", "smoothquant-w8a8", "w4a16"}
IN_SHARED_EXPERTS = {"attention-high-precision": 4, "mlp-low-precision": 4}
IN_THE_HEAD = {"budget": 0, "ultra-low-1.5bit": 3, "ultra-low-1.75bit": 3}

# Whatever the preset: what no rule for other tensors may reach.
BY_ROLE = {
    **dict.fromkeys(("ssm_parameters", "ssm_step", "ssm_decay", "attention_indexer"), 8),
    **dict.fromkeys(("attention_query_down", "attention_latent", "attention_key_up", "attention_value_up"), 6),
    **dict.fromkeys(("attention_key_value_up", "per_layer_projection", "mtp"), 6),
    **dict.fromkeys(("ssm_input", "ssm_output", "conv_input", "conv_output"), 3),
    **dict.fromkeys(("shared_expert_gate", "shared_expert_up", "shared_expert_down"), 2),
    "per_layer_embedding": 4,
}


def plans(profile: QuantizationProfile, of: ModelMap, measured: Evidence) -> list[Plan]:
    """Every form of the preset: by its rules, by what was measured at their size, and at the smallest size."""
    if not profile.has_rules_instead:
        return [planned(profile, of, measured)]
    by_rules, at_their_size = (
        assign(form, of, evidence=measured, with_importance={t.name for t in of.tensors})
        for form in (profile.by_rules(), profile)
    )
    assert at_their_size.n_bytes <= by_rules.n_bytes
    assert known_sum(at_their_size) <= known_sum(by_rules) * (1 + 1e-9)
    return [by_rules, at_their_size]


def known_sum(plan: Plan) -> float:
    return sum(row.predicted_loss or 0.0 for row in plan.tensors)


def planned(profile: QuantizationProfile, of: ModelMap, measured: Evidence) -> Plan:
    if profile.budget is not None:
        coarse = all(t.n_columns % 256 == 0 for t in matrices(of))  # other rows fit formats from 4 bits on
        bits = sum(t.n_weights * (BY_ROLE.get(t.role, 1.6) + 0.6 if t.quantizable else 32) for t in of.tensors)
        least = bits / sum(t.n_weights for t in of.tensors)
        profile = profile.aiming_at(None, least if coarse else 5.5, None, "test")
    return assign(profile, of, evidence=measured, with_importance={t.name for t in of.tensors})


def check_floors(preset: str, plan: Plan) -> None:
    tied = all(row.tensor.role is not Role.OUTPUT for row in plan.tensors)
    for row in plan.tensors:
        role, bits = row.tensor.role, get_format(row.format).bits_per_weight
        if role in UNQUANTIZED_ROLES:
            assert bits == 32, row
        assert bits >= BY_ROLE.get(role.value, 0), row
        if role.startswith("attention_"):
            assert bits >= FLOORS[preset], row
        if role.startswith("shared_expert_"):
            assert bits >= IN_SHARED_EXPERTS.get(preset, FLOORS[preset]), row
        if role is Role.OUTPUT or (role is Role.EMBEDDING and tied):
            assert bits >= IN_THE_HEAD.get(preset, 4), row


def test_every_preset_is_in_the_table():
    assert set(FLOORS) | SAFETENSORS == set(preset_names())
    assert {path.stem for path in PRESETS.iterdir()} == set(preset_names())


@pytest.mark.parametrize("preset", FLOORS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [256, 288])
def test_floors_for_every_structure(preset, kind, width):
    of = model_map(kind, width)
    for plan in plans(load_profile(preset), of, evidence(of)):
        check_floors(preset, plan)


@pytest.mark.parametrize("preset", FLOORS)
def test_a_role_that_no_preset_knows_stays_above_2_bits(preset):
    """Every matrix of every role, in a model of its own: an architecture that is added later has some of them."""
    for role in set(Role) - UNQUANTIZED_ROLES:
        of = ModelMap("any", 1, (TensorSpec("blk.0.any.weight", (256, 256), role, 0),))
        for plan in plans(load_profile(preset), of, evidence(of)):
            (row,) = (r for r in plan.tensors if r.format != "F32")
            coarse_on_purpose = role.startswith(("mlp_", "expert_"))
            assert coarse_on_purpose or get_format(row.format).bits_per_weight > 2, row


@cache
def of_every_architecture() -> dict[str, tuple[ModelMap, Evidence]]:
    """One tiny model of every architecture that has one, in wide rows, and evidence of it."""
    found: dict[str, tuple[ModelMap, Evidence]] = {}
    for name in CONVERTED:
        opened = open_checkpoint(str(checkpoint(name, ALL_TINY_MODELS[name])), metadata_only=True)
        architecture = known_architecture(opened.config)
        if architecture is not None and architecture.name not in found:
            of = in_wide_rows(describe(opened))
            found[architecture.name] = of, evidence(of)
    return found


@pytest.mark.parametrize("preset", FLOORS)
def test_floors_for_every_architecture(preset):
    for of, measured in of_every_architecture().values():
        for plan in plans(load_profile(preset), of, measured):
            check_floors(preset, plan)
    assert of_every_architecture().keys() >= {architecture.name for architecture in architectures()} - {"bitnet"}


def in_wide_rows(of: ModelMap) -> ModelMap:
    """The same tensors with rows that every format fits, or none of less than 4 bits could be tried."""

    def widened(tensor: TensorSpec) -> TensorSpec:
        return replace(tensor, shape=(*tensor.shape[:-1], 256)) if tensor.quantizable else tensor

    return replace(of, tensors=tuple(map(widened, of.tensors)))


def test_dynamic_1_5_bit_is_what_it_says():
    plan = assign(load_profile("dynamic-1.5bit").by_rules(), model_map("experts after dense layers"))
    formats = {row.tensor.name: row.format for row in plan.tensors}
    assert formats["blk.0.ffn_down.weight"] == formats["blk.1.ffn_up.weight"] == "Q6_K"
    assert formats["blk.7.ffn_up_exps.weight"] == formats["blk.7.ffn_gate_exps.weight"] == "IQ1_S"
    assert formats["blk.7.ffn_down_exps.weight"] == "IQ1_M"
    assert formats["blk.7.ffn_down_shexp.weight"] == "Q6_K"
    assert formats["blk.7.attn_k.weight"] == "Q4_K"


def test_layerwise_gradient_goes_in_thirds():
    plan = assign(load_profile("layerwise-gradient").by_rules(), model_map())
    downs = [row.format for row in plan.tensors if row.tensor.role is Role.MLP_DOWN]
    assert [r.format for r in plan.tensors if r.tensor.role is Role.ATTENTION_KEY][-1] == "IQ4_XS"
    assert downs == ["Q5_K"] * 3 + ["IQ4_XS"] * 3 + ["IQ3_S"] * 2


def test_component_mixed_is_a_sixth_of_float32():
    of = model_map("experts", 4096)
    plan = assign(load_profile("component-mixed").by_rules(), of)
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
