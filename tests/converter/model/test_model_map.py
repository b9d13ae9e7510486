"""The stage `describe`: what a checkpoint is made of, and its rows as the artifact stores them."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
from gguf import Metadata
from safetensors.numpy import load_file, save_file

from bitwright.converter.architectures.architecture import architectures, known_architecture
from bitwright.converter.model.metadata import source_card
from bitwright.converter.model.model_map import describe
from bitwright.converter.model.stored_rows import read_rows, restore
from bitwright.converter.source.front_matter import front_matter_file, read_front_matter
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.profiles.vocabulary import ModelMap, Role
from tests import tiny_models
from tests.converter.artifact.f32_file import write_f32
from tests.converter.exceptions import CONVERTED, REFUSED
from tests.tiny_architectures import ALL_TINY_MODELS
from tests.tiny_models import TINY_MODELS, checkpoint

ROOT = Path(__file__).parents[3]


@cache
def tiny(name: str) -> Path:
    """A tiny checkpoint, for tests that only read it."""
    directory = Path(mkdtemp(prefix="tiny-")) / name
    tiny_models.build(name, directory)
    return directory


def edit_config(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def edit_weights(directory: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path)


def describe_directory(directory: Path) -> ModelMap:
    return describe(open_checkpoint(str(directory)))


def keys(model_map: ModelMap) -> dict[str, Any]:
    """The metadata but for those that come from the directory's name."""
    ours = model_map.metadata.items()
    return {key: (value.value, value.type) for key, value in ours if not key.startswith("general.")}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    directory = tmp_path / "llama"
    tiny_models.build("llama-biases", directory)
    return directory


def test_every_architecture_has_a_tiny_model() -> None:
    opened = (open_checkpoint(str(checkpoint(name, ALL_TINY_MODELS[name]))) for name in [*CONVERTED, *REFUSED])
    covered = {known.name for one in opened if (known := known_architecture(one.config)) is not None}
    assert covered == {architecture.name for architecture in architectures()}


@pytest.mark.parametrize("name", TINY_MODELS)
def test_rows_of_any_range_are_those_of_the_whole(name: str) -> None:
    checkpoint = open_checkpoint(str(tiny(name)))
    generator = np.random.default_rng(5)
    for spec in describe(checkpoint).tensors:
        whole = read_rows(checkpoint, spec, 0, spec.n_rows)
        assert (whole.shape, whole.dtype) == ((spec.n_rows, spec.n_columns), np.float32)
        ends = np.sort(generator.integers(0, spec.n_rows + 1, (6, 2)))
        for start, stop in [(0, 1), (spec.n_rows - 1, spec.n_rows), (spec.n_rows, spec.n_rows), *ends.tolist()]:
            part = read_rows(checkpoint, spec, start, stop)
            assert part.flags.c_contiguous
            assert np.array_equal(part, whole[start:stop]), (spec.name, start, stop)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_restore_is_the_inverse(name: str) -> None:
    checkpoint = open_checkpoint(str(tiny(name)))
    restored: dict[str, np.ndarray] = {}
    for spec in describe(checkpoint).tensors:
        restored |= restore(spec, read_rows(checkpoint, spec, 0, spec.n_rows))
    assert restored.keys() == checkpoint.tensors.keys()
    for source, values in restored.items():
        # Adding one to a norm and taking it away again rounds twice.
        np.testing.assert_allclose(values, checkpoint.read(source), rtol=0, atol=2e-7, err_msg=source)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_tensors_are_in_the_order_of_the_layers(name: str) -> None:
    model_map = describe_directory(tiny(name))
    layers = [spec.layer for spec in model_map.tensors]
    inner = [layer for layer in layers if layer is not None]
    assert inner == sorted(inner)
    assert set(inner) == set(range(model_map.n_layers))
    assert model_map.tensors[0].role is Role.EMBEDDING
    tied = json.loads((tiny(name) / "config.json").read_text())["tie_word_embeddings"]
    assert model_map.tensors[-1].role is (Role.NORM if tied else Role.OUTPUT)


def test_roles_of_a_mixture_of_experts() -> None:
    model_map = describe_directory(tiny("qwen3_moe"))
    roles = {spec.name: (spec.role, spec.shape) for spec in model_map.tensors if spec.layer == 1}
    assert roles["blk.1.ffn_gate_inp.weight"] == (Role.ROUTER, (8, 64))
    assert roles["blk.1.ffn_gate_exps.weight"] == (Role.EXPERT_GATE, (8, 32, 64))
    assert roles["blk.1.ffn_up_exps.weight"] == (Role.EXPERT_UP, (8, 32, 64))
    assert roles["blk.1.ffn_down_exps.weight"] == (Role.EXPERT_DOWN, (8, 64, 32))
    assert roles["blk.1.attn_q_norm.weight"] == (Role.NORM, (32,))


