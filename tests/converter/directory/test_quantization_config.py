"""quantization_config: compressed-tensors parses it, and gives every module the scheme that the plan gives it."""

import json
import re
from dataclasses import replace

import pytest
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name

from bitwright.converter.directory.config import quantization_config
from bitwright.formats.schemes.registry import SCHEMES
from bitwright.profiles.planning.plan_modules import ModulePlan
from bitwright.profiles.vocabulary import Role
from tests.profiles.planning.test_plan_modules import modules, planned


def resolved(config: QuantizationConfig, name: str) -> tuple | None:
    """(bits, type, strategy of the weights, bits of the inputs) of a Linear module of this name; None where ignored."""
    if any(match_name(name, target) for target in config.ignore or []):
        return None
    for group in config.config_groups.values():
        if any(target == "Linear" or match_name(name, target) for target in group.targets):
            inputs = group.input_activations
            return group.weights.num_bits, group.weights.type, group.weights.strategy, inputs and inputs.num_bits
    raise AssertionError(f"{name} is neither ignored nor targeted")


def check(plan: ModulePlan, rename=lambda name: name) -> QuantizationConfig:
    data = json.loads(json.dumps(quantization_config(plan)))
    config = QuantizationConfig.model_validate(data)
    for row in plan.tensors:
        if len(row.tensor.shape) != 2 or row.tensor.role is Role.EMBEDDING:
            continue
        scheme = row.scheme
        expected = None
        if scheme is not None:
            inputs = scheme.activations
            expected = scheme.weights.num_bits, scheme.weights.type, scheme.weights.strategy, inputs and inputs.num_bits
        assert resolved(config, rename(row.module)) == expected, row.module
    return config


@pytest.mark.parametrize("name", list(SCHEMES))
def test_every_scheme_is_understood(name):
    config = check(planned(f'base = "{name}"', modules()))
    assert config.format == SCHEMES[name].format or len(config.config_groups) > 1


def test_one_scheme_is_said_as_everybody_does():
    data = quantization_config(planned('base = "W8A8"', modules()))
    assert data["config_groups"]["group_0"]["targets"] == ["Linear"] and data["ignore"] == ["lm_head"]
    assert data["format"] == "int-quantized" and data["kv_cache_scheme"] is None


def test_an_output_head_is_named_as_no_runtime_s_linear_layer():
    config = check(planned('base = "W4A16"', modules(), "output=W4A16", "mlp_down=W4A16_G32", "mlp_*=W4A16"))
    assert any(match_name("language_model.lm_head", t) for g in config.config_groups.values() for t in g.targets)
    config = check(planned('base = "W8A16_CHANNEL"', modules(), "output=W8A16_CHANNEL"))
    assert config.config_groups["group_0"].targets == ["Linear", "re:.*lm_head$"] and config.ignore == []


def test_a_cache_is_said_as_runtimes_read_it():
    config = check(planned('base = "W4A16"\n[activations]\nkv_cache = "FP8"', modules()))
    scheme = config.kv_cache_scheme
    assert scheme is not None and scheme.dynamic is False and scheme.symmetric is True
    assert (scheme.num_bits, scheme.type, scheme.strategy) == (8, "float", "tensor")


def test_several_schemes_have_groups_of_their_own():
    plan = planned('base = "W8A8"', modules(3), "mlp_*=NVFP4A16", "model.layers.1.self_attn.o_proj.weight=BF16")
    config = check(plan)
    assert config.format == "mixed-precision" and len(config.config_groups) == 2
    assert [group.format for group in config.config_groups.values()] == ["int-quantized", "nvfp4-pack-quantized"]


def test_layers_of_their_own_are_told_apart_also_beyond_nine():
    plan = planned('base = "FP8"', modules(12), "model.layers.1.mlp.down_proj.weight=W8A8")
    check(plan)
    check(plan, rename=lambda name: name.replace("model.layers", "model.language_model.layers"))


@pytest.mark.parametrize("stored", ["model.language_model.", "language_model.model."])
def test_what_is_kept_of_a_model_with_images_is_found_under_the_prefix_of_any_runtime(stored):
    of = modules(12)
    tensors = tuple(replace(t, name=t.name.replace("model.", stored, 1)) for t in of.tensors)
    head = replace(tensors[-1], name="language_model.lm_head.weight")
    plan = planned('base = "FP8"', replace(of, tensors=(*tensors[:-1], head)), "*layers.1.mlp.down_proj.weight=BF16")
    check(plan)
    check(plan, rename=lambda name: name.replace("language_model.lm_head", "lm_head"))
    for prefix in ("model.", "model.language_model.", "language_model.model."):
        check(plan, rename=lambda name, prefix=prefix: name.replace(stored, prefix))


def test_experts_and_routers():
    config = check(planned('base = "FP8"', modules(2, n_experts=3), "attention_*=W8A8"))
    assert "model.layers.0.mlp.gate" in (config.ignore or [])
    check(planned('base = "W8A8"', modules(2, n_experts=3)))


def test_experts_are_found_under_either_of_their_names():
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}

    def mixtral(name: str) -> str:
        return re.sub(r"(?<=\.experts\.\d\.)\w+", lambda match: names[match[0]], name)

    def looked_up(name: str) -> str:
        return re.sub(r"w\d$", lambda match: next(n for n, stored in names.items() if stored == match[0]), name)

    of = modules(2, n_experts=2)
    of = replace(of, tensors=tuple(replace(t, name=mixtral(t.name)) for t in of.tensors))
    for override in ("attention_*=W8A8", "model.layers.1.*experts*=BF16", "expert_*=BF16"):
        plan = planned('base = "FP8"', of, override)
        check(plan)
        check(plan, rename=looked_up)


def test_a_plan_without_schemes_has_no_configuration():
    with pytest.raises(ValueError, match="without any scheme"):
        quantization_config(planned('base = "BF16"', modules()))
