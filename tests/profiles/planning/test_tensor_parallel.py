"""Plans over several GPUs, by vLLM's rules: heads divide, shards have whole groups; what does not is named."""

import pytest

from bitwright.formats.errors import ConvertError
from bitwright.profiles.planning.tensor_parallel import Heads, check_tensor_parallel, unchecked_roles
from bitwright.profiles.vocabulary import ModelMap, Role, TensorSpec
from tests.profiles.planning.test_plan_modules import planned

HEADS = Heads((8,), (4,))


def model(mlp: int = 1152, role: Role = Role.MLP_DOWN) -> ModelMap:
    """Two layers 512 wide, with 8 heads of 64, 4 of them of keys and values."""
    shapes = {
        "self_attn.q_proj": (Role.ATTENTION_QUERY, (512, 512)),
        "self_attn.k_proj": (Role.ATTENTION_KEY, (256, 512)),
        "self_attn.v_proj": (Role.ATTENTION_VALUE, (256, 512)),
        "self_attn.o_proj": (Role.ATTENTION_OUTPUT, (512, 512)),
        "mlp.gate_proj": (Role.MLP_GATE, (mlp, 512)),
        "mlp.up_proj": (Role.MLP_UP, (mlp, 512)),
        "mlp.down_proj": (role, (512, mlp)),
    }
    tensors = [
        TensorSpec(f"model.layers.{layer}.{name}.weight", shape, of, layer)
        for layer in range(2)
        for name, (of, shape) in shapes.items()
    ]
    return ModelMap("llama", 2, (TensorSpec("model.embed_tokens.weight", (41, 512), Role.EMBEDDING), *tensors))


def refused(scheme: str, n_gpus: int, heads: Heads = HEADS, mlp: int = 1152, *overrides: str) -> ConvertError:
    with pytest.raises(ConvertError) as caught:
        check_tensor_parallel(planned(f'base = "{scheme}"', model(mlp), *overrides), heads, n_gpus)
    assert caught.value.where == f"--tensor-parallel {n_gpus}"
    return caught.value


@pytest.mark.parametrize("scheme", ["W8A8", "FP8", "W4A16_G64", "W4A16_G32", "NVFP4", "W8A16_CHANNEL"])
def test_what_divides_passes(scheme):
    check_tensor_parallel(planned(f'base = "{scheme}"', model()), HEADS, 2)
    check_tensor_parallel(planned('base = "W4A16"', model()), HEADS, 1)


def test_groups_that_a_shard_would_cut_are_named_with_what_serves():
    """1152 columns are 9 groups of 128, and half of them are four and a half."""
    error = refused("W4A16", 2)
    assert "model.layers.0.mlp.down_proj.weight and 1 like it: each GPU has 576 of 1152 columns" in error.what
    assert "W4A16 needs a multiple of 128" in error.what and "o_proj" not in error.what
    assert error.remedy == "use 1 GPU, or other schemes: --set 'mlp_down=W4A16_G64'"
    check_tensor_parallel(planned('base = "W4A16"', model(), "mlp_down=W4A16_G64"), HEADS, 2)


def test_blocks_of_rows_are_whole_on_every_gpu():
    error = refused("FP8_BLOCK", 2)
    assert "mlp.gate_proj.weight and 1 like it: each GPU has 576 of 1152 rows" in error.what
    assert "--set 'mlp_gate=FP8'" in error.remedy and "--set 'mlp_down=FP8'" in error.remedy
    check_tensor_parallel(planned('base = "FP8_BLOCK"', model(1024)), HEADS, 2)


def test_words_of_packed_integers_are_whole_on_every_gpu():
    assert (
        "each GPU has 6 of 12 columns, and W8A16_CHANNEL needs a multiple of 4"
        in refused("W8A16_CHANNEL", 2, mlp=12).what
    )


def test_what_is_kept_has_to_divide_too():
    error = refused("W8A8", 2, HEADS, 1153, "mlp_down=BF16")
    assert "model.layers.0.mlp.down_proj.weight and 1 like it: 1153 columns" in error.what
    assert "--set" not in error.remedy


@pytest.mark.parametrize(
    ("heads", "n_gpus", "what"),
    [
        (Heads((9,), (3,)), 2, "9 attention heads"),
        (Heads((8, 6), (2,)), 4, "6 attention heads"),
        (Heads((12,), (6,)), 4, "6 heads of keys and values"),
    ],
)
def test_heads_that_do_not_divide(heads, n_gpus, what):
    error = refused("W8A8", n_gpus, heads)
    assert what in error.what and error.remedy.startswith("use 1")


def test_heads_of_keys_are_copied_where_there_are_fewer_than_gpus():
    """4 of 64 rows over 8 GPUs: one on each, in two copies, and no block of 128 rows."""
    check_tensor_parallel(planned('base = "W8A8"', model()), HEADS, 8)
    blocks = refused("FP8_BLOCK", 8, HEADS, 1024)
    assert "k_proj.weight and 1 like it: each GPU has 64 of 256 rows" in blocks.what


def test_the_numbers_of_gpus_that_serve_are_named():
    assert refused("W8A8", 3).remedy == "use 1 or 2 or 4 GPUs"


def test_what_is_not_known_is_said():
    assert unchecked_roles(planned('base = "W8A8"', model())) == []
    assert unchecked_roles(planned('base = "W8A8"', model(role=Role.SSM_OUTPUT))) == [Role.SSM_OUTPUT]
