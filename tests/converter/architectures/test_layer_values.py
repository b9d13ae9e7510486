"""What a configuration gives layers of their own, what follows of it, and which file describes it."""

from pathlib import Path

import numpy as np
import pytest

from bitwright.converter.architectures.architecture import find_architecture
from bitwright.converter.architectures.data_file import parse
from bitwright.converter.model.configuration import configure
from bitwright.converter.source.sentence_transformers import embedding_facts
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.stored_tensor import StoredTensor
from bitwright.profiles.layout import Layout

GEMMA4 = {
    "model_type": "gemma4_text",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}


def stored() -> dict[str, StoredTensor]:
    """Enough tensors for the sizes not to be out of proportion."""
    return {f"{i}": StoredTensor("F32", (400, 256), Path("model"), 0) for i in range(8)}


def values(**edits: object) -> dict[str, object]:
    return configure({**GEMMA4, **edits}, "config.json", stored()).values


def test_layers_have_their_own_widths_by_either_spelling() -> None:
    assert values()["head_dim_of_layers"] == [16, 32, 16, 32]
    own = {"1": {"head_dim": 32}, "3": {"head_dim": 32, "num_key_value_heads": 1}}
    spelled = values(per_layer_config=own)
    assert spelled["head_dim_of_layers"] == [16, 32, 16, 32]
    assert spelled["num_key_value_heads_of_layers"] == [2, 2, 2, 1]


def test_what_no_layer_may_have_of_its_own_is_refused() -> None:
    for own in ({"1": {"hidden_size": 32}}, {"9": {"head_dim": 32}}, {"first": {"head_dim": 32}}):
        with pytest.raises(ConvertError, match="per_layer_config"):
            values(per_layer_config=own)


@pytest.mark.parametrize(
    ("config", "file"),
    [
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M-*M-"}, "nemotron_h"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "ME*"}, "nemotron_h_moe"),
        ({"model_type": "nemotron_h", "layers_block_type": ["linear_attention", "moe"]}, "nemotron_h_moe"),
        ({"model_type": "granitemoehybrid", "layer_types": ["attention"]}, "granite4"),
        ({"model_type": "granitemoehybrid", "layer_types": ["attention", "mamba"]}, "granitemoehybrid"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "embeddinggemma"),
        ({"model_type": "gemma3_text"}, "gemma3"),
    ],
)
def test_the_condition_chooses_among_files_of_a_model_type(config: dict[str, object], file: str) -> None:
    assert find_architecture(config, "config.json").name == file


def test_keys_follow_from_others() -> None:
    text = """
gguf_name = "llama"
model_types = ["mine"]
layer_prefix = "layers.{layer}."
[derived]
num_hidden_layers = "len(marks)"
[metadata.uint32]
[tensors.before]
"""
    mine = parse("mine", text)
    assert mine.completed({"marks": "M-*"})["num_hidden_layers"] == 3
    assert mine.completed({"marks": "M-*", "num_hidden_layers": 2})["num_hidden_layers"] == 2
    assert "num_hidden_layers" not in mine.completed({})


def test_factors_are_of_runs_of_rows() -> None:
    layout = Layout(factors=((2, 0.5), (3, 3.0)))
    ones = np.ones((3, 1), np.float32)
    assert layout.to_artifact(ones, 1).tolist() == [[0.5], [3.0], [3.0]]
    assert np.array_equal(Layout().to_artifact(ones, 1), ones)
    rows = np.arange(1, 6, dtype=np.float32)[:, None]
    assert np.array_equal(layout.to_stored(layout.to_artifact(rows, 0)), rows)


def pooling(directory: Path, **stated: object) -> dict[str, object]:
    modules = '[{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "1_Pooling"}, {"type": "a.Dense"}]'
    (directory / "modules.json").write_text(modules)
    (directory / "1_Pooling").mkdir()
    text = ", ".join(f'"{key}": {str(value).lower()}' for key, value in stated.items())
    (directory / "1_Pooling" / "config.json").write_text(f"{{{text}}}")
    return embedding_facts(directory, {"architectures": ["Qwen3ForCausalLM"]})


def test_the_pooling_is_that_of_sentence_transformers(tmp_path: Path) -> None:
    found = pooling(tmp_path, pooling_mode_lasttoken=True, pooling_mode_mean_tokens=False, include_prompt=True)
    assert found == {"embeds": True, "pooling_type": 3, "dense_layers": 1}


def test_a_pooling_that_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="max_tokens"):
        pooling(tmp_path, pooling_mode_max_tokens=True)


def test_a_class_without_a_head_embeds(tmp_path: Path) -> None:
    assert embedding_facts(tmp_path, {"architectures": ["Qwen3Model"]}) == {"embeds": True}
    assert embedding_facts(tmp_path, {"architectures": ["GPT2LMHeadModel"]}) == {}
    assert embedding_facts(tmp_path, {"architectures": ["Qwen3ForCausalLM"]}) == {}