def test_roles_of_fused_matrices() -> None:
    roles = {spec.name: (spec.role, spec.shape) for spec in describe_directory(tiny("phi3")).tensors}
    assert roles["blk.0.attn_qkv.weight"] == (Role.ATTENTION_QKV, (128, 64))
    assert roles["blk.0.ffn_up.weight"] == (Role.MLP_GATE_UP, (192, 64))


def spell_as_transformers_4(config: dict[str, Any]) -> None:
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
        config["sliding_window_pattern"] = 6
        del config["layer_types"]
    config["rope_theta"] = rope.pop("rope_theta")
    rope.pop("partial_rotary_factor", None)
    if rope["rope_type"] != "default":
        config["rope_scaling"] = {**rope, "type": rope["rope_type"]}
        del config["rope_scaling"]["rope_type"]
    if "head_dim" in config and config["head_dim"] == config["hidden_size"] // config["num_attention_heads"]:
        config["head_dim"] = None


@pytest.mark.parametrize("name", TINY_MODELS)
def test_both_spellings_of_the_configuration_mean_the_same(name: str, tmp_path: Path) -> None:
    tiny_models.build(name, tmp_path / name)
    new = describe_directory(tmp_path / name)
    edit_config(tmp_path / name, spell_as_transformers_4)
    assert "rope_parameters" not in (tmp_path / name / "config.json").read_text()
    old = describe_directory(tmp_path / name)
    assert (old.tensors, old.metadata) == (new.tensors, new.metadata)


def test_the_text_model_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    directory = tmp_path / "gemma3"
    tiny_models.build("gemma3", directory)
    text = describe_directory(directory)
    edit_weights(directory, lambda weights: rename_all(weights, "language_model."))
    edit_weights(directory, lambda weights: weights.update({"vision_tower.x": np.zeros(3, np.float32)}))
    edit_config(directory, nest_text_config)
    multimodal = describe_directory(directory)
    assert keys(multimodal) == keys(text)
    assert [(spec.name, spec.shape) for spec in multimodal.tensors] == [
        (spec.name, spec.shape) for spec in text.tensors
    ]
    assert multimodal.tensors[0].sources == ("language_model.model.embed_tokens.weight",)


def rename_all(weights: dict[str, np.ndarray], prefix: str) -> None:
    for name in list(weights):
        weights[prefix + name] = weights.pop(name)


def nest_text_config(config: dict[str, Any]) -> None:
    text = dict(config)
    config.clear()
    config |= {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}


@pytest.mark.parametrize("name", ["llama-llama3", "mixtral", "gemma3", "phi3-longrope"])
def test_a_gguf_as_the_source_is_taken_over(name: str, tmp_path: Path) -> None:
    write_f32(tiny(name), tmp_path / "source.gguf")
    original, source = open_checkpoint(str(tiny(name))), open_checkpoint(str(tmp_path / "source.gguf"))
    expected, found = describe(original), describe(source)
    assert (found.architecture, found.n_layers) == (expected.architecture, expected.n_layers)
    assert [(s.name, s.shape, s.role, s.layer) for s in found.tensors] == [
        (s.name, s.shape, s.role, s.layer) for s in expected.tensors
    ]
    for ours, theirs in zip(found.tensors, expected.tensors, strict=True):
        whole = read_rows(original, theirs, 0, theirs.n_rows)
        assert np.array_equal(read_rows(source, ours, 0, ours.n_rows), whole)
        assert np.array_equal(read_rows(source, ours, ours.n_rows // 2, ours.n_rows), whole[ours.n_rows // 2 :])
        assert np.array_equal(restore(ours, whole)[ours.name].reshape(whole.shape), whole)
    assert found.metadata.keys() == expected.metadata.keys()
    for key, value in found.metadata.items():
        other = expected.metadata[key]
        same = np.isclose(value.value, other.value) if isinstance(value.value, float) else value.value == other.value
        assert same and value.type == other.type, key


def test_a_tied_output_is_left_out_even_when_it_is_stored(tmp_path: Path) -> None:
    directory = tmp_path / "llama"
    tiny_models.build("llama-tied", directory)
    before = describe_directory(directory)
    edit_weights(directory, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].copy()}))
    assert describe_directory(directory).tensors == before.tensors


