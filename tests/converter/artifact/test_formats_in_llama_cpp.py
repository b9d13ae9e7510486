"""Every architecture, every format, every role that a plan may give it: llama.cpp computes what we say the file is.

The models have one layer with rows of 256, which every format fits. Of each architecture there are as many files as
formats; from file to file all roles move on to the next format, each from a start of its own.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner

from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.calibration.stream.arithmetic import computed_by
from bitwright.calibration.stream.device.transfer import WeightTransfer
from bitwright.calibration.stream.observer import locate_matrices
from bitwright.calibration.stream.weights import ParameterReader
from bitwright.converter.architectures.architecture import architectures
from bitwright.converter.cli import main
from bitwright.converter.gguf.encode import Encoder
from bitwright.converter.gguf.verify import DecodedArtifact
from bitwright.converter.judge.llama_cpp import LlamaCpp
from bitwright.converter.model.model_map import describe
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.gguf import TensorEntry, lay_out, read_gguf
from bitwright.formats.registry import FORMATS, get_format
from bitwright.profiles.planning.assign import assign
from bitwright.profiles.planning.plan import Plan
from bitwright.profiles.reading.rules import LayerQuantizationConfig
from bitwright.profiles.reading.schema import load_profile
from bitwright.profiles.vocabulary import ModelMap, Role
from tests.converter.artifact.f32_file import write_f32
from tests.converter.artifact.llama_cpp_products import RuntimeProducts, WatchedLlamaCpp
from tests.converter.artifact.test_sizes import some_importance
from tests.tiny_models import VOCAB_SIZE, TinyModel, build_model

# Relative error of the logits, and of the inputs of every product; 7e-7 is found.
TOLERANCE = 1e-5
# Of gemma3 llama.cpp looks GELU up in a table, by its argument in float16: 3.3e-4 is found of the inputs of the down
# projection, 2.3e-5 of the logits.
BOUNDS = {"gemma3": (5e-5, 5e-4)}
TOKENS = np.random.default_rng(3).integers(5, VOCAB_SIZE, 24)
_SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}
_EXPERTS = {"moe_intermediate_size": 256, "num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": True}
MODELS = {
    "llama": TinyModel("Llama", {}, "bpe"),
    "llama-biases": TinyModel("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": TinyModel("Mistral", {"sliding_window": None}),
    "mixtral": TinyModel("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen2": TinyModel("Qwen2", {}, "bpe"),
    "qwen3": TinyModel("Qwen3", {}, "bpe"),
    "qwen3_moe": TinyModel("Qwen3Moe", _EXPERTS, "bpe"),
    "gemma3": TinyModel("Gemma3", {"query_pre_attn_scalar": 64, "sliding_window": 64}, "sentencepiece-bare"),
    "phi3": TinyModel("Phi3", {"sliding_window": None}),
}


@dataclass(frozen=True)
class Model:
    directory: Path
    checkpoint: Checkpoint
    model_map: ModelMap
    importance: ImportanceMatrix

    def planned(self, formats: dict[Role, str]) -> Plan:
        """The plan that gives these roles these formats, and F32 to all others."""
        rules = [LayerQuantizationConfig("F32", "rest", roles=("*",))]
        rules += [LayerQuantizationConfig(name, "asked for", roles=(role,)) for role, name in formats.items()]
        return assign(load_profile("uniform-8bit"), self.model_map, rules, "fast")

    def write(self, plan: Plan, path: Path) -> Path:
        entries = [
            TensorEntry(p.tensor.name, p.tensor.shape, get_format(p.format).ggml_type, p.n_bytes) for p in plan.tensors
        ]
        (layout,) = lay_out(path.name, self.model_map.metadata, entries)
        with Encoder(self.checkpoint, plan, self.importance, 2) as encoder, path.open("wb") as file:
            file.write(layout.header)
            for planned, offset in zip(plan.tensors, layout.offsets, strict=True):
                file.seek(offset)
                file.writelines(encoder.encode(planned))
            file.truncate(layout.n_bytes)
        assert path.stat().st_size == len(layout.header) + sum(-(-p.n_bytes // 32) * 32 for p in plan.tensors)
        return path

    @cached_property
    def transformers(self) -> transformers.PreTrainedModel:
        """Experts run one by one, as in the product's own evaluation."""
        return transformers.AutoModelForCausalLM.from_pretrained(
            self.directory, dtype=torch.float32, experts_implementation="eager"
        ).eval()

    @torch.inference_mode()
    def our_logits(self, path: Path, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, float]:
        """float32 [n_tokens, n_vocab] of the decoded weights, whose products take llama.cpp's roundings of their
        inputs; and the largest relative error of a product's inputs."""
        artifact = DecodedArtifact([path], self.model_map)
        products = RuntimeProducts(artifact, inputs)
        weights = dict(self.transformers.named_parameters())
        reader = ParameterReader(artifact, self.transformers)
        for name, weight in weights.items():
            weight.copy_(reader.read(name, weight, WeightTransfer(weight.device)))

        def stored_names(parameter: str, matrix: int, n_matrices: int) -> list[str]:
            return reader.matrices(parameter, n_matrices)[matrix]

        with computed_by(products, locate_matrices(weights), stored_names):
            logits = self.transformers(torch.from_numpy(TOKENS)[None]).logits[0].numpy()
        matrices = {source for t in self.model_map.tensors if len(t.shape) > 1 for source in t.sources}
        if any(tensor.role is Role.OUTPUT for tensor in self.model_map.tensors):
            matrices -= set(self.model_map.tensor("token_embd.weight").sources)
        assert products.distances.keys() == matrices, "every matrix is multiplied"
        return logits, max(products.distances.values())


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products of these sizes are over before a second thread has begun."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    built: dict[tuple[str, bool], Model] = {}

    def get(name: str, tied: bool = False) -> Model:
        if (name, tied) not in built:
            directory = tmp_path_factory.mktemp("formats") / name
            tiny = MODELS[name]
            options = {**_SIZES, **tiny.options, "tie_word_embeddings": tied}
            build_model(replace(tiny, options=options), name, directory)
            checkpoint = open_checkpoint(str(directory))
            model_map = describe(checkpoint)
            matrices = [t for t in model_map.tensors if t.quantizable and t.layer is not None]
            random = np.random.default_rng(0)
            sums = {t.name: random.lognormal(0, 1, (t.n_matrices, t.n_columns)) for t in matrices}
            importance = ImportanceMatrix(sums, {name: np.ones(len(s), np.int64) for name, s in sums.items()})
            built[name, tied] = Model(directory, checkpoint, model_map, importance)
        return built[name, tied]

    return get


