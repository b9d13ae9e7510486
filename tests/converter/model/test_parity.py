"""Parity with llama.cpp: its runtime computes transformers' logits from our file, and its converter writes the same."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from bitwright.converter.judge.llama_cpp import LlamaCpp
from bitwright.converter.model.model_map import describe
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from tests import tiny_models
from tests.converter.artifact.f32_file import write_f32
from tests.converter.exceptions import CONVERTED, EXCEPTIONS, REFUSED
from tests.converter.model.llama_cpp_vectors import token_vectors
from tests.shared_files import shared
from tests.tiny_architectures import ALL_TINY_MODELS

ROOT = Path(__file__).parents[3]
# llama.cpp's converter pins packages of its own, so it lives in an environment of its own.
CONVERTER_PYTHON = Path(os.environ.get("LLAMA_CPP_CONVERTER", ROOT / ".venv-convert/bin/python"))
CONVERTER_PROGRAM = Path(__file__).parent / "llama_cpp_converter.py"

BESIDE_A_PEER = [name for name in CONVERTED if name not in EXCEPTIONS["without_peer"]]
LARGEST_ERROR = 1e-4

WRITERS_KEYS = ["general.file_type", "general.quantization_version"]
"""They state the format of the finished file: its writer adds them."""

# Where our metadata differ from those of llama.cpp's converter for every model of a kind: key -> why.
BPE_KEYS = {
    "tokenizer.ggml.add_bos_token": "stated although it is the default of most BPE vocabularies: llama.cpp has others "
    "that start every text with a token, and theirs leaves the key out"
}
# Tensors whose last bit may be another: pattern of their names -> why.
ROUNDED = {r"blk\.\d+\.ssm_a": "exp, which numpy rounds otherwise than torch"}
# These have a tokenizer.model and no tokenizer.json.
REBUILT_KEYS = {
    "tokenizer.ggml.add_space_prefix": "transformers rebuilds the tokenizer for these model types without a space in "
    "front of a text; theirs leaves the key out"
}


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def theirs() -> dict[str, Path]:
    """Name -> what llama.cpp's converter has written of that tiny model: a GGUF, or the text of its error."""
    assert CONVERTER_PYTHON.is_file(), f"{CONVERTER_PYTHON} is missing: make setup, or set LLAMA_CPP_CONVERTER"
    checkpoints = {name: tiny_models.checkpoint(name, ALL_TINY_MODELS[name]) for name in CONVERTED}

    def convert(directory: Path) -> None:
        pairs = [str(path) for name, model in checkpoints.items() for path in (model, directory / f"{name}.gguf")]
        command = [str(CONVERTER_PYTHON), str(CONVERTER_PROGRAM), tiny_models.PRE_TOKENIZER, *pairs]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr

    made_of = "".join(str(checkpoints[name]) for name in CONVERTED) + CONVERTER_PROGRAM.read_text()
    directory = shared("llama_cpp_converter", made_of, convert)
    return {name: directory / f"{name}.gguf" for name in CONVERTED}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> "Ours":
    return Ours(tmp_path_factory.mktemp("parity"))


class Ours:
    """Our F32 files of the tiny models, each written when it is first asked for."""

    def __init__(self, directory: Path):
        self.directory = directory

    def __getitem__(self, name: str) -> Path:
        path = self.directory / f"{name}.gguf"
        if not path.exists():
            write_f32(tiny_models.checkpoint(name, ALL_TINY_MODELS[name]), path)
        return path


def llama_cpp_logits(path: Path, name: str) -> np.ndarray:
    # llama.cpp takes the rope factors for long contexts by the context's size, transformers by the sequence's.
    n_ctx = 256 if ALL_TINY_MODELS[name].n_tokens <= 256 else 1024
    with LlamaCpp(path, n_ctx=n_ctx, n_threads=1) as model:
        return model.logits(tiny_models.tokens(name, ALL_TINY_MODELS[name]))


