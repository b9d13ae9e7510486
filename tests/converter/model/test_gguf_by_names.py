"""GGUFs of architectures without a data file: roles by the tensors' names, everything else as the file has it."""

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from bitwright.converter.architectures.architecture import architectures, gguf_name_map
from bitwright.converter.judge.llama_cpp import LlamaCpp
from bitwright.converter.model import gguf_map
from bitwright.converter.model.gguf_roles import layer_of, role_of
from bitwright.converter.model.model_map import describe
from bitwright.converter.model.stored_rows import read_rows
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.profiles.vocabulary import UNQUANTIZED_ROLES, Role
from tests.converter.artifact.f32_file import write_f32
from tests.converter.commands import PLAIN, TEXT, done, refused
from tests.tiny_models import TINY_MODELS

# llama.cpp computes it as it does llama, and has other names for all keys; nobody adds a data file for it.
FOREIGN = "internlm2"
TOKENS = [5, 91, 17, 203, 40, 22, 318, 30, 77, 12, 251, 64]


def foreign(directory: Path, path: Path, extra: dict[str, np.ndarray] | None = None) -> Path:
    """The checkpoint, which is a llama, as the GGUF of an architecture that we know nothing of; with these tensors."""
    checkpoint = open_checkpoint(str(directory))
    model_map = describe(checkpoint)
    writer = GGUFWriter(path, FOREIGN)
    for key, value in model_map.metadata.items():
        if key != "general.architecture":
            writer.add_key_value(re.sub("^llama", FOREIGN, key), value.value, value.type, value.sub_type)
    for spec in model_map.tensors:
        writer.add_tensor(spec.name, read_rows(checkpoint, spec, 0, spec.n_rows).reshape(spec.shape))
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(path: Path) -> np.ndarray:
    with LlamaCpp(path, n_ctx=64, n_threads=1) as model:
        return model.logits(TOKENS)


def error(path: Path, source: Path) -> float:
    """Of the logits, relative to their size; those of another model would have 1.4."""
    expected = logits(source)
    return float(np.linalg.norm(logits(path) - expected) / np.linalg.norm(expected))


def types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def importance(tiny, tmp_path_factory) -> Path:
    """Of the llama with rows of 256, which is what the foreign file is."""
    path = tmp_path_factory.mktemp("importance") / "imatrix.gguf"
    done("imatrix", tiny("llama-256"), "--output", path, *TEXT)
    return path


@pytest.mark.parametrize("architecture", architectures(), ids=lambda architecture: architecture.name)
def test_names_say_what_the_data_files_say(architecture):
    names = gguf_name_map(architecture.gguf_name, 2)
    outside = [(rule, None) for rule in (*architecture.before, *architecture.after)]
    for rule, layer in [*outside, *((rule, 1) for rule in architecture.layer)]:
        try:
            name = rule.gguf_name(names, layer)
        except ValueError:
            assert rule.role is Role.OUTPUT  # of an architecture whose head is the embedding
            continue
        # Where gate and up are one matrix, llama.cpp names it after the one of them.
        known = {Role.MLP_GATE_UP: Role.MLP_UP, Role.OTHER: role_of(name)}.get(rule.role, rule.role)
        assert role_of(name) in UNQUANTIZED_ROLES | {None} or rule.role is not Role.OTHER
        assert (role_of(name), layer_of(name)) == (known, layer), name


def test_what_must_not_be_rounded_is_known_by_every_name_that_gguf_has_for_it():
    delicate = re.compile(
        r"norm(_\d|_exps)?$|gate_inp|conv1d|shortconv\.conv|sinks|ssm_[ad]$|exp_probs|rel_b|position|token_types|^rope|ln$"
    )
    text = [name for name in gguf.TENSOR_NAMES.values() if re.match(r"((enc|dec)\.)?blk\.|[a-z_]+$", name)]
    names = [f"{name.format(bid=7)}.weight" for name in text if delicate.search(name)]
    assert len(names) > 50
    assert {name: role_of(name) for name in names if role_of(name) not in UNQUANTIZED_ROLES} == {}
    for bias in ("blk.0.attn_q.bias", "blk.0.ssm_dt.bias", "output.bias", "blk.0.exp_probs_b.bias"):
        assert role_of(bias) in (Role.BIAS, Role.SSM_STATE)
    assert role_of("blk.0.ssm_a") is Role.SSM_STATE


def test_names_of_towers_say_nothing_of_the_text_model():
    for name in ("v.blk.0.attn_q.weight", "a.blk.1.ffn_up.weight", "mm.0.weight", "resampler.attn.q.weight"):
        assert role_of(name) is None
        assert layer_of(name) is None


@pytest.mark.parametrize("name", [name for name in TINY_MODELS if "-" not in name])
def test_a_file_is_described_alike_with_and_without_its_data_file(name, tiny, tmp_path, monkeypatch):
    write_f32(tiny(name), tmp_path / "model.gguf")
    known = describe(open_checkpoint(str(tmp_path / "model.gguf")))
    monkeypatch.setattr(gguf_map, "architectures", tuple)
    unknown = describe(open_checkpoint(str(tmp_path / "model.gguf")))
    assert (unknown.n_layers, unknown.metadata) == (known.n_layers, known.metadata)
    assert "no data file" in unknown.gguf_notes[0]
    assert len(unknown.gguf_notes) == 1
    for one, other in zip(known.tensors, unknown.tensors, strict=True):
        role = Role.MLP_UP if one.role is Role.MLP_GATE_UP else one.role
        assert (other.name, other.shape, other.role, other.layer) == (one.name, one.shape, role, one.layer)
        assert other.quantizable == one.quantizable