def test_rotary_buffers_are_left_out(llama: Path) -> None:
    before = describe_directory(llama)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(llama, lambda weights: weights.update({name: np.zeros(8, np.float32)}))
    assert describe_directory(llama).tensors == before.tensors


def test_names_and_origins_come_from_the_model_card(tmp_path: Path) -> None:
    directory = tmp_path / "Tiny-Fable-Instruct-v2"
    tiny_models.build("llama", directory)
    (directory / "README.md").write_text("---\nlicense: mit\nbase_model: org/Tiny-Fable\n---\n# Fable\n")
    metadata = {key: value.value for key, value in describe_directory(directory).metadata.items()}
    assert metadata["general.type"] == "model"
    assert metadata["general.architecture"] == "llama"
    assert metadata["general.name"] == "Tiny Fable Instruct v2"
    assert (metadata["general.finetune"], metadata["general.version"]) == ("Instruct", "v2")
    assert metadata["general.license"] == "mit"
    assert metadata["general.base_model.0.repo_url"] == "https://huggingface.co/org/Tiny-Fable"
    assert metadata["general.size_label"] == "113K"
    assert "general.file_type" not in metadata


def test_a_snapshot_of_the_hub_s_cache_has_the_model_s_name(tmp_path: Path) -> None:
    directory = tmp_path / "models--org--Tiny-Fable" / "snapshots" / ("0" * 40)
    tiny_models.build("llama", directory)
    metadata = {key: value.value for key, value in describe_directory(directory).metadata.items()}
    assert (metadata["general.name"], metadata["general.organization"]) == ("Tiny Fable", "Org")


def test_values_of_the_model_card_are_text_where_gguf_wants_text(llama: Path) -> None:
    card = "---\nlicense: [mit, apache-2.0]\nmodel_version: 2.0\ntags: [tiny, 5]\n---\n"
    (llama / "README.md").write_text(card)
    metadata = describe_directory(llama).metadata
    assert metadata["general.license"].value == "mit,apache-2.0"
    assert metadata["general.version"].value == "2.0"
    assert metadata["general.tags"].value == ["tiny", "5"]
    write_f32(llama, llama / "written.gguf")


# Ten billion texts, by aliases; a number of base 60, which takes minutes to read.
BOMB = "\n".join(["a: &a [x]", *(f"{to}: &{to} [{', '.join([f'*{of}'] * 10)}]" for of, to in pairwise("abcdefghijk"))])


@pytest.mark.parametrize(
    "front_matter",
    [
        "a: [",
        "base_model: {a: b: c}",
        "license: [[1]]",
        "just words",
        "tags: [[a]]",
        "language: {a: b}",
        "date: 2024-13-45",
        f"{BOMB}\ntags: *k\nlanguage: *k",
        f"a: {'[' * 5000}",
        f"a: 1{':1' * 100_000}",
        f"a: {'x' * (1 << 20)}",
    ],
    ids=lambda text: text[-20:],
)
def test_a_model_card_that_makes_no_sense_is_left_out(llama: Path, front_matter: str) -> None:
    without = describe_directory(llama)
    (llama / "README.md").write_text(f"---\n{front_matter}\n---\n")
    found = describe_directory(llama)
    assert (found.tensors, found.metadata) == (without.tensors, without.metadata)
    assert [note.partition(":")[0] for note in found.source_notes] == [
        "README.md is left out, its front matter makes no sense"
    ]
    assert source_card(open_checkpoint(str(llama))).keys() <= {"license"}


def test_gguf_is_told_what_it_reads_of_a_model_card_itself(tmp_path: Path) -> None:
    text = (
        "license: mit\nlanguage:\n- en\n- no\ntags:\n\t- \U0001f600 - no\n\t- a\u0301\n\t- 'yes'\n\t- 2024-01-02\n"
        f"model_description: {'long ' * 50}\nmodel-index:\n- name: results\nbase_model: [org/A, org/B]\n"
    )
    (tmp_path / "README.md").write_text(f"---\n{text}---\n# Words\n", encoding="utf-8")
    expected = Metadata.load_model_card(tmp_path)
    found = read_front_matter(tmp_path / "README.md")
    assert found == expected and expected["language"] == ["en", "no"]
    (tmp_path / "README.md").write_text(front_matter_file(found))
    assert Metadata.load_model_card(tmp_path) == expected


