"""Every architecture through the whole job: four bits that llama.cpp and transformers run as we evaluate them."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from bitwright import converter
from bitwright.calibration.control import PassControl
from bitwright.calibration.stream.forward import LayerStream
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.converter.directory.artifact import DirectoryArtifact
from bitwright.converter.directory.products import SchemeProducts
from bitwright.converter.judge import findings
from bitwright.formats.errors import ConvertError
from tests import tiny_models
from tests.converter.advice.llama_cpp_cache import check_against_llama_cpp
from tests.converter.exceptions import CONVERTED, EXCEPTIONS
from tests.converter.model.llama_cpp_vectors import token_vectors
from tests.tiny_architectures import ALL_TINY_MODELS
from tests.tiny_models import TINY_MODELS, VOCAB_SIZE, TinyModel

SHORT = {"samples": 128, "sequence_length": 16, "calibration": "embedded", "effort": "fast", "threads": 1}
# Of dozens of layers, as what llama.cpp does depends on their number: by rules, for time's sake.
DEEP = ("deepseek_v2-lite", "exaone4-sliding")
TOKENS = np.random.default_rng(0).integers(3, VOCAB_SIZE, (1, 40))
# compressed-tensors decodes experts to bfloat16, which routers then see; a matrix read wrongly changes logits by half.
LARGEST_ERROR = 0.15


def one_of_each() -> Iterator[str]:
    """Names of the tiny models but for those that differ in no tensor: options of the rope, wrappers of text models."""
    seen: set[str] = set()
    for name in CONVERTED:
        tiny = ALL_TINY_MODELS[name]
        model_type = text_type(tiny)
        if model_type in seen and (name in TINY_MODELS or tiny.wrapper is not None):
            continue
        seen.add(model_type)
        yield name


def text_type(tiny: TinyModel) -> str:
    return str(tiny_models.configuration(tiny).get_text_config().model_type)


def logits(directory: Path, tiny: TinyModel) -> np.ndarray:
    """float32 [40, VOCAB_SIZE]: what transformers computes of the directory."""
    model_class = getattr(transformers, tiny_models.configuration(tiny).architectures[0])
    model = model_class.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        output = model(torch.from_numpy(TOKENS))
    return (output.logits if "logits" in output else output.last_hidden_state)[0].numpy()


def evaluated_logits(artifact: Path, model: Path, work_dir: Path) -> np.ndarray:
    """float32 [40, VOCAB_SIZE]: our own evaluation of the directory."""
    weights = DirectoryArtifact.of_recipe(artifact)
    streamable = StreamableModel(weights, model, device="cpu", threads=1, arithmetic=SchemeProducts(weights))
    stream = LayerStream(streamable, TOKENS, PassControl(work_dir))
    stream.run()
    with stream.head() as head, torch.inference_mode():
        return head(stream.hidden_states(0, 1)[0]).numpy()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", [*one_of_each()])
def test_four_bits_run_in_llama_cpp_as_we_evaluate_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """But for the guard, which reads texts, whatever the architecture is: tests of its own have it."""
    monkeypatch.setattr(findings, "streamed_coherence", lambda *_: None)
    model = tiny_models.checkpoint(name, ALL_TINY_MODELS[name])
    options = {"output": tmp_path / "model.gguf", "device": "cpu", "quiet": True, "analysis": name not in DEEP, **SHORT}
    report = converter.convert(str(model), profile="balanced-4bit", **options)
    bits = {row["group"]: row["bits_per_weight"] for row in report["groups"]}
    assert min(bits.values()) <= 6
    check_against_llama_cpp(model, tmp_path / "model.gguf")
    expected = tiny_models.reference_logits(name, ALL_TINY_MODELS[name])
    assert (report["quality"] is None) == (expected.shape[1] != VOCAB_SIZE), "judged by its words if it has a head"
    if report["quality"] is None:  # it embeds texts: its vectors are the source's, as far as four bits go
        tokens = tiny_models.tokens(name, ALL_TINY_MODELS[name])
        found = token_vectors(tmp_path / "model.gguf", tokens, expected.shape[1])
        assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.5
        return
    assert np.isfinite(report["quality"]["mean_kld"])
    agreement = report["agreement"]
    if name in EXCEPTIONS["agreement"]:
        bound, _ = EXCEPTIONS["agreement"][name]
        assert agreement["logits"]["relative_error"] <= bound
    else:  # "differs": it cuts a text otherwise, which test_tokenizer.py knows of
        assert agreement["verdict"] in ("agrees", "differs"), agreement["reasons"]


@pytest.mark.parametrize("name", [*one_of_each()])
def test_four_bits_in_a_directory_are_the_model_in_transformers(tmp_path: Path, name: str) -> None:
    tiny = ALL_TINY_MODELS[name]
    model = tiny_models.checkpoint(name, tiny)
    profile = tmp_path / "w4a16.toml"
    profile.write_text('description = "d"\ngood_for = "g"\ntarget = "safetensors"\nbase = "W4A16_G32"\n')
    options = {"profile": str(profile), "output": tmp_path / "out", "device": "cpu", "judge": "off", "quiet": True}
    kind, reason = EXCEPTIONS["directory"].get(name, ("", ""))
    if kind == "refused":
        with pytest.raises(ConvertError) as refusal:
            converter.convert(str(model), **options, **SHORT)
        assert re.search(reason, str(refusal.value))
        return
    converter.convert(str(model), **options, **SHORT)
    if kind == "fails":
        with pytest.raises((AttributeError, RuntimeError), match=reason):
            logits(tmp_path / "out", tiny)
        return
    found = logits(tmp_path / "out", tiny)
    if found.shape[1] == VOCAB_SIZE:
        expected, bound = evaluated_logits(tmp_path / "out", model, tmp_path / "work"), LARGEST_ERROR
    else:  # there is no evaluation of a model without a head: its vectors are about those of the source
        expected, bound = logits(model, tiny), 0.5
    assert np.linalg.norm(found - expected) <= bound * np.linalg.norm(expected)