def test_8_bits_need_nothing_but_the_file(tiny, tmp_path):
    source = foreign(tiny("llama-256"), tmp_path / "source.gguf")
    done(source, *PLAIN, "--output", tmp_path / "out.gguf")
    made, stated = GGUFReader(tmp_path / "out.gguf"), GGUFReader(source)
    own = {key for key in stated.fields if not key.startswith(("GGUF.", "general.file_type", "general.quant"))}
    assert all(made.fields[key].contents() == stated.fields[key].contents() for key in own)
    assert types(tmp_path / "out.gguf")["blk.0.attn_q.weight"] == "Q8_0"
    assert error(tmp_path / "out.gguf", source) < 0.1


def test_4_bits_with_an_imatrix(tiny, importance, tmp_path):
    source = foreign(tiny("llama-256"), tmp_path / "source.gguf")
    options = ["--profile", "balanced-4bit", "--judge", "off", "--output", tmp_path / "out.gguf"]
    done(source, *options, "--imatrix", importance)
    found = types(tmp_path / "out.gguf")
    assert {found[f"blk.{i}.{name}.weight"] for i in range(4) for name in ("attn_q", "ffn_gate")} == {"Q4_K"}
    assert error(tmp_path / "out.gguf", source) < 0.4  # random weights, in 4 bits


def test_experts_are_matrices_of_their_own(tiny, tmp_path, monkeypatch):
    write_f32(tiny("qwen3_moe"), tmp_path / "source.gguf")
    monkeypatch.setattr(gguf_map, "architectures", tuple)
    done(tmp_path / "source.gguf", *PLAIN, "--output", tmp_path / "out.gguf")
    found = types(tmp_path / "out.gguf")
    assert found["blk.1.ffn_down_exps.weight"] == "Q8_0"
    assert found["blk.1.ffn_gate_inp.weight"] == "F32"
    assert error(tmp_path / "out.gguf", tmp_path / "source.gguf") < 0.2  # routers choose otherwise now and then


def test_what_is_unknown_keeps_its_type(tiny, tmp_path):
    values = np.arange(64 * 8, dtype=np.float16).reshape(8, 64)
    extra = {"blk.1.mystery.weight": values, "v.blk.0.attn_q.weight": values.astype(np.float32)}
    source = foreign(tiny("llama"), tmp_path / "source.gguf", extra)
    note = describe(open_checkpoint(str(source))).gguf_notes[1]
    assert note == ("2 tensors of unknown use keep the source's type: blk.1.mystery.weight, v.blk.0.attn_q.weight")
    done(source, *PLAIN, "--output", tmp_path / "out.gguf")
    made = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "out.gguf").tensors}
    assert made["blk.1.mystery.weight"].tensor_type is GGMLQuantizationType.F16
    assert np.array_equal(made["blk.1.mystery.weight"].data, values)
    assert made["v.blk.0.attn_q.weight"].tensor_type is GGMLQuantizationType.F32
    assert made["blk.1.attn_q.weight"].tensor_type is GGMLQuantizationType.Q8_0


@pytest.mark.parametrize("scheme", ["Q8_0", "NVFP4"])
def test_a_scale_of_the_models_own_is_no_scale_of_ours(scheme, tiny, importance, tmp_path):
    """Gemma 4 has one for every expert."""
    own = {"blk.0.ffn_down.scale": np.array([1.5, 2.5], np.float32)}
    source = foreign(tiny("llama-256"), tmp_path / "source.gguf", own)
    options = ["--set", f"mlp_down={scheme}", "--imatrix", importance]
    done(source, *PLAIN, *options, "--output", tmp_path / "out.gguf")
    made = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "out.gguf").tensors}
    assert made["blk.0.ffn_down.weight"].tensor_type.name == scheme
    assert made["blk.0.ffn_down.scale"].data.tolist() == [1.5, 2.5]


def test_what_takes_running_the_model_is_refused_before_the_work_with_what_does_without(tiny, tmp_path):
    source = foreign(tiny("llama"), tmp_path / "source.gguf")
    output = ["--output", tmp_path / "out.gguf"]
    said = refused(source, "--profile", "balanced-4bit", "--judge", "off", *output)
    assert f"the architecture '{FOREIGN}' has no data file here" in said
    assert "--imatrix FILE" in said and "8 bits and more" in said and "--judge", "off" not in said
    said = refused(source, "--profile", "uniform-8bit", *output)
    assert "the quality report" in said and "--judge", "off" in said and "--imatrix" not in said
    assert "--imatrix FILE" in refused("imatrix", source, "--output", tmp_path / "imatrix.gguf", *TEXT)
    assert not (tmp_path / "out.gguf").exists()


def without_type(path: Path, architecture: str, kind: str | None, tensors: dict[str, np.ndarray]) -> Path:
    writer = GGUFWriter(path, architecture)
    if kind is not None:
        writer.add_type(kind)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("architecture", "kind", "tensor", "what"),
    [
        ("anything", "adapter", "blk.0.attn_q.weight.lora_a", "of the kind 'adapter', and no model"),
        ("clip", "mmproj", "v.blk.0.attn_q.weight", "of the kind 'mmproj', and no model"),
        ("clip", None, "v.blk.0.attn_q.weight", "no tensor of this file .* has a name of llama.cpp's for a language"),
    ],
)
def test_files_that_are_no_language_model(
    architecture: str, kind: str | None, tensor: str, what: str, tmp_path: Path
) -> None:
    path = without_type(tmp_path / "file.gguf", architecture, kind, {tensor: np.ones((4, 32), np.float32)})
    with pytest.raises(ConvertError, match=what):
        describe(open_checkpoint(str(path)))
