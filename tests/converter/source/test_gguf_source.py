"""A float GGUF as a source is as complete as llama.cpp wants it, or it is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType, GGUFWriter
from gguf.gguf_writer import GGUFValue

from bitwright.converter.judge.llama_cpp import LlamaCpp
from bitwright.converter.model.model_map import describe
from bitwright.converter.model.stored_rows import read_rows
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from tests.tiny_models import TINY_MODELS

Keys = dict[str, GGUFValue]
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def contents(tiny: Callable[[str], Path]) -> Callable[[str], tuple[Keys, Tensors]]:
    """contents("qwen3"): key-values and tensors of that tiny model's file in F32."""

    def read(name: str) -> tuple[Keys, Tensors]:
        checkpoint = open_checkpoint(str(tiny(name)))
        model_map = describe(checkpoint)
        rows = {
            spec.name: read_rows(checkpoint, spec, 0, spec.n_rows).reshape(spec.shape) for spec in model_map.tensors
        }
        return dict(model_map.metadata), rows

    return read


def write(path: Path, keys: Keys, tensors: Tensors) -> Path:
    writer = GGUFWriter(path, keys["general.architecture"].value)
    for key, value in keys.items():
        if key != "general.architecture":
            writer.add_key_value(key, value.value, value.type, value.sub_type)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ConvertError) as caught:
        describe(open_checkpoint(str(path)))
    return caught.value.what


def loads(path: Path) -> bool:
    try:
        LlamaCpp(path, n_ctx=64, n_threads=1).close()
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", TINY_MODELS)
def test_whole_files_are_taken(name: str, contents, tmp_path: Path) -> None:
    keys, tensors = contents(name)
    found = describe(open_checkpoint(str(write(tmp_path / "model.gguf", keys, tensors))))
    assert [(spec.name, spec.shape) for spec in found.tensors] == [(key, of.shape) for key, of in tensors.items()]


@pytest.mark.parametrize("name", ["llama-llama3", "mixtral", "qwen2", "qwen3_moe", "gemma3", "phi3-longrope"])
def test_files_without_a_tensor_are_refused(name: str, contents, tmp_path: Path) -> None:
    keys, tensors = contents(name)
    for missing in [name for name in tensors if name.startswith("blk.1.") or not name.startswith("blk.")]:
        path = write(tmp_path / "model.gguf", keys, {name: of for name, of in tensors.items() if name != missing})
        if missing.startswith("rope_") or missing == "output.weight":
            assert loads(path)
            describe(open_checkpoint(str(path)))
        else:  # llama.cpp itself goes on without some of these
            assert refusal(path) == f"the file lacks the tensor {missing!r}"


def test_biases_may_be_left_out(contents, tmp_path: Path) -> None:
    keys, tensors = contents("llama-biases")
    path = write(
        tmp_path / "model.gguf", keys, {name: of for name, of in tensors.items() if not name.endswith(".bias")}
    )
    assert loads(path)
    describe(open_checkpoint(str(path)))


@pytest.mark.parametrize("name", ["llama-biases", "qwen3_moe", "gemma3", "phi3"])
def test_files_without_a_key_are_refused_where_llama_cpp_cannot_do_without(name: str, contents, tmp_path: Path) -> None:
    keys, tensors = contents(name)
    prefix = f"{keys['general.architecture'].value}."
    for missing in [key for key in keys if key.startswith(prefix) and "expert" not in key]:
        path = write(tmp_path / "model.gguf", {key: of for key, of in keys.items() if key != missing}, tensors)
        try:
            describe(open_checkpoint(str(path)))
        except ConvertError:
            # A size that no tensor of a model with experts in every layer has.
            assert not loads(path) or missing == "qwen3moe.feed_forward_length"
        else:
            assert loads(path), missing


@pytest.mark.parametrize("missing", ["expert_count", "expert_used_count", "expert_feed_forward_length"])
def test_files_without_a_key_of_experts_are_refused(missing: str, contents, tmp_path: Path) -> None:
    """llama.cpp would end the process."""
    keys, tensors = contents("qwen3_moe")
    del keys[f"qwen3moe.{missing}"]
    assert refusal(write(tmp_path / "model.gguf", keys, tensors)) == f"the file lacks the key qwen3moe.{missing}"


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("llama.block_count", 0, "has llama.block_count = 0, which is no size"),
        ("llama.block_count", 3, "lacks the tensor 'blk.2.attn_norm.weight'"),
        ("llama.block_count", 1, "'blk.1.attn_norm.weight' is unknown to the architecture, or of a layer that"),
        ("llama.block_count", 2**31, "tensors for 2147483648 layers"),
        ("llama.feed_forward_length", 128, r"has the shape [96, 64], the file's keys say [128, 64]"),
        ("llama.attention.head_count", 8, "has the shape [64, 64], the file's keys say [128, 64]"),
        ("llama.attention.value_length", 8, "the keys of a head have 16 columns, its values 8"),
    ],
)
def test_keys_that_contradict_the_tensors(key: str, value: int, what: str, contents, tmp_path: Path) -> None:
    keys, tensors = contents("llama")
    keys[key] = GGUFValue(value, GGUFValueType.UINT32)
    assert what in refusal(write(tmp_path / "model.gguf", keys, tensors))


@pytest.mark.parametrize("value", ["two", 2.5, True, [2, 2]])
def test_keys_of_another_kind(value: Any, contents, tmp_path: Path) -> None:
    keys, tensors = contents("llama")
    kinds = {str: GGUFValueType.STRING, float: GGUFValueType.FLOAT32, bool: GGUFValueType.BOOL}
    kind = kinds.get(type(value), GGUFValueType.ARRAY)
    keys["llama.block_count"] = GGUFValue(value, kind, GGUFValueType.UINT32 if isinstance(value, list) else None)
    what = refusal(write(tmp_path / "model.gguf", keys, tensors))
    assert what == f"the file has llama.block_count = {value!r}, which is no size"


def test_a_vocabulary_alone(contents, tmp_path: Path) -> None:
    keys, _ = contents("llama")
    path = write(tmp_path / "model.gguf", keys, {})
    assert refusal(path) == "the file is a vocabulary without a model: it has no tensors"


def test_a_vocabulary_of_another_size(contents, tmp_path: Path) -> None:
    keys, tensors = contents("llama")
    tensors["token_embd.weight"] = tensors["token_embd.weight"][:-8]
    path = write(tmp_path / "model.gguf", keys, tensors)
    assert not loads(path)
    assert "'token_embd.weight' has the shape [392, 64], the file's keys say [400, 64]" in refusal(path)
