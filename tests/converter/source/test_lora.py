"""An adapter is merged into its base model as its formulas say, row by row, or refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from bitwright.converter import convert
from bitwright.converter.cli import main
from bitwright.converter.model.model_map import describe
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.gguf import read_gguf
from bitwright.profiles.vocabulary import Role
from tests import tiny_models

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_models.build("llama-256", tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    tiny_models.build("llama-tied", tmp_path / "tied")
    return tmp_path / "tied"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 8


def write(directory: Path, base: Path | None, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    stated = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "base_model_name_or_path": str(base) if base else None}
    (directory / "adapter_config.json").write_text(json.dumps(stated | config))
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, directory / "adapter_model.safetensors")
    return directory


def pair(module: str, shape: torch.Size, rank: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    a, b = random(rank, shape[1], seed=1).to(dtype), random(shape[0], rank, seed=2).to(dtype)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in load_file(directory / "model.safetensors").items()}


def product(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    return tensors[f"{module}.lora_B.weight"].float() @ tensors[f"{module}.lora_A.weight"].float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 4.0),
        ({"use_rslora": True}, 8.0),
        ({"alpha_pattern": {"q_proj": 2}}, 0.5),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 6, "q_proj": 2}}, 1.5),
        ({"alpha_pattern": {"k_proj": 6}, "rank_pattern": {"q_proj": 4}, "r": 64}, 4.0),
    ],
)
def test_a_matrix_is_the_sum(config: dict[str, Any], scale: float, dtype: torch.dtype, base, tmp_path) -> None:
    whole = weights(base)
    tensors = pair(QUERY, whole[f"{QUERY}.weight"].shape, dtype=dtype)
    checkpoint = open_checkpoint(str(write(tmp_path / "adapter", base, tensors, **config)))
    expected = (whole[f"{QUERY}.weight"] + scale * product(tensors, QUERY)).numpy()
    found = checkpoint.read(f"{QUERY}.weight")
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(checkpoint.read(f"{QUERY}.weight", 3, 60), expected[3:60], rtol=1e-6, atol=1e-6)
    rows = np.array([9, 0, 9])
    np.testing.assert_allclose(checkpoint.read_rows(f"{QUERY}.weight", rows), expected[rows], rtol=1e-6, atol=1e-6)
    assert np.array_equal(checkpoint.read(f"{DOWN}.weight"), whole[f"{DOWN}.weight"].numpy())
    assert (checkpoint.model_id, checkpoint.location) == ("adapter", base)


def test_rows_of_dora_have_the_lengths_that_were_learned(base: Path, tmp_path: Path) -> None:
    matrix = weights(base)[f"{QUERY}.weight"]
    tensors = pair(QUERY, matrix.shape)
    lengths = random(matrix.shape[0], seed=3).abs() + 0.5
    for end in ("", ".weight"):
        named = {**tensors, f"{QUERY}.lora_magnitude_vector{end}": lengths}
        checkpoint = open_checkpoint(str(write(tmp_path / "adapter", base, named, use_dora=True)))
        summed = matrix + 4 * product(tensors, QUERY)
        expected = (lengths / summed.norm(dim=1))[:, None] * summed
        np.testing.assert_allclose(checkpoint.read(f"{QUERY}.weight", 5, 99), expected[5:99], rtol=1e-5, atol=1e-6)


def test_matrices_that_lie_on_their_side(base: Path, tmp_path: Path) -> None:
    """fan_in_fan_out: the stored matrix is [n_inputs, n_outputs], as GPT-2's are."""
    matrix = weights(base)[f"{DOWN}.weight"]
    turned = pair(DOWN, torch.Size(matrix.T.shape))
    checkpoint = open_checkpoint(str(write(tmp_path / "adapter", base, turned, fan_in_fan_out=True)))
    expected = matrix + 4 * product(turned, DOWN).T
    np.testing.assert_allclose(checkpoint.read(f"{DOWN}.weight", 1, 50), expected[1:50], rtol=1e-5, atol=1e-6)


def test_embeddings_are_adapted_and_modules_replaced(base: Path, tmp_path: Path) -> None:
    whole = weights(base)
    n_tokens, width = whole[EMBEDDING].shape
    a, b = random(4, n_tokens, seed=1), random(width, 4, seed=2)
    head = random(n_tokens, width, seed=5)
    tensors = {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b, HEAD: head}
    checkpoint = open_checkpoint(str(write(tmp_path / "adapter", base, tensors, modules_to_save=["lm_head"])))
    expected = whole[EMBEDDING] + 4 * (b @ a).T
    np.testing.assert_allclose(checkpoint.read(EMBEDDING, 7, 300), expected[7:300], rtol=1e-5, atol=1e-6)
    assert np.array_equal(checkpoint.read(HEAD), head.numpy())


@pytest.mark.parametrize("ensured", [False, True])
def test_a_tied_head_stays_what_it_was(ensured: bool, tied: Path, tmp_path: Path) -> None:
    """Where the embedding alone is adapted, training computes logits with the one of the base model."""
    whole = weights(tied)[EMBEDDING]
    a, b = random(4, whole.shape[0], seed=1), random(whole.shape[1], 4, seed=2)
    tensors = {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b}
    checkpoint = open_checkpoint(str(write(tmp_path / "adapter", tied, tensors, ensure_weight_tying=ensured)))
    assert (HEAD in checkpoint.tensors) != ensured
    np.testing.assert_allclose(checkpoint.read(EMBEDDING), whole + 4 * (b @ a).T, rtol=1e-5, atol=1e-6)
    if not ensured:
        assert np.array_equal(checkpoint.read(HEAD), whole.numpy())
        assert [t.role for t in describe(checkpoint).tensors].count(Role.OUTPUT) == 1