def roles_of(model_map: ModelMap) -> list[Role]:
    return list(dict.fromkeys(t.role for t in model_map.tensors if t.quantizable))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def check_formats(model: Model, all_formats: Sequence[dict[Role, str]], path: Path) -> None:
    """llama.cpp's logits of the model in these formats are ours, and so are the inputs of all of its products."""
    bounds = BOUNDS.get(model.model_map.architecture, (TOLERANCE, TOLERANCE))
    for formats in all_formats:
        plan = model.planned(formats)
        assert {p.tensor.role: p.format for p in plan.tensors if p.tensor.role in formats} == formats
        model.write(plan, path)
        with WatchedLlamaCpp(path, n_ctx=64, n_threads=1) as llama_cpp:
            theirs = llama_cpp.logits(TOKENS.tolist())
        ours, of_inputs = model.our_logits(path, llama_cpp.inputs)
        assert ours.std() > 0.01
        found = relative_error(theirs, ours), of_inputs
        assert found[0] <= bounds[0] and found[1] <= bounds[1], (found, formats)


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_the_file_says(model, tmp_path, name):
    of, formats = model(name), list(FORMATS)
    roles = roles_of(of.model_map)
    assert Role.OUTPUT in roles
    square = [{role: formats[(i + 3 * j) % len(formats)] for j, role in enumerate(roles)} for i in range(len(formats))]
    assert {pair for row in square for pair in row.items()} == {(role, name) for role in roles for name in formats}
    check_formats(of, square, tmp_path / "model.gguf")


@pytest.mark.parametrize("name", [architecture.name for architecture in architectures() if architecture.name in MODELS])
def test_an_embedding_that_is_the_output_head_too(model, tmp_path, name):
    of = model(name, tied=True)
    assert Role.OUTPUT not in roles_of(of.model_map)
    check_formats(of, [{Role.EMBEDDING: name} for name in FORMATS], tmp_path / "model.gguf")


