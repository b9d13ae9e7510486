"""Plans of safetensors directories: one scheme for what runtimes multiply as one, fallbacks with reasons, bytes."""

from dataclasses import replace

import pytest

from bitwright.formats.errors import ConvertError
from bitwright.formats.schemes.registry import SCHEMES
from bitwright.profiles.planning.plan_modules import (
    ModulePlan,
    fused_groups,
    given_schemes,
    plan_modules,
    repair_lines,
)
from bitwright.profiles.reading.rules import parse_override
from bitwright.profiles.reading.schema import load_profile, parse_profile
from bitwright.profiles.vocabulary import ModelMap, Role, TensorSpec

_OF_LAYER = {
    "self_attn.q_proj": (Role.ATTENTION_QUERY, (128, 128)),
    "self_attn.k_proj": (Role.ATTENTION_KEY, (64, 128)),
    "self_attn.v_proj": (Role.ATTENTION_VALUE, (64, 128)),
    "self_attn.o_proj": (Role.ATTENTION_OUTPUT, (128, 128)),
    "mlp.gate_proj": (Role.MLP_GATE, (96, 128)),
    "mlp.up_proj": (Role.MLP_UP, (96, 128)),
    "mlp.down_proj": (Role.MLP_DOWN, (128, 96)),
}
_OF_EXPERT = {"gate_proj": Role.EXPERT_GATE, "up_proj": Role.EXPERT_UP, "down_proj": Role.EXPERT_DOWN}


def modules(n_layers: int = 2, n_experts: int = 0) -> ModelMap:
    tensors = [TensorSpec("model.embed_tokens.weight", (40, 128), Role.EMBEDDING)]
    for layer in range(n_layers):
        prefix = f"model.layers.{layer}."
        tensors.append(TensorSpec(f"{prefix}input_layernorm.weight", (128,), Role.NORM, layer))
        for name, (role, shape) in _OF_LAYER.items():
            if name.startswith("self_attn") or not n_experts:
                tensors.append(TensorSpec(f"{prefix}{name}.weight", shape, role, layer))
        if n_experts:
            tensors.append(TensorSpec(f"{prefix}mlp.gate.weight", (n_experts, 128), Role.ROUTER, layer))
        for expert in range(n_experts):
            for name, role in _OF_EXPERT.items():
                tensors.append(TensorSpec(f"{prefix}mlp.experts.{expert}.{name}.weight", (128, 128), role, layer))
    tensors.append(TensorSpec("lm_head.weight", (40, 128), Role.OUTPUT))
    return ModelMap("llama", n_layers, tuple(tensors))


def planned(text: str, of: ModelMap, *overrides: str, dtype: str = "BF16") -> ModulePlan:
    profile = parse_profile(f'description = "d"\ngood_for = "g"\ntarget = "safetensors"\n{text}', "p", "p.toml")
    rules = tuple(parse_override(override, "safetensors") for override in overrides)
    return plan_modules(profile, of, {t.name: dtype for t in of.tensors}, rules)


def formats(plan: ModulePlan) -> dict[str, str]:
    return {row.tensor.name: row.format for row in plan.tensors}


def test_matrices_of_the_layers_are_quantized_and_all_else_is_kept():
    plan = planned('base = "W8A8"', modules())
    for row in plan.tensors:
        inside = row.tensor.layer is not None and row.tensor.role is not Role.NORM
        assert row.format == ("W8A8" if inside else "BF16"), row.tensor.name


@pytest.mark.parametrize("name", ["balanced-4bit", "budget"])
def test_a_profile_of_a_gguf_is_refused(name):
    with pytest.raises(ConvertError, match="no schemes of a safetensors directory"):
        plan_modules(load_profile(name), modules(), {})


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_what_is_kept_loses_nothing_of_its_16_bits(dtype):
    found = formats(planned('base = "W8A8"', modules(), dtype=dtype))
    assert found["model.layers.0.input_layernorm.weight"] == dtype
    assert found["lm_head.weight"] == ("F16" if dtype == "F16" else "BF16")