def test_a_tied_head_is_adapted_alone(tied: Path, tmp_path: Path) -> None:
    whole = weights(tied)[EMBEDDING]
    tensors = pair("lm_head", whole.shape)
    checkpoint = open_checkpoint(str(write(tmp_path / "adapter", tied, tensors)))
    assert np.array_equal(checkpoint.read(EMBEDDING), whole.numpy())
    expected = whole + 4 * product(tensors, "lm_head")
    np.testing.assert_allclose(checkpoint.read(HEAD), expected, rtol=1e-5, atol=1e-6)


def test_the_artifact_is_that_of_the_merged_model(base: Path, tmp_path: Path) -> None:
    stored = load_file(base / "model.safetensors")
    tensors = pair(QUERY, stored[f"{QUERY}.weight"].shape) | pair(DOWN, stored[f"{DOWN}.weight"].shape)
    adapter = write(tmp_path / "adapter", base, tensors)
    merged = tmp_path / "merged"
    tiny_models.build("llama-256", merged)
    for module in (QUERY, DOWN):
        stored[f"{module}.weight"] = stored[f"{module}.weight"].float() + 4 * product(tensors, module)
    save_file(stored, merged / "model.safetensors", {"format": "pt"})
    artifacts = []
    for model in (adapter, merged):
        output = tmp_path / f"{model.name}.gguf"
        convert(str(model), "fp16-baseline", output=output, quiet=True, judge="off", threads=1)
        artifacts.append({t.name: t.decode(0, t.n_rows) for t in read_gguf(output).tensors})
    assert artifacts[0].keys() == artifacts[1].keys()
    for name, values in artifacts[1].items():
        np.testing.assert_allclose(artifacts[0][name], values, rtol=1e-3, atol=1e-6)


def test_the_base_is_named_on_the_command_line(base: Path, tmp_path: Path) -> None:
    tensors = pair(QUERY, weights(base)[f"{QUERY}.weight"].shape)
    adapter = write(tmp_path / "adapter", None, tensors)
    arguments = ["plan", "--profile", "uniform-8bit", str(adapter)]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 1 and "does not say of which model" in refused.stderr and "--base" in refused.stderr
    planned = CliRunner().invoke(main, [*arguments, "--base", str(base)])
    assert planned.exit_code == 0, planned.stderr
    assert "the adapter adapter is merged into base: 1 matrices are adapted" in " ".join(planned.output.split())
    refused = CliRunner().invoke(main, ["plan", "--profile", "uniform-8bit", str(base), "--base", str(base)])
    assert refused.exit_code == 1 and "MODEL is no adapter" in refused.stderr


def test_both_halves_decide_what_a_job_is(base: Path, tmp_path: Path) -> None:
    tensors = pair(QUERY, weights(base)[f"{QUERY}.weight"].shape)
    adapter = write(tmp_path / "adapter", base, tensors)
    before = open_checkpoint(str(adapter)).files()
    assert {name for name, _, _ in before} >= {"config.json", "model.safetensors", "adapter_model.safetensors"}
    write(adapter, base, tensors, lora_alpha=8)
    assert open_checkpoint(str(adapter)).files() != before


Edit = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@pytest.mark.parametrize(
    ("edit", "config", "what"),
    [
        (
            lambda t: pair("model.layers.9.self_attn.q_proj", torch.Size((4, 4))),
            {},
            "adapts .*layers.9.* does not have",
        ),
        (lambda t: {**t, HEAD: random(5, 256)}, {}, r"of the shape \[5, 256\], and the base"),
        (lambda t: pair(QUERY, torch.Size((256, 128))), {}, "and the base model's is"),
        (lambda t: {next(iter(t)): t[next(iter(t))]}, {}, "one half of its two matrices"),
        (lambda t: {**t, f"{QUERY}.lora_C.weight": random(4, 4)}, {}, "of no kind that is known"),
        (lambda t: t, {"peft_type": "LOHA"}, "of the kind 'LOHA'"),
        (lambda t: t, {"use_dora": True}, "lacks the lengths of its rows"),
        (lambda t: t, {"init_lora_weights": "pissa_niter_4"}, "began as pissa_niter_4"),
        (lambda t: t, {"layer_replication": [[0, 4], [2, 5]]}, "trained with layer_replication"),
        (lambda t: t, {"lora_alpha": None}, "lora_alpha is None"),
    ],
)
def test_what_cannot_be_merged_is_refused(edit: Edit, config: dict[str, Any], what: str, base, tmp_path) -> None:
    tensors = edit(pair(QUERY, weights(base)[f"{QUERY}.weight"].shape))
    with pytest.raises(ConvertError, match=what):
        open_checkpoint(str(write(tmp_path / "adapter", base, tensors, **config)))


def test_a_base_that_is_not_here(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", Path("/nowhere/base"), {"x.lora_A.weight": random(4, 4)})
    with pytest.raises(ConvertError, match="one of '/nowhere/base', which is not on this machine"):
        open_checkpoint(str(adapter))


def test_pickles_are_not_read(base: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", base, {"x.lora_A.weight": random(4, 4)})
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ConvertError, match=r"has no adapter_model\.safetensors; pickles"):
        open_checkpoint(str(adapter))
