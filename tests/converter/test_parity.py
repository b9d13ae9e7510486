"""Parity with llama.cpp: its runtime computes transformers' logits from our file, and its converter writes the same."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from converter.llama_cpp import LlamaCpp
from tests import tiny_models
from tests.converter.f32_file import write_f32
from tests.tiny_models import TINY_MODELS

ROOT = Path(__file__).parents[2]
# llama.cpp's converter pins packages of its own, so it lives in an environment of its own.
CONVERTER_PYTHON = Path(os.environ.get("LLAMA_CPP_CONVERTER", ROOT / ".venv-convert/bin/python"))
CONVERTER_PROGRAM = Path(__file__).parent / "llama_cpp_converter.py"

# Where our metadata differ from those of llama.cpp's converter: key -> why.
WRITERS_KEYS = {
    "general.file_type": "states the format of the finished file: its writer adds it",
    "general.quantization_version": "states the format of the finished file: its writer adds it",
}
BPE_KEYS = {
    "tokenizer.ggml.add_bos_token": "stated although it is the default of most BPE vocabularies: llama.cpp has others "
    "that start every text with a token, and theirs leaves the key out"
}
# These have a tokenizer.model and no tokenizer.json.
REBUILT_KEYS = {
    "tokenizer.ggml.add_space_prefix": "transformers rebuilds the tokenizer for these model types without a space in "
    "front of a text; theirs leaves the key out"
}
EXCEPTIONS: dict[str, dict[str, str]] = {name: dict(WRITERS_KEYS) for name in TINY_MODELS}
for _name, _tiny in TINY_MODELS.items():
    if _tiny.tokenizer == "bpe":
        EXCEPTIONS[_name] |= BPE_KEYS
    if _tiny.architecture in ("Mistral", "Mixtral", "Phi3"):
        EXCEPTIONS[_name] |= REBUILT_KEYS
# transformers' attention_factor takes the place of yarn's usual one; llama.cpp's runtime multiplies its own usual one
# by attn_factor: the quotient belongs there. Theirs writes the whole into a key that its runtime does not use for this.
EXCEPTIONS["llama-yarn-attention-factor"] |= {
    "llama.rope.scaling.attn_factor": "the attention factor, relative to yarn's usual one",
    "llama.rope.scaling.yarn_attn_factor": "without effect in llama.cpp",
}


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with NAME.ours.gguf and NAME.theirs.gguf of every tiny model."""
    directory = tmp_path_factory.mktemp("parity")
    arguments: list[str] = []
    for name in TINY_MODELS:
        tiny_models.build(name, directory / name)
        write_f32(directory / name, directory / f"{name}.ours.gguf")
        arguments += [str(directory / name), str(directory / f"{name}.theirs.gguf")]
    assert CONVERTER_PYTHON.is_file(), f"{CONVERTER_PYTHON} is missing: make setup, or set LLAMA_CPP_CONVERTER"
    command = [str(CONVERTER_PYTHON), str(CONVERTER_PROGRAM), tiny_models.PRE_TOKENIZER, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return directory


def llama_cpp_logits(path: Path, name: str) -> np.ndarray:
    # llama.cpp takes the rope factors for long contexts by the context's size, transformers by the sequence's.
    n_ctx = 256 if TINY_MODELS[name].n_tokens <= 256 else 1024
    with LlamaCpp(path, n_ctx=n_ctx, n_threads=1) as model:
        return model.logits(tiny_models.tokens(name))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_llama_cpp_computes_the_logits_of_transformers(files: Path, name: str) -> None:
    found = llama_cpp_logits(files / f"{name}.ours.gguf", name)
    expected = tiny_models.reference_logits(name)
    assert expected.std() > 0.5
    assert relative_error(found, expected) <= 1e-3


@pytest.mark.parametrize("name", TINY_MODELS)
def test_tensors_equal_those_of_llama_cpp_s_converter(files: Path, name: str) -> None:
    ours = {tensor.name: tensor for tensor in GGUFReader(files / f"{name}.ours.gguf").tensors}
    theirs = {tensor.name: tensor for tensor in GGUFReader(files / f"{name}.theirs.gguf").tensors}
    assert ours.keys() == theirs.keys()
    for tensor_name, tensor in ours.items():
        twin = theirs[tensor_name]
        assert (tensor.tensor_type, tensor.shape.tolist()) == (twin.tensor_type, twin.shape.tolist()), tensor_name
        assert tensor.data.tobytes() == twin.data.tobytes(), tensor_name


@pytest.mark.parametrize("name", TINY_MODELS)
def test_metadata_equal_those_of_llama_cpp_s_converter(files: Path, name: str) -> None:
    ours, theirs = (
        {
            key: (field.types, field.contents())
            for key, field in GGUFReader(files / f"{name}.{side}.gguf").fields.items()
            if not key.startswith("GGUF.")
        }
        for side in ("ours", "theirs")
    )
    differing = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert differing == EXCEPTIONS[name].keys()


def test_the_exception_of_the_attention_factor_is_needed(files: Path) -> None:
    name = "llama-yarn-attention-factor"
    assert (
        relative_error(llama_cpp_logits(files / f"{name}.theirs.gguf", name), tiny_models.reference_logits(name)) > 0.01
    )