@pytest.mark.parametrize("name", list(SCHEMES))
def test_bytes_are_those_of_the_tensors(name):
    for row in planned(f'base = "{name}"', modules()).tensors:
        widths = {"F32": 4, "I32": 4, "I64": 8, "BF16": 2, "F16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1}
        total = 0
        for dtype, shape in row.stored.values():
            n = widths[dtype]
            for dimension in shape:
                n *= dimension
            total += n
        assert row.n_bytes == total


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("W4A16", "W4A16_G32"),
        ("W4A16_ASYM", "W4A16_ASYM_G32"),
        ("FP8_BLOCK", "FP8"),
        ("NVFP4", "NVFP4"),
        ("W8A16", "W8A16_CHANNEL"),
    ],
)
def test_a_group_that_does_not_divide_falls_back_and_says_so(wanted, expected):
    """Rows of 96."""
    plan = planned(f'base = "{wanted}"', modules())
    (row,) = [row for row in plan.tensors if row.tensor.name == "model.layers.1.mlp.down_proj.weight"]
    assert row.format == expected and row.tensor.shape == (128, 96)
    assert (row.wanted == wanted) == (expected != wanted)
    if row.wanted:
        assert any(expected in line and wanted in line for line in repair_lines(plan))


def test_what_runtimes_fuse_gets_the_finest_scheme_of_its_members():
    plan = planned('base = "W4A16_G32"', modules(), "model.layers.0.self_attn.k_proj.weight=W8A8", "mlp_up=BF16")
    found = formats(plan)
    for name in "qkv":
        assert found[f"model.layers.0.self_attn.{name}_proj.weight"] == "W8A8"
        assert found[f"model.layers.1.self_attn.{name}_proj.weight"] == "W4A16_G32"
    assert found["model.layers.0.mlp.gate_proj.weight"] == "BF16"
    assert found["model.layers.0.mlp.down_proj.weight"] == "W4A16_G32"
    assert any("multiplied as one with k_proj, which is W8A8" in line for line in repair_lines(plan))