def test_exceptions_are_of_tiny_models() -> None:
    listed = {name for table in EXCEPTIONS.values() for name in table}
    assert listed <= ALL_TINY_MODELS.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_converted_is_refused(name: str) -> None:
    with pytest.raises(ConvertError) as refusal:
        describe(open_checkpoint(str(tiny_models.checkpoint(name, ALL_TINY_MODELS[name]))))
    assert re.search(REFUSED[name], str(refusal.value))


@pytest.mark.parametrize("name", [name for name in CONVERTED if name not in EXCEPTIONS["without_logits"]])
def test_llama_cpp_computes_the_logits_of_transformers(ours: Ours, name: str) -> None:
    expected = tiny_models.reference_logits(name, ALL_TINY_MODELS[name])
    if expected.shape[1] == tiny_models.VOCAB_SIZE:
        found = llama_cpp_logits(ours[name], name)
    else:
        tokens = tiny_models.tokens(name, ALL_TINY_MODELS[name])
        found = token_vectors(ours[name], tokens, expected.shape[1])
    assert expected.std() > 0.5
    error = relative_error(found, expected)
    if name in EXCEPTIONS["logits"]:
        bound, _ = EXCEPTIONS["logits"][name]
        assert bound / 20 < error <= bound
    else:
        assert error <= LARGEST_ERROR


@pytest.mark.parametrize("name", EXCEPTIONS["without_peer"])
def test_llama_cpp_s_converter_makes_no_file(theirs: dict[str, Path], name: str) -> None:
    assert theirs[name].read_bytes()[:4] != b"GGUF"


@pytest.mark.parametrize("name", BESIDE_A_PEER)
def test_tensors_equal_those_of_llama_cpp_s_converter(ours: Ours, theirs: dict[str, Path], name: str) -> None:
    found, expected = ({tensor.name: tensor for tensor in reader(files[name]).tensors} for files in (ours, theirs))
    differing = {
        tensor
        for tensor in found.keys() | expected.keys()
        if tensor not in found or tensor not in expected or not same(found[tensor], expected[tensor])
    }
    reasons = EXCEPTIONS["tensors"].get(name, {})
    assert not {tensor for tensor in differing if not any(re.fullmatch(pattern, tensor) for pattern in reasons)}
    assert not {pattern for pattern in reasons if not any(re.fullmatch(pattern, tensor) for tensor in differing)}


@pytest.mark.parametrize("name", BESIDE_A_PEER)
def test_metadata_equal_those_of_llama_cpp_s_converter(ours: Ours, theirs: dict[str, Path], name: str) -> None:
    found, expected = metadata(ours[name]), metadata(theirs[name])
    differing = {key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)}
    assert differing == exceptional_keys(name) | (BPE_KEYS.keys() & found.keys() - expected.keys())


def metadata(path: Path) -> dict[str, Any]:
    """Key -> types and value; those of the architecture without its name."""
    fields = reader(path).fields
    architecture = fields["general.architecture"].contents()
    return {
        key.removeprefix(f"{architecture}."): (field.types, field.contents())
        for key, field in fields.items()
        if not key.startswith("GGUF.") and key not in WRITERS_KEYS
    }


def exceptional_keys(name: str) -> set[str]:
    keys = set(EXCEPTIONS["metadata"].get(name, {}))
    if ALL_TINY_MODELS[name].architecture in ("Mistral", "Mixtral", "Phi3"):
        keys |= REBUILT_KEYS.keys()
    return keys


def reader(path: Path) -> GGUFReader:
    assert path.read_bytes()[:4] == b"GGUF", path.read_text()
    return GGUFReader(path)


def same(tensor: Any, other: Any) -> bool:
    if (tensor.tensor_type, tensor.shape.tolist()) != (other.tensor_type, other.shape.tolist()):
        return False
    if any(re.fullmatch(pattern, tensor.name) for pattern in ROUNDED):
        return np.allclose(tensor.data, other.data, rtol=3e-7, atol=0)
    return bool(tensor.data.tobytes() == other.data.tobytes())


def test_the_exception_of_the_attention_factor_is_needed(theirs: dict[str, Path]) -> None:
    name = "llama-yarn-attention-factor"
    assert relative_error(llama_cpp_logits(theirs[name], name), tiny_models.reference_logits(name)) > 0.01