def logits_of(path: Path) -> np.ndarray:
    with LlamaCpp(path, n_ctx=64, n_threads=1) as llama_cpp:
        return llama_cpp.logits(TOKENS.tolist())


def ends_llama_cpp(path: Path) -> bool:
    """Whether running the file ends the process, as a failed assertion of llama.cpp does."""
    program = (
        f"from bitwright.converter.judge.llama_cpp import LlamaCpp; LlamaCpp({str(path)!r}, n_ctx=64).logits([5, 6, 7])"
    )
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    return run.returncode < 0


def multiply_scales(path: Path, factor: float) -> None:
    """Multiply all second-level scales in the file."""
    for tensor in read_gguf(path).tensors:
        if tensor.name.endswith(".scale"):
            scales = tensor.decode(0, 1) * np.float32(factor)
            with path.open("r+b") as file:
                file.seek(tensor.offset)
                file.write(scales.tobytes())


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_applies_second_level_scales_where_the_data_files_say(model, tmp_path, name):
    """Scales of one role at a time are written whatever the data file says, and multiplied in the file: the logits move
    where llama.cpp applies them, and not by a bit where it does not."""
    of, path = model(name), tmp_path / "model.gguf"
    tensors = tuple(replace(t, scale_applied=t.quantizable) for t in of.model_map.tensors)
    everywhere = replace(of, model_map=replace(of.model_map, tensors=tensors))
    for role in roles_of(of.model_map):
        (applied,) = {t.scale_applied for t in of.model_map.tensors if t.role is role}
        everywhere.write(everywhere.planned({role: "NVFP4"}), path)
        if not applied:
            with pytest.raises(ConvertError, match="has second-level scales, which"):
                DecodedArtifact([path], of.model_map)
        if role is Role.EMBEDDING:
            assert not applied
            with pytest.raises(ValueError, match="wrong number of tensors"):
                logits_of(path)
        elif name == "llama-biases" and role.startswith("mlp_"):
            assert not applied and ends_llama_cpp(path)
        else:
            before = logits_of(path)
            multiply_scales(path, 4.0)
            assert np.array_equal(logits_of(path), before) != applied, role


@pytest.mark.parametrize("name", MODELS)
def test_a_gguf_source_has_second_level_scales_in_the_same_places(model, tmp_path, name):
    of = model(name)
    write_f32(of.directory, tmp_path / "f32.gguf")
    described = describe(open_checkpoint(str(tmp_path / "f32.gguf")))
    places, expected = ({t.name for t in of.tensors if t.scale_applied} for of in (described, of.model_map))
    assert places == expected and places


def test_a_plan_says_where_block_scales_are_alone(tiny):
    """Rows of 96, of the down projections, do not fit."""
    arguments = ["plan", "--set", "mlp_*=NVFP4", "--set", "attention_*=NVFP4"]
    done = CliRunner().invoke(main, [*arguments, str(tiny("qwen2"))])
    assert done.exit_code == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "4 tensors in NVFP4 have the scales of their blocks alone" in said
    assert "applies no second-level scale to mlp_gate, mlp_up" in said
    others = CliRunner().invoke(main, [*arguments, str(tiny("qwen3"))]).stdout
    assert "blocks alone" not in " ".join(others.split())


def test_every_format_goes_through_the_command(tiny, tmp_path):
    """A model each of whose 28 matrices is in another format: written, verified by decoding, shown, and run."""
    model_map = describe(open_checkpoint(str(tiny("llama-256"))))
    matrices = [t for t in model_map.tensors if t.quantizable and t.layer is not None]
    importance = some_importance(tiny("llama-256"), tmp_path / "i.gguf")
    arguments = ["--profile", "uniform-8bit", "--imatrix", str(importance), "--effort", "fast", "--judge", "off"]
    for tensor, name in zip(matrices, FORMATS, strict=True):
        arguments += ["--set", f"{tensor.name}={name}"]
    arguments += ["--set", "output=NVFP4"]
    output = tmp_path / "m.gguf"
    done = CliRunner().invoke(main, [*arguments, "--output", str(output), str(tiny("llama-256"))])
    assert done.exit_code == 0, done.stderr
    shown = CliRunner().invoke(main, ["inspect", str(output)]).stdout
    assert set(FORMATS) <= set(shown.replace(",", " ").split())
    assert "output.scale" in {tensor.name for tensor in read_gguf(output).tensors}
    assert np.isfinite(logits_of(output)).all()