def test_remote_code_is_refused(llama: Path) -> None:
    edit_config(llama, lambda config: config.update(model_type="secret", auto_map={"AutoModel": "modeling.Secret"}))
    with pytest.raises(ConvertError, match="remote code is never run"):
        describe_directory(llama)


def test_missing_tensor(llama: Path) -> None:
    edit_weights(llama, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ConvertError, match=r"lacks the tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        describe_directory(llama)


def test_missing_expert(tmp_path: Path) -> None:
    directory = tmp_path / "mixtral"
    tiny_models.build("mixtral", directory)
    edit_weights(directory, lambda weights: weights.pop("model.layers.1.block_sparse_moe.experts.3.w2.weight"))
    with pytest.raises(ConvertError, match=r"lacks the tensor '.*experts\.3\.w2\.weight'"):
        describe_directory(directory)


def test_unknown_tensor(llama: Path) -> None:
    edit_weights(llama, lambda weights: weights.update({"model.layers.0.extra.weight": np.zeros(3, np.float32)}))
    with pytest.raises(ConvertError, match=r"1 tensors are unknown .* 'model\.layers\.0\.extra\.weight'"):
        describe_directory(llama)


def test_shapes_that_contradict_the_configuration(llama: Path) -> None:
    edit_config(llama, lambda config: config.update(intermediate_size=128))
    with pytest.raises(ConvertError, match=r"has the shape \[96, 64\], the configuration says \[128, 64\]"):
        describe_directory(llama)


@pytest.mark.parametrize("value", [None, 0, -4, "64", 6.5, True])
def test_sizes_that_are_none(llama: Path, value: Any) -> None:
    edit_config(llama, lambda config: config.update(hidden_size=value))
    with pytest.raises(ConvertError, match=r"gives hidden_size = .*, which is no size"):
        describe_directory(llama)


def test_numbers_that_are_none(llama: Path) -> None:
    edit_config(llama, lambda config: config.update(rms_norm_eps="1e-6"))
    with pytest.raises(ConvertError, match="gives rms_norm_eps = '1e-6', which is no number"):
        describe_directory(llama)


def test_values_that_llama_cpp_does_not_implement(llama: Path) -> None:
    edit_config(llama, lambda config: config.update(hidden_act="gelu"))
    with pytest.raises(ConvertError, match="implements llama with hidden_act = 'silu' only, this model has 'gelu'"):
        describe_directory(llama)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "proportional", "rope_theta": 1e4}, "does not implement the rope scaling 'proportional'"),
        ({"rope_type": "longrope", "rope_theta": 1e4}, "does not implement the rope scaling 'longrope'"),
        ({"rope_type": "yarn", "rope_theta": 1e4}, "type 'yarn' lack a valid factor"),
        ({"rope_theta": "1e4"}, "type 'default' lack a valid rope_theta"),
        ({"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}, "type 'llama3' lack a valid low_freq_factor"),
    ],
)
def test_rope_scalings_that_are_refused(llama: Path, rope: dict[str, Any], message: str) -> None:
    edit_config(llama, lambda config: config.update(rope_parameters=rope))
    with pytest.raises(ConvertError, match=message):
        describe_directory(llama)


def test_rope_factors_of_the_wrong_number(tmp_path: Path) -> None:
    tiny_models.build("phi3-longrope", tmp_path)
    edit_config(tmp_path, lambda config: config["rope_parameters"].update(long_factor=[1.0] * 7))
    with pytest.raises(ConvertError, match="lack a valid long_factor"):
        describe_directory(tmp_path)


def test_a_gguf_with_an_unknown_tensor(tmp_path: Path) -> None:
    write_f32(tiny("llama"), tmp_path / "source.gguf")
    content = (tmp_path / "source.gguf").read_bytes()
    (tmp_path / "source.gguf").write_bytes(content.replace(b"blk.1.ffn_down", b"blk.1.ffn_town"))
    with pytest.raises(ConvertError, match=r"'blk\.1\.ffn_town\.weight' is unknown"):
        describe(open_checkpoint(str(tmp_path / "source.gguf")))


def test_describing_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys; from bitwright.converter.source.open import open_checkpoint; "
        "from bitwright.converter.model.model_map import describe; "
        "describe(open_checkpoint(sys.argv[1])); "
        "print([name for name in ('torch', 'transformers', 'numba') if name in sys.modules])"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program, str(tiny("llama"))], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert finished.stdout.strip() == "[]"


def test_what_is_to_be_said_of_the_tokenizer_comes_with_the_map(tiny):
    assert any("add_dummy_prefix" in note for note in describe(open_checkpoint(str(tiny("mistral")))).notes)