@pytest.mark.parametrize("name", ["W8A8", "FP8"])
def test_scales_that_are_measured_by_token_are_finer_than_static_ones(name):
    for base, other in ((name, f"{name}_STATIC"), (f"{name}_STATIC", name)):
        found = formats(planned(f'base = "{base}"', modules(), f"attention_value={other}"))
        assert {found[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qkv"} == {name}


def test_a_fallback_takes_its_group_along():
    plan = planned('base = "W8A8"', modules())
    dtypes = {row.tensor.name: "BF16" for row in plan.tensors}
    changed = given_schemes(plan, {"model.layers.0.self_attn.v_proj.weight": ("BF16", "outliers")}, dtypes)
    found = formats(changed)
    assert [found[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qkvo"] == ["BF16"] * 3 + ["W8A8"]


def test_members_of_a_group_share_second_level_scales():
    plan = planned('base = "NVFP4A16"', modules())
    shared = {row.tensor.name: row.shares_scale_with for row in plan.tensors}
    for group in fused_groups(plan):
        assert all(shared[name] == group for name in group)
    assert shared["model.layers.0.self_attn.o_proj.weight"] == ("model.layers.0.self_attn.o_proj.weight",)
    assert len(fused_groups(plan)) == 4


def test_experts_of_a_layer_are_of_one_scheme_that_vllm_fuses():
    of = modules(n_experts=4)
    found = formats(planned('base = "W8A8_STATIC"', of, "model.layers.1.mlp.experts.2.down_proj.weight=BF16"))
    experts = {name: scheme for name, scheme in found.items() if "experts" in name}
    assert {experts[name] for name in experts if ".0.mlp" in name} == {"W8A8"}
    assert {experts[name] for name in experts if "layers.1." in name} == {"BF16"}
    assert found["model.layers.0.self_attn.o_proj.weight"] == "W8A8_STATIC"
    assert found["model.layers.0.mlp.gate.weight"] == "BF16"
    asymmetric = formats(planned('base = "W4A16_ASYM"', of))
    assert asymmetric["model.layers.0.mlp.experts.0.up_proj.weight"] == "W4A16"
    assert asymmetric["model.layers.0.self_attn.o_proj.weight"] == "W4A16_ASYM"


def test_no_runtime_reads_embeddings_or_heads_with_rounded_inputs():
    found = formats(planned('base = "W8A8"', modules(), "*=W8A8"))
    assert found["model.embed_tokens.weight"] == found["lm_head.weight"] == "BF16"
    assert formats(planned('base = "W8A8"', modules(), "output=W4A16"))["lm_head.weight"] == "W4A16"


@pytest.mark.parametrize("preset", ["fp8", "fp8-kv", "hybrid-long-context", "nvfp4-vllm", "smoothquant-w8a8", "w4a16"])
def test_presets_plan_any_model(preset):
    profile = load_profile(preset)
    for of in (modules(), modules(n_experts=2)):
        plan = plan_modules(profile, of, {t.name: "BF16" for t in of.tensors})
        assert plan.bits_per_weight < 16 and not [
            r for r in plan.tensors if r.tensor.role is Role.OUTPUT and r.format != "BF16"
        ]


def test_an_unknown_scheme_names_the_nearest():
    with pytest.raises(ConvertError, match="did you mean 'W8A8'"):
        planned('base = "W8A9"', modules())
    with pytest.raises(ConvertError, match="matches no tensor"):
        planned('base = "W8A8"', modules(), "model.layers.7.*=BF16")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[activations]\nalpha = 1.5", "alpha is 1.5"),
        ("[activations]\nsmoth = true", "unknown key 'smoth'"),
        ("[activations]\nsmooth = 1", "neither true nor false"),
        ('[activations]\nscales = "max"', "unknown scales 'max'"),
    ],
)
def test_a_wrong_table_of_activations_is_refused(text, what):
    with pytest.raises(ConvertError, match=what):
        planned(f'base = "W8A8"\n{text}', modules())


def test_a_gguf_says_nothing_of_activations():
    with pytest.raises(ConvertError, match="a GGUF says nothing of activations"):
        parse_profile('description = "d"\ngood_for = "g"\nbase = "Q4_K"\n[activations]\nsmooth = true', "p", "p.toml")


FP8_CACHE = 'base = "FP8"\n[activations]\nkv_cache = "FP8"'


def test_scales_of_caches_follow_the_projections_and_count():
    plan, without = planned(FP8_CACHE, modules(3)), planned('base = "FP8"', modules(3))
    stored = [name for row in plan.tensors for name in row.stored]
    for layer in range(3):
        for key in "kv":
            scale = stored.index(f"model.layers.{layer}.self_attn.{key}_scale")
            assert stored[scale - 1] == f"model.layers.{layer}.self_attn.{key}_proj.weight_scale"
    assert plan.n_bytes == without.n_bytes + 3 * 2 * 2 and plan.digest() != without.digest()


def test_scales_of_caches_stay_where_a_scheme_falls_back_and_where_none_is():
    of, name = modules(), "model.layers.0.self_attn.k_proj.weight"
    changed = given_schemes(planned(FP8_CACHE, of), {name: ("BF16", "why")}, {t.name: "BF16" for t in of.tensors})
    kept = planned(FP8_CACHE, of, "model.layers.0.self_attn.*=BF16")
    for plan in (changed, kept):
        (row,) = (row for row in plan.tensors if row.tensor.name == name)
        assert row.format == "BF16" and row.n_bytes == 2 * row.tensor.n_weights + 2
        assert list(row.stored) == [name, "model.layers.0.self_attn.k_scale"]


def test_a_layer_without_keys_and_values_has_no_scale_for_a_cache():
    of = modules(3)
    fewer = replace(of, tensors=tuple(t for t in of.tensors if "layers.1.self_attn.v_proj" not in t.name))
    with pytest.raises(ConvertError, match=r"1 layers have no attention[\s\S]*layer 1[\s\S]*kv_cache"):
        planned(FP8_CACHE, fewer)
